"""Online norm is the reference's, number by number, and has the four properties that its paper states."""

import contextlib
import itertools
from functools import lru_cache, partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import SMALL, recipe_of, reference, run, start, variant
from hypothesis import given, settings
from hypothesis import strategies as st
from laid_out import laid_out, pull
from parity import assert_equal

from jaxpar.core.refuse import Refused
from jaxpar.norms.online import online
from jaxpar.plan.wire import cost_of
from jaxpar.report import account, bill

NAMES = {"ls": "layer_scaling", "ac": "clamp", "none": "none"}
REFERENCES = {"online_norm_1d_n8_default": (0.999, 0.99), "online_norm_2d_n8_cifar10": (1 - 2**-10, 1 - 2**-7)}
DIMS = {2: "batch embed", 3: "batch context embed", 4: "batch height width embed"}


def runs(norm, rank, count, plan="data=1"):
    """`(params, extra, x, dy) -> Pulled` of training, and of evaluation."""
    sizes, dims = {"batch": count, "context": 4}, (DIMS[rank],) * 2
    return tuple(jax.jit(partial(pull, laid_out(norm, plan, sizes, dims, train=mode))) for mode in (True, False))


def last(array):
    """Channels last."""
    return np.moveaxis(array, 1, -1) if array.ndim > 1 else array


QUICK = {("1d", "ls", "float64"), ("1d", "none", "float32"), ("2d", "ac", "float64"), ("2d", "ls", "float32")}
EVERY = itertools.product(REFERENCES, NAMES, [("float32", 1e-5), ("float64", 1e-11)])


@pytest.mark.parametrize(
    "name, control, precision, tolerance",
    [
        pytest.param(name, control, *how, marks=() if (name[12:14], control, how[0]) in QUICK else pytest.mark.slow)
        for name, control, how in EVERY
    ],
)
def test_six_steps_and_an_evaluation_are_those_of_the_reference(name, control, precision, tolerance):
    wide = precision == "float64"
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        arrays = {key: array.astype(precision) for key, array in golden.load(name).items() if key != "meta_json"}
        read = {key.split("/")[-1]: array for key, array in arrays.items() if key.startswith(f"{control}/numpy64")}
        forward, backward = REFERENCES[name]
        norm = online(len(arrays["weight"]), forward=forward, backward=backward, control=NAMES[control], clamp=2.0)
        _, extra = norm.init(jax.random.key(0))
        params = {"gain": jnp.asarray(arrays["weight"]), "bias": jnp.asarray(arrays["bias"])}
        train, still = runs(norm, arrays["x_eval"].ndim, len(arrays["x_eval"]))
        for step, (x, g) in enumerate(zip(arrays["x"], arrays["g"], strict=True)):
            y, (trained, dx), extra = train(params, extra, last(x), last(g))
            want = {key: array[step] for key, array in read.items() if len(array) == len(arrays["x"])}
            assert_equal(y, last(want["out"]), tolerance)
            assert_equal(dx, last(want["grad_in"]), tolerance)
            assert_equal(trained, {"gain": want["grad_weight"], "bias": want["grad_bias"]}, tolerance)
            assert_equal(extra["forward"], {"mean": want["mu"], "variance": want["var"]}, tolerance)
            passes = jnp.asarray(step + 1, precision)
            assert_equal(extra["backward"], {"u": want["u"], "v": want["v"], "passes": passes}, tolerance)
        found = still(params, extra, last(arrays["x_eval"]), last(arrays["g_eval"]))
        assert_equal(found.y, last(read["eval_out"]), tolerance)
        assert_equal(found.extra["forward"], extra["forward"], 0)
        ours = found.gradients[1], found.gradients[0]["gain"], found.gradients[0]["bias"]
        names = ("eval_grad_in", "eval_grad_weight", "eval_grad_bias")
        theirs = [arrays[f"{control}/kernel32/{key}"] for key in names]  # the reference's are in float32 alone
        assert_equal(ours, (last(theirs[0]), *theirs[1:]), 1e-5)


@pytest.mark.parametrize(
    "case, fields",
    [
        ("ls1d", {}),
        ("ls2d", {}),
        ("ls2d_g2", {"groups": 3}),  # of six channels, two each
        ("clamp2d", {"control": "clamp", "clamp": 1.0}),
    ],
)
def test_error_compensation_alone_is_the_reference_s(case, fields):
    """In evaluation, with statistics that change nothing."""
    x, g, out, grad = (last(golden.load("online_norm_ecm")[f"{case}/{key}"]) for key in ("x", "g", "out", "grad_in"))
    norm = online(6, **fields)
    params, extra = norm.init(jax.random.key(0))
    extra["forward"]["variance"] -= 1e-5  # with eps it is 1
    found = runs(norm, x.ndim, len(x))[1](params, extra, x, g)
    assert_equal(found.y, out, 1e-5)
    assert_equal(found.gradients[1], grad, 1e-5)


