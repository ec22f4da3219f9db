"""Recurrent layers are torch's and the reference's of online norm; the models made of them, on every mesh."""

import itertools
from functools import lru_cache, partial

import golden
import jax
import numpy as np
import pytest
from harness import CONTEXT, recipe_of, run, start, variant
from laid_out import pull
from parity import assert_equal

from jaxpar.core.parts import chain
from jaxpar.core.recipe import Model
from jaxpar.layers import recurrent
from jaxpar.norms.online import online
from jaxpar.plan.context import Settings, context
from jaxpar.plan.layout import SINGLE
from jaxpar.plan.wire import cost_of, device_wire
from jaxpar.policies.fp32 import fp32
from jaxpar.report import account, bill

ONE_DEVICE = context(Settings(SINGLE, fp32(), device_wire()))
ORDER = {"rnn": ("new",), "gru": recurrent.GATES, "lstm": ("input", "forget", "new", "out")}  # torch's


@pytest.mark.parametrize("name, layers", [("rnn", 1), ("lstm", 2)])  # the GRU: tests/test_models.py
def test_recurrent_layers_give_the_states_and_gradients_of_torch(name, layers):
    arrays, gates = golden.load("rnn_torch"), ORDER[name]

    def named(kind):
        """torch holds the gates of a matrix in one, (gates out, in)."""
        tree = {}
        for number in range(layers):
            tree[str(number)] = params = {}
            for side, short in (("in", "ih"), ("hidden", "hh")):
                whole = (arrays[f"{name}/{kind}/{part}_{short}_l{number}"] for part in ("weight", "bias"))
                for gate, weight, bias in zip(gates, *(np.split(one, len(gates)) for one in whole), strict=True):
                    params[f"{gate}_{side}"] = {"weight": weight.T, "bias": bias}
        return tree

    x, dy, y, dx = (np.moveaxis(arrays[f"{name}/{key}"], 1, 0) for key in ("x", "gy", "y", "grad_x"))
    model = chain({str(n): getattr(recurrent, name)(7 if n else 5, 7) for n in range(layers)})

    @jax.jit
    def run(params, x, dy):
        found, back = jax.vjp(lambda params, x: model.apply(params, {}, x, ONE_DEVICE)[0], params, x)
        return found, back(dy)

    assert_equal(run(named("param"), x, dy), (y, (named("grad"), dx)), tolerance=2e-6)


def normed(kind, width, hidden, norm):
    """A layer and its jitted `(params, extra, (x, states), dy) -> Pulled` on one device."""
    layer = getattr(recurrent, kind)(width, hidden, norm=norm)
    return layer, jax.jit(partial(pull, lambda *local: layer.apply(*local, ONE_DEVICE)))


