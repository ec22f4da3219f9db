"""Norms against torch's, and those that torch lacks against formulas written down again in float64."""

from functools import partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laid_out import laid_out, pull
from parity import assert_equal

from jaxpar.core import spec
from jaxpar.layers.dense import dense
from jaxpar.layers.normalized import normalized
from jaxpar.norms import propagation, weight

TORCH = [
    ("batch", "bn1d"),
    ("batch", "bn2d"),
    ("batch:cumulative=true", "bn2d_cma"),
    ("group:groups=1", "gn1"),
    ("group:groups=4", "gn4"),
    ("instance", "in2d"),
    ("instance:running=true", "in2d_track"),
    ("layer", "ln"),
    ("layer:over=example", "ln_chw"),
    ("rms", "rms"),
]


def read(key):
    """An array of torch's, channels last; gains and biases of each entry as those of channels."""
    array = golden.load("norms_torch")[key]
    return np.moveaxis(array, {2: 1, 3: 0}.get(array.ndim, 1), -1) if array.ndim > 1 else array


def made(norm, x, **mode):
    """A norm of the features of x on one device, and its state."""
    layer, dims = spec.member("norms", norm, "")(x.shape[-1]), {2: "batch embed", 4: "batch height width embed"}[x.ndim]
    apply = laid_out(layer, "data=1", {"batch": len(x)}, (dims, dims), **mode)
    return apply, layer.init(jax.random.key(0))[1]


@pytest.mark.parametrize(("norm", "reference"), TORCH)
def test_three_training_steps_and_an_evaluation_match_torch(norm, reference):
    names = [name for name, key in (("gain", "weight"), ("bias", "bias")) if f"{reference}/param/{key}" in read_all()]
    params, own = ({name: read(f"{reference}/param/{key}") for name, key in pairs(names)} for _ in range(2))
    each = params["gain"].ndim > 1  # torch's gain and bias of each entry stand behind our norm, whose own are 1 and 0
    if each:
        own = {name: np.full(8, float(name == "gain"), np.float32) for name in names}
    apply, extra = made(norm, read(f"{reference}/t0/x"))
    train = jax.jit(partial(pull, apply))
    for step in (f"{reference}/t{n}" for n in range(3)):
        x, dy = read(f"{step}/x"), read(f"{step}/gy")
        got = train(own, extra, x, dy * params["gain"] if each else dy)
        extra = got.extra
        assert_equal(behind(got.y, params) if each else got.y, read(f"{step}/y"), tolerance=1e-6)
        assert_equal(got.gradients[1], read(f"{step}/grad_x"), tolerance=2e-6)
        for name, key in pairs(names):
            found = {"gain": dy * got.y, "bias": dy}[name].sum(0) if each else got.gradients[0][name]
            assert_equal(found, read(f"{step}/grad/{key}"), tolerance=2e-6)
        for name, key in (("mean", "mean"), ("variance", "var")) if extra else ():
            assert_equal(extra["forward"][name], read(f"{step}/buf_running_{key}"), tolerance=1e-6)
    y, _ = jax.jit(made(norm, read(f"{reference}/t0/x"), train=False)[0])(own, extra, read(f"{reference}/t0/x"))
    assert_equal(behind(y, params) if each else y, read(f"{reference}/eval_y"), tolerance=1e-6)


def read_all():
    return golden.load("norms_torch")


def pairs(names):
    return [(name, {"gain": "weight", "bias": "bias"}[name]) for name in names]


def behind(y, params):
    return y * params["gain"] + params["bias"]


def test_weight_norm_matches_torch():
    layer = normalized(dense(5, 4, "embed mlp", bias=False), "weight", 4, "mlp")
    apply = laid_out(layer, "data=1", {"batch": 3}, ("batch embed", "batch mlp"))
    at = "weight_norm/{}/parametrizations.weight.original"

    def ours(kind):
        arrays = golden.load("norms_torch")
        g, v = (arrays[at.format(kind) + n] for n in "01")
        return {"product": {"weight": v.T}, "norm": {"gain": g[:, 0], "bias": arrays[f"weight_norm/{kind}/bias"]}}

    arrays = golden.load("norms_torch")
    got = jax.jit(partial(pull, apply))(
        ours("param"), {"product": {}, "norm": {}}, arrays["weight_norm/x"], arrays["weight_norm/gy"]
    )
    assert_equal(got.y, arrays["weight_norm/y"], tolerance=1e-6)
    assert_equal(got.gradients, (ours("grad"), arrays["weight_norm/grad_x"]), tolerance=1e-6)


# formulas in float64, each in one pass of plain numpy, differentiated by jax; eps as ours
def shifted(x, over, eps=1e-5):
    return (x - x.mean(over, keepdims=True)) / (
        ((x - x.mean(over, keepdims=True)) ** 2).mean(over, keepdims=True) + eps
    ) ** 0.5


def in_groups(x, groups):
    cut = x.reshape(*x.shape[:-1], groups, -1)
    return shifted(cut, (1, 2, 4)).reshape(x.shape)


def in_parts(x, parts):
    return shifted(x.reshape(parts, -1, *x.shape[1:]), (1, 2, 3)).reshape(x.shape)