def test_batches_of_any_size_are_the_same_stream():
    """Outputs, gradients and state of eight examples at once are those of one, two and five."""
    norm = online(3, forward=0.9, backward=0.8)
    params, extra = norm.init(jax.random.key(0))
    x, dy = (np.random.default_rng(seed).normal(size=(8, 2, 2, 3)).astype(np.float32) for seed in (0, 1))
    y, (_, dx), after = runs(norm, 4, 8)[0](params, extra, x, dy)
    for part in (slice(0, 1), slice(1, 3), slice(3, 8)):
        found, (_, by_x), extra = runs(norm, 4, part.stop - part.start)[0](params, extra, x[part], dy[part])
        assert_equal((found, by_x), (y[part], dx[part]), 2e-6)
    assert_equal(extra["backward"].pop("passes"), np.float32(3), 0)
    del after["backward"]["passes"]
    assert_equal(extra, after, 2e-6)


def test_replicas_are_streams_of_their_own_that_may_share_their_state():
    x, dy = (np.random.default_rng(seed).normal(size=(8, 2, 2, 3)).astype(np.float32) for seed in (0, 1))
    fields = {"forward": 0.9, "backward": 0.8}
    params, begun = online(3, **fields).init(jax.random.key(0))
    one = runs(online(3, **fields), 4, 4)[0]
    (y, (_, dx), first), (z, (_, dz), second) = (
        one(params, begun, x[half], dy[half]) for half in np.split(np.r_[:8], 2)
    )
    for average in (False, True):
        norm = online(3, **fields, replicas=2, average=average)
        train, still = runs(norm, 4, 8, "data=2")
        found, (_, by_x), after = train(*norm.init(jax.random.key(0)), x, dy)
        assert_equal((found, by_x), (np.concatenate([y, z]), np.concatenate([dx, dz])), 2e-6)
        both = jax.tree.map(lambda a, b: np.stack([a, b]), first, second)
        mean = jax.tree.map(lambda leaf: leaf.mean(0), both)
        if average:
            assert_equal(after, mean, 2e-6)
        else:
            assert_equal(after, both | {"backward": both["backward"] | {"passes": np.float32(1)}}, 2e-6)
        assert_equal(still(params, after, x, dy).y, runs(online(3, **fields), 4, 8)[1](params, mean, x, dy).y, 2e-6)


def test_activations_of_16_bits_have_state_of_32():
    norm, x = online(3), np.random.default_rng(0).normal(2, 3, (8, 2, 2, 3)).astype(jnp.bfloat16)
    params, extra = norm.init(jax.random.key(0))
    train, _ = runs(norm, 4, 8)
    y, (trained, dx), after = train(params, extra, x, x)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((trained, after))} == {np.dtype("float32")}
    wide = train(params, extra, x.astype(np.float32), x.astype(np.float32))
    assert_equal((y, dx), (wide[0], wide[1][1]), 2**-8)
    assert_equal((trained, after), (wide[1][0], wide[2]), 1e-2)


def test_values_out_of_range_are_refused_all_at_once():
    wrong = {"forward": 1.0, "backward": 0.0, "clamp": -1.0, "eps": 0.0, "groups": 0, "replicas": 0, "control": "clmp"}
    with pytest.raises(Refused, match="did you mean `clamp`") as refused:
        online(3, **wrong)
    assert {problem.value for problem in refused.value.problems} == {f"online:{k}={v}" for k, v in wrong.items()}


# --- in a model

MODEL = variant(SMALL["convnet"], norm="online")
WIDE = [
    "data=4",
    "tensor=one_d:4,microbatches=2",
    "tensor=two_d:2x2",
    "tensor=three_d:2x2x2",
    "tensor=two_half_d:2x2x2",
    "tensor=fsdp:4",
    "tensor=sequence:4",
    "data=2,tensor=two_d:2x2,microbatches=2,remat=block",
    "microbatches=4,remat=sqrt",
    "microbatches=2,remat=names:norm",
    "data=4,zero=2,microbatches=2",
    "data=4,zero=3,remat=block",
    "pipe=2,data=2,schedule=gpipe,microbatches=4",
    "pipe=2,tensor=two_d:2x2,schedule=gpipe,microbatches=2,storage=residual",
    "pipe=2,data=2,schedule=one_f_one_b,microbatches=4,storage=residual",
    "pipe=2,tensor=one_d:2,schedule=one_f_one_b,microbatches=4,remat=block",
    "pipe=2,data=2,tensor=one_d:2,schedule=zero_bubble_h1,microbatches=4,storage=residual",
    "pipe=2,tensor=three_d:1x2x2,schedule=zero_bubble_h1,microbatches=4",
    "pipe=4,schedule=one_f_one_b,microbatches=8",
]