def test_an_rnn_with_online_norm_is_the_reference_s_over_three_sequences():
    """State goes on from one sequence to the next, that of the backward pass against time."""
    arrays = golden.load("online_norm_rnn_rnn_tanh_kernel")
    layer, run = normed("rnn", 3, 6, partial(online, forward=0.99, backward=0.9))
    _, extra = layer.init(jax.random.key(0))

    def named(prefix):
        read = {key: arrays[f"{prefix}/{key}"] for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        gain, bias = (arrays[f"{prefix}/norm.{key}"] for key in ("weight", "bias"))
        return {
            "new_in": {"weight": read["weight_ih"].T, "bias": read["bias_ih"]},
            "new_hidden": {"weight": read["weight_hh"].T, "bias": read["bias_hh"]},
            "norm": {"new": {"gain": gain, "bias": bias}},
        }

    for number in range(3):
        x, dy, h = arrays["x"][number], arrays["gy"][number], arrays["h0"][number]
        y, dx = (arrays[f"s{number}/{key}"] for key in ("y", "grad_x"))
        x, dy, y, dx = (np.moveaxis(a, 1, 0) for a in (x, dy, y, dx))
        found, gradients, extra = run(named("param"), extra, (x, (h,)), dy)
        assert_equal(found, y, tolerance=5e-6)
        want = named(f"s{number}/grad"), (dx, (arrays[f"s{number}/grad_h0"],))
        assert_equal(gradients, want, tolerance=5e-6)
        state = {key: arrays[f"s{number}/norm0/{key}"] for key in ("mu", "var", "u", "v")}
        passes = np.float32(5 * (number + 1))  # once for each position
        assert_equal(
            extra["norm"]["new"],
            {
                "forward": {"mean": state["mu"], "variance": state["var"]},
                "backward": {"u": state["u"], "v": state["v"], "passes": passes},
            },
            tolerance=5e-6,
        )


# --- an LSTM with online norm, against plain loops over positions and examples in float64


def numpy_norm(a, state, decay, gain, bias):
    """One position forward: (z, what goes back needs); `state` is changed."""
    y, deviations = np.zeros_like(a), np.zeros_like(a)
    for n, row in enumerate(a):
        deviations[n] = np.sqrt(state["variance"] + 1e-5)
        y[n] = (row - state["mean"]) / deviations[n]
        state["variance"] = decay * state["variance"] + decay * (1 - decay) * (row - state["mean"]) ** 2
        state["mean"] = decay * state["mean"] + (1 - decay) * row
    moved = gain * y + bias
    scale = 1 / np.sqrt((moved**2).mean(1, keepdims=True) + 1e-5)
    return moved * scale, (y, deviations, scale, moved * scale)


def numpy_norm_back(dz, kept, state, decay, gain):
    """One position back: (da, gradients of gain and bias); `state` is changed."""
    y, deviations, scale, z = kept
    moved = scale * (dz - z * (z * dz).mean(1, keepdims=True))
    da = np.zeros_like(dz)
    for n, d in enumerate(moved * gain):
        d = d - (1 - decay) * state["v"] * y[n]
        state["v"] = state["v"] + d * y[n]
        da[n] = d / deviations[n] - (1 - decay) * state["u"]
        state["u"] = state["u"] + da[n]
    return da, (moved * y).sum(0), moved.sum(0)


def numpy_lstm(params, states, x, h, c, dy, decays):
    """(y, gradients of params, of x, of h and c) of `x[batch, context, width]`; states of norms are changed."""
    gates, norms = recurrent.LSTM_GATES, params["norm"]
    total = jax.tree.map(np.zeros_like, params)
    dx, dh, dc, kept, ys = np.zeros_like(x), np.zeros_like(h), np.zeros_like(c), [], []

    def slope(name, value):
        return 1 - value**2 if name == "new" else value * (1 - value)

    for t in range(x.shape[1]):
        made, caches = {}, {}
        for name in gates:
            into, over = params[f"{name}_in"], params[f"{name}_hidden"]
            a = x[:, t] @ into["weight"] + into["bias"] + h @ over["weight"] + over["bias"]
            z, caches[name] = numpy_norm(a, states[name], decays[0], **norms[name])
            made[name] = np.tanh(z) if name == "new" else 1 / (1 + np.exp(-z))
        before, c = (h, c), made["forget"] * c + made["input"] * made["new"]
        z, caches["cell"] = numpy_norm(c, states["cell"], decays[0], **norms["cell"])
        h = made["out"] * np.tanh(z)
        kept.append((made, caches, before, np.tanh(z)))
        ys.append(h)
    for t, (made, caches, (h, c), shown) in reversed([*enumerate(kept)]):
        dh, found = dh + dy[:, t], {}
        found["out"], dz = dh * shown, dh * made["out"] * (1 - shown**2)
        da, *trained = numpy_norm_back(dz, caches["cell"], states["cell"], decays[1], norms["cell"]["gain"])
        for leaf, more in zip(("gain", "bias"), trained, strict=True):
            total["norm"]["cell"][leaf] += more
        dc = dc + da
        found |= {"forget": dc * c, "input": dc * made["new"], "new": dc * made["input"]}
        dc, dh = dc * made["forget"], 0
        for name in gates:
            dz = found[name] * slope(name, made[name])
            da, *trained = numpy_norm_back(dz, caches[name], states[name], decays[1], norms[name]["gain"])
            for leaf, more in zip(("gain", "bias"), trained, strict=True):
                total["norm"][name][leaf] += more
            for side, value in (("in", x[:, t]), ("hidden", h)):
                total[f"{name}_{side}"]["weight"] += value.T @ da
                total[f"{name}_{side}"]["bias"] += da.sum(0)
            dx[:, t] += da @ params[f"{name}_in"]["weight"].T
            dh = dh + da @ params[f"{name}_hidden"]["weight"].T
    return np.stack(ys, 1), (total, (dx, (dh, dc)))


def test_an_lstm_with_online_norm_is_plain_loops_over_two_sequences():
    decays, rng = (0.95, 0.9), np.random.default_rng(0)
    layer, run = normed("lstm", 3, 4, partial(online, forward=decays[0], backward=decays[1]))
    params, extra = layer.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.asarray(leaf + 0.3 * rng.normal(size=leaf.shape)), params)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, extra["norm"]))
    states = {name: {**one["forward"], **one["backward"]} for name, one in exact[1].items()}
    for _ in range(2):
        x, dy, h, c = (rng.normal(size=(5, *shape)) for shape in ((6, 3), (6, 4), (4,), (4,)))
        y, gradients, extra = run(params, extra, (x, (h, c)), dy)
        want = numpy_lstm(exact[0], states, x, h, c, dy, decays)
        assert_equal((y, gradients), want, tolerance=5e-6)
        for name, one in extra["norm"].items():
            both = one["forward"] | {key: one["backward"][key] for key in ("u", "v")}
            assert_equal(both, {key: states[name][key] for key in both}, tolerance=5e-6)