FORMULAS = {
    "none": lambda x: x,
    "layer": lambda x: shifted(x, 3),
    "layer:over=example": lambda x: shifted(x, (1, 2, 3)),
    "rms": lambda x: x / ((x * x).mean(3, keepdims=True) + 2.0**-23) ** 0.5,
    "group:groups=4": lambda x: in_groups(x, 4),
    "group": lambda x: in_groups(x, 2),
    "instance": lambda x: shifted(x, (1, 2)),
    "batch": lambda x: shifted(x, (0, 1, 2)),
    "batch:replicas=3": lambda x: in_parts(x, 3),
    "batch_renorm": lambda x: shifted(x, (0, 1, 2)),
    "streaming:long=0+back=0+current=1": lambda x: shifted(x, (0, 1, 2)),
}


QUICK = ("group:groups=4",)
SOME = pytest.mark.slow


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("norm", [norm if norm in QUICK else pytest.param(norm, marks=SOME) for norm in FORMULAS])
def test_in_float64_a_norm_is_its_formula(norm):
    x, dy = 2 + 3 * drawn(1, 6, 4, 3, 8), drawn(2, 6, 4, 3, 8)
    with jax.enable_x64(True):
        apply, extra = made(norm, x)
        layer = spec.member("norms", norm, "")(8)
        params = {name: 1 + drawn(n, 8) for n, name in enumerate(sorted(layer.dims[0]))}
        got = jax.jit(partial(pull, apply))(params, extra, x, dy)

        def formula(params, x):
            return FORMULAS[norm](x) * params.get("gain", 1) + params.get("bias", 0)

        y, back = jax.vjp(formula, params, x)
        assert_equal((got.y, got.gradients), (y, back(dy)), tolerance=1e-11)


def test_batch_renorm_is_its_algorithm():
    """Six microbatches, of which the weights change before every second; bounds that bind and bounds that do not."""
    rate, begin, rmax, dmax = 0.3, 1, 1.5, 0.4
    norm = f"batch_renorm:begin={begin}+rmax={rmax}+dmax={dmax}+keep={1 - rate}"
    xs, dys = drawn(1, 6, 7, 5) * np.linspace(0.5, 3, 5) + np.arange(6)[:, None, None], drawn(2, 6, 7, 5)
    gain, bias, mean, deviation = 1 + drawn(3, 5), drawn(4, 5), np.zeros(5), np.ones(5)
    with jax.enable_x64(True):
        applies = [jax.jit(partial(pull, made(norm, xs[0], first_example=first)[0])) for first in (0, 7)]
        extra, bound = made(norm, xs[0])[1], [False, False]
        for n, (x, dy) in enumerate(zip(xs, dys, strict=True)):
            got = applies[n % 2]({"gain": gain, "bias": bias}, extra, x, dy)
            extra, done = got.extra, n // 2
            top = 1 + (rmax - 1) * np.clip((done - begin) / (7 * begin), 0, 1)
            most = dmax * np.clip((done - begin) / (4 * begin), 0, 1)
            m, s = x.mean(0), np.sqrt(x.var(0) + 1e-5)
            r, d = np.clip(s / deviation, 1 / top, top), np.clip((m - mean) / deviation, -most, most)
            bound = [found or bool(new) for found, new in zip(bound, ((r != 1).any(), (d != 0).any()), strict=True)]

            def formula(gain, bias, x, r=r, d=d):
                return (shifted(x, 0) * r + d) * gain + bias

            y, back = jax.vjp(formula, gain, bias, x)
            by_gain, by_bias, by_x = back(dy)
            assert_equal((got.y, got.gradients), (y, ({"gain": by_gain, "bias": by_bias}, by_x)), tolerance=1e-11)
            mean, deviation = mean + rate * (m - mean), deviation + rate * (s - deviation)
            want = {"mean": mean, "deviation": deviation, "updates": done + 1}
            assert_equal(extra, {"forward": want}, tolerance=1e-11)
        assert all(bound)
        y, _ = made(norm, x, train=False)[0]({"gain": gain, "bias": bias}, extra, x)
        assert_equal(y, (x - mean) / deviation * gain + bias, tolerance=1e-11)


class Stream:
    """A streamed number, with all that was ever pushed; nothing is updated in place."""

    def __init__(self, keep):
        self.keep, self.terms = keep, [[]]  # for each state of the weights, what was pushed

    def long(self):
        ended = [np.mean(term, axis=0) for term in self.terms[:-1]]
        shares = [self.keep ** (len(ended) - 1)] + [
            (1 - self.keep) * self.keep ** (len(ended) - 1 - n) for n in range(1, len(ended))
        ]
        return sum(share * term for share, term in zip(shares, ended, strict=True)) if ended else self.short()

    def short(self):
        return np.mean(self.terms[-1], axis=0)

    def mix(self, long, short, now):
        return long * self.long() + short * self.short() + now * self.terms[-1][-1]