@pytest.mark.parametrize(
    "plan",
    ["data=2,tensor=one_d:2,microbatches=2", *(pytest.param(plan, marks=pytest.mark.slow) for plan in WIDE)],
)
def test_a_model_is_what_one_device_finds_of_the_whole_batch(plan):
    """However the batch is cut and computed: it is one stream. The bill is exact, and passes count microbatches."""
    want, got = reference(MODEL), run(recipe_of(MODEL, plan))
    assert_equal(got.loss, want.loss, 2e-6)
    tolerance = 5e-6 if "pipe" in plan else 2e-6
    assert_equal(got.gradients, want.gradients, tolerance)
    count = got.parts.microbatches
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(got.extra), jax.tree.leaves(start(MODEL)[1]), strict=True
    ):
        if path[-1].key == "passes":
            np.testing.assert_allclose(new - old, count, atol=1e-5)
    extra, other = (without_passes(one.extra) for one in (got, want))
    assert_equal(extra, other, tolerance)
    counted, predicted = bill.counted_in(got.parts, got.text), cost_of(account.gradient_lines(got.parts)).sent
    assert not counted.unknown and counted.sent == pytest.approx(predicted)


def without_passes(extra):
    return jax.tree_util.tree_map_with_path(lambda path, leaf: () if path[-1].key == "passes" else leaf, extra)


# --- the four properties, of streams with a mean and a deviation of their own

STREAM, FORWARD, BACKWARD = 4096, 0.99, 0.99
SHARE = 1 - BACKWARD
some_streams = settings(max_examples=8, deadline=None)
seeds, means, deviations = st.integers(0, 2**32 - 1), st.floats(-30, 30), st.floats(0.1, 30)


@lru_cache
def alone(control="none"):
    """Training of a norm of three features by itself, and its parameters."""
    norm = online(3, forward=FORWARD, backward=BACKWARD, control=control)
    return runs(norm, 2, STREAM)[0], norm.init(jax.random.key(0))[0]


def state(mean, deviation):
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    forward = {"mean": mean * one, "variance": deviation**2 * one}
    return {"forward": forward, "backward": {"u": zero, "v": zero, "passes": np.float32(0)}}


def stream(seed, mean, deviation):
    """Uniform, so that no entry is further than sqrt(3) deviations from the mean."""
    uniform = np.random.default_rng(seed).uniform(-(3**0.5), 3**0.5, (STREAM, 3))
    return (mean + deviation * uniform).astype(np.float32)


@some_streams
@given(seeds, means, deviations)
def test_outputs_have_mean_0_and_variance_1_in_the_end(seed, mean, deviation):
    """From a state that knows nothing: |mean(y)| <= 5 sqrt(2 / n) and |mean(y^2) - 1| <= 5 sqrt(2 / n) + 3 (1 - f).

    n examples are left after those that a decay f forgets, 14 / (1 - f) from a mean of 300 deviations. The errors are
    those of sums of n independent terms (five deviations of them) and what estimates of 1 / (1 - f) examples add.
    """
    step, params = alone()
    y = step(params, state(0.0, 1.0), stream(seed, mean, deviation), np.zeros((STREAM, 3), np.float32))[0]
    y = np.asarray(y[int(14 / (1 - FORWARD)) :], np.float64)
    noise = 5 * (2 / len(y)) ** 0.5
    assert (abs(y.mean(0)) <= noise).all()
    assert (abs((y**2).mean(0) - 1) <= noise + 3 * (1 - FORWARD)).all()