# --- models

SIZES = {"layers": 2, "width": 16, "hidden": 32}
TEXT = {name: Model(name, **SIZES, context=CONTEXT) for name in ("rnn", "lstm", "gru")}
IMAGES = {name: Model(name, **SIZES) for name in TEXT}
PLANS = [
    "data=4,microbatches=2",
    "tensor=one_d:4",
    "tensor=sequence:4",
    "tensor=two_d:2x2",
    "tensor=three_d:2x2x2",
    "tensor=fsdp:4",
    "data=2,pipe=2,microbatches=2,storage=residual",
]
MORE = ["pipe=2,tensor=one_d:2,schedule=zero_bubble_h1,microbatches=4", "data=2,microbatches=2,remat=sqrt"]
NORMS = ["none", "layer", "online:forward=0.99"]
PRODUCT = [*itertools.product(TEXT, NORMS, PLANS), *itertools.product(TEXT, NORMS[-1:], MORE)]
CLASSIFIERS = [("rnn", "online"), ("lstm", "none"), ("gru", "layer")]


def with_norm(model, norm):
    """With the norm inside its cells."""
    if norm == "none":
        return model
    return variant(model, norm=norm)


@lru_cache
def on_one_device(model, microbatches):
    """A stream goes from position to position, at each through the examples: so microbatches are others."""
    return run(recipe_of(model, f"microbatches={microbatches}"))


def check(model, plan, norm):
    """Loss, gradients, state and bytes sent.

    Gradients of online norm are sums of controlled ones over all positions, of which each has what the later ones left:
    what is rounded differently grows on the way.
    """
    tolerance = 2e-5 if "online" in norm else 5e-6
    got = run(recipe_of(model, plan))
    want = on_one_device(model, got.parts.microbatches)
    assert abs(got.loss - want.loss) <= 2e-6 * abs(want.loss)
    assert_equal(got.gradients, want.gradients, tolerance)
    began = start(model)[1]
    passes = [new - old for new, old in zip(*(counts(tree) for tree in (got.extra, began)), strict=True)]
    steps = CONTEXT if model.context else 4  # rows of an image
    for count in passes:
        np.testing.assert_allclose(count, steps * got.parts.microbatches, atol=1e-4)
    assert_equal(*(without_counts(tree) for tree in (got.extra, want.extra)), tolerance)
    counted, predicted = bill.counted_in(got.parts, got.text), cost_of(account.gradient_lines(got.parts)).sent
    assert not counted.unknown and counted.sent == pytest.approx(predicted)
    return passes


def counts(extra):
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(extra) if path[-1].key == "passes"]


def without_counts(extra):
    return jax.tree_util.tree_map_with_path(lambda path, leaf: () if path[-1].key == "passes" else leaf, extra)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm", "plan"), PRODUCT)
def test_a_language_model_is_what_one_device_finds(name, norm, plan):
    passes = check(with_norm(TEXT[name], norm), plan, norm)
    assert len(passes) == (0 if "online" not in norm else {"rnn": 1, "lstm": 5, "gru": 3}[name])


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tensor=one_d:4", "tensor=two_d:2x2", "tensor=three_d:2x2x2", PLANS[-1]])
@pytest.mark.parametrize(("name", "norm"), CLASSIFIERS)
def test_a_classifier_of_rows_of_an_image_is_what_one_device_finds(name, norm, plan):
    check(with_norm(IMAGES[name], norm), plan, norm)


def test_a_classifier_with_online_norm_on_a_mesh_is_what_one_device_finds():
    check(with_norm(variant(IMAGES["rnn"], layers=1), "online"), "data=2,tensor=one_d:2", "online")