@pytest.mark.parametrize(
    "weights", [(0.6, 0.5, 0.1), *(pytest.param(w, marks=SOME) for w in ((0.7, 0.7, 0.3), (0.5, 0.2, 0.5)))]
)
def test_streaming_is_its_algorithm(weights):
    """Seven microbatches, of which the weights change before the first, third, fourth and sixth."""
    long, back_long, current = weights
    norm = f"streaming:long={long}+back={back_long}+current={current}+keep=0.6"
    xs, dys = 1 + drawn(1, 7, 4, 3) * np.linspace(0.5, 3, 3) + np.arange(7)[:, None, None], drawn(2, 7, 4, 3)
    params = {"gain": 1 + drawn(3, 3), "bias": drawn(4, 3)}
    m_stream, v_stream, by_m, by_v = (Stream(0.6) for _ in range(4))
    with jax.enable_x64(True):
        applies = [jax.jit(partial(pull, made(norm, xs[0], first_example=first)[0])) for first in (0, 4)]
        extra = made(norm, xs[0])[1]
        for n, (x, dy) in enumerate(zip(xs, dys, strict=True)):
            fresh = n in (0, 2, 3, 5)
            if fresh and n:
                for stream in (m_stream, v_stream, by_m, by_v):
                    stream.terms.append([])
            got = applies[0 if fresh else 1](params, extra, x, dy)
            extra = got.extra
            m_stream.terms[-1].append(x.mean(0))
            m = m_stream.mix(long, 1 - long, 0)
            v_stream.terms[-1].append(((x - m) ** 2).mean(0))
            v = v_stream.mix(long, 1 - long, 0)

            def formula(params, x, m, v):
                return (x - m) / (v + 1e-5) ** 0.5 * params["gain"] + params["bias"]

            y, back = jax.vjp(formula, params, x, m, v)
            by_params, by_x, g_m, g_v = back(dy)
            by_v.terms[-1].append(np.asarray(g_v))
            g_v = by_v.mix(back_long, 1 - back_long - current, current)
            _, back = jax.vjp(lambda x, m: ((x - m) ** 2).mean(0), x, m)
            more, to_m = back(g_v)
            by_m.terms[-1].append(np.asarray(g_m + to_m))
            g_m = by_m.mix(back_long, 1 - back_long - current, current)
            by_x = by_x + more + g_m / len(x)
            assert_equal((got.y, got.gradients), (y, (by_params, by_x)), tolerance=1e-11)
        y, _ = made(norm, x, train=False)[0](params, extra, x)
        assert_equal(y, formula(params, x, m, v), tolerance=1e-11)


def test_streaming_takes_single_examples():
    x = drawn(1, 1, 3).astype(np.float32)
    apply, extra = made("streaming", x)
    step, params = jax.jit(partial(pull, apply)), {"gain": jnp.ones(3), "bias": jnp.zeros(3)}
    again = step(params, step(params, extra, x, x).extra, x + 1, x)
    assert np.isfinite(again.y).all() and np.abs(again.y).max() < 10 and np.abs(again.y).min() > 0.1


def test_propagation_keeps_what_is_normalized_normalized():
    """With the paper's constants, in float64, and where those of ReLU are asked of any function."""
    x, w, dy = drawn(1, 20_000, 9), drawn(2, 9, 6), drawn(3, 20_000, 6)
    with jax.enable_x64(True):
        layer = spec.member("norms", "propagation", "")(6)
        gain, bias = 1 + 0.1 * drawn(4, 6), 0.1 * drawn(5, 6)

        def ours(gain, bias, w, x):
            y, _ = layer.apply({"gain": gain, "bias": bias}, {}, (x @ w, (w**2).sum(0)), None)
            return propagation.AFTER(jax.nn.relu)(y)

        def paper(gain, bias, w, x):
            seen = gain * (x @ w) / jnp.linalg.norm(w, axis=0) + bias
            return (jax.nn.relu(seen) - (1 / (2 * np.pi)) ** 0.5) / (0.5 * (1 - 1 / np.pi)) ** 0.5

        (y, back), (want, other) = (jax.vjp(one, gain, bias, w, x) for one in (ours, paper))
        assert_equal((y, back(dy)), (want, other(dy)), tolerance=1e-11)
        for function in (jax.nn.relu, jnp.tanh, jax.nn.gelu):
            y = propagation.AFTER(function)((x @ w) / np.linalg.norm(w, axis=0))
            assert abs(float(y.mean())) < 0.02 and abs(float(y.var()) - 1) < 0.03, function


def test_weight_norm_starts_from_data():
    layer = normalized(dense(5, 4, "- embed", bias=False), "weight", 4, "embed")
    params, extra = layer.init(jax.random.key(0))
    x = (3 + drawn(1, 64, 5)).astype(np.float32)

    def start(ctx):
        w = params["product"]["weight"]
        return weight.started(params["norm"], (x @ w, (w**2).sum(0)), ctx)

    class One:
        mean = staticmethod(lambda a, dims, over, **_: a.mean(0, keepdims=True))

    apply = laid_out(layer, "data=1", {"batch": 64}, ("batch -", "batch embed"))
    y, _ = apply(params | {"norm": start(One)}, extra, x)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(0), 1, atol=1e-5)