@some_streams
@given(seeds, st.floats(-1, 1), st.floats(0.5, 2))
def test_outputs_change_no_faster_than_the_errors_of_the_estimates(seed, error, factor):
    """Of two states (mu, s) and (mu', s'): |y' - y| <= (|mu' - mu| + |y| |s' - s|) / s', and the states draw together.

    |mu'_t - mu_t| = f^t |mu'_0 - mu_0|. With layer scaling, the map of a to a / rms(a) takes distances at most to twice
    those over the rms: |z' - z| <= 2 |a' - a| / rms(a), of vectors.
    """
    x, nothing = stream(seed, 0.0, 5.0), np.zeros((STREAM, 3), np.float32)
    right, wrong = state(0.0, 1.0), state(error, factor)
    (step, params), (scaled, _) = alone(), alone("layer_scaling")
    (y, _, after), (other, _, others) = (step(params, one, x, nothing) for one in (right, wrong))
    y, other = np.asarray(y[0], np.float64), np.asarray(other[0], np.float64)
    assert (abs(other - y) <= (abs(error) + abs(y) * abs(factor - 1)) / factor + 1e-4).all()
    left = others["forward"]["mean"] - after["forward"]["mean"]
    assert (abs(left) <= FORWARD**STREAM * abs(error) + 1e-6).all()
    z, distant = (np.asarray(scaled(params, one, x, nothing)[0][0], np.float64) for one in (right, wrong))
    rms = (y**2).mean() ** 0.5
    assert np.linalg.norm(distant - z) <= 2 * np.linalg.norm(other - y) / rms + 1e-4
    assert (abs(z) <= 3**0.5 + 1e-5).all()  # a root mean square of 1, of three entries


WORST = {  # gradients of size 1 that push v, u and both as far as any can
    "v": np.sign,
    "u": np.ones_like,
    "both": lambda y: np.where(y > 0, 1.0, -0.5),
}


def deviations_met(x, deviation):
    """By a loop over the stream, from a mean of 0."""
    mean, variance, met = np.zeros(3), np.full(3, deviation**2), []
    for entry in x.astype(np.float64):
        met.append((variance + 1e-5) ** 0.5)
        variance = FORWARD * variance + FORWARD * (1 - FORWARD) * (entry - mean) ** 2
        mean = FORWARD * mean + (1 - FORWARD) * entry
    return np.stack(met)


def controlled(seed, deviation, push):
    """(y, its gradients, those of x, least deviation met, new state) after a stream whose gradients push one way."""
    step, params = alone()
    x, begun = stream(seed, 0.0, deviation), state(0.0, deviation)
    y = step(params, begun, x, np.zeros_like(x))[0]
    d = WORST[push](np.asarray(y)).astype(np.float32)
    _, (_, dx), after = step(params, begun, x, d)
    arrays = (np.asarray(a, np.float64) for a in (y, d, dx))
    return *arrays, deviations_met(x, deviation).min(0), after["backward"]


def most_of_v(y):
    """What |v| stays under, for gradients of size 1.

    Over a window of W = 1 / (k c) examples, k = 1 - b and c the least mean of y^2 in any, v shrinks by 1/e at least (as
    long as k y^2 < 1) and grows by W max|y| at most: |v| <= W max|y| / (1 - 1/e).
    """
    window, c = 0, 0.0
    while window < len(y) // 2 and (window == 0 or window * SHARE * c < 1):
        window += 50
        sums = np.cumsum(np.pad(y**2, ((1, 0), (0, 0))), 0)
        c = ((sums[window:] - sums[:-window]) / window).min()
    assert SHARE * (y**2).max() < 1
    return window * abs(y).max() / (1 - np.exp(-1))


@pytest.mark.parametrize("push", WORST)
@settings(max_examples=3, deadline=None)
@given(seeds, deviations)
def test_gradients_are_bounded(push, seed, deviation):
    """|dx| <= 2 (1 + k max|v| max|y|) / min(s), for |d| <= 1.

    d' = d - k v y, and k u is a mean of d'/s with weights that decay, so no larger than the largest of them.
    """
    y, _, dx, least, backward = controlled(seed, deviation, push)
    most = most_of_v(y)
    assert (abs(np.asarray(backward["v"])) <= most).all()
    assert (abs(dx) <= 2 * (1 + SHARE * most * abs(y).max()) / least).all()


@pytest.mark.parametrize("push", WORST)
@settings(max_examples=3, deadline=None)
@given(seeds, deviations)
def test_accumulated_errors_are_bounded(push, seed, deviation):
    """|sum of dx over time| = |u| <= max|d'| / (k min(s)) and |sum of d' y| = |v| <= most, however long the stream.

    Those are the parts of all gradients together along 1 and y, of which the derivative of a normalization has none.
    Without the controller they grow with the stream: here to more than five times as much.
    """
    y, d, dx, least, backward = controlled(seed, deviation, push)
    most, u, v = most_of_v(y), np.asarray(backward["u"]), np.asarray(backward["v"])
    assert_equal(dx.sum(0), u, tolerance=2e-3)
    assert (abs(np.cumsum(dx, 0)) <= (1 + SHARE * most * abs(y).max()) / (SHARE * least)).all()
    assert (abs(v) <= most).all()
    free = np.where(push == "u", abs((d / deviation).sum(0)) / abs(u), abs((d * y).sum(0)) / abs(v))
    assert (free > 5).all()
