"""What a layer may ask of entries on other devices is, on every mesh, what one device finds."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laid_out import laid_out, pull
from parity import assert_equal

from jaxpar.core.types import Layer
from jaxpar.plan.context import Settings, context
from jaxpar.plan.layout import SINGLE
from jaxpar.plan.wire import device_wire
from jaxpar.policies.fp32 import fp32

BATCH, SIDE, WIDTH, PARTS = 12, 3, 24, 3
SIZES = {"batch": BATCH}
PLANS = ["data=4", "tensor=one_d:4", "tensor=two_d:2x4", "tensor=two_d:4x2", "data=2,tensor=three_d:1x2x2"]
WIDE = [
    *PLANS,
    "tensor=three_d:2x2x2",
    "tensor=two_half_d:2x2x2",
    "tensor=sequence:4",
    "tensor=fsdp:4",
    "data=2,tensor=one_d:2",
]
DIMS = "batch height width"
each_plan = pytest.mark.parametrize(
    "plan", [plan if plan in PLANS else pytest.param(plan, marks=pytest.mark.slow) for plan in WIDE]
)


def drawn(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def asked(word):
    """A layer that asks for everything, of features called `word`; its y is twice as wide."""
    other = {"embed": "channels", "channels": "embed"}[word]
    kernels = {"stem": f"- {word}", "across": f"{word} {word}", "over": f"{other} {word}"}

    def init(key):
        state = {"one": jnp.ones(WIDTH), "each": drawn(3, PARTS, WIDTH), "two": drawn(4, 2, WIDTH)}
        return {name: drawn(5 + n, 3, 3, WIDTH, WIDTH) for n, name in enumerate(kernels)}, state

    def apply(params, extra, x, ctx):
        parts = {"batch": 3}, {word: 3}, {word: 8, "batch": 6}
        means = [ctx.mean(x, word, f"{DIMS} {word}", one) for one in parts]
        means += [ctx.mean(x, word, "batch", {"batch": n}) for n in (2, 4, 12)]
        rows, new = x[:, 0, 0], {}
        for name, decay in (("one", 0.9), ("each", jnp.cos(rows)), ("two", 0.5)):
            before, new[name] = ctx.recurrence(decay, rows**2, extra[name], f"batch {word}")
            means.append(before[:, None, None])
        sums = sum(ctx.columns(params[name] ** 2, dims) for name, dims in kernels.items())
        return ctx.concat([sum(x * mean for mean in means), x * sums], word), new

    dims = {"one": word, "each": f"replicas {word}", "two": f"replicas {word}"}
    return Layer(init, apply, dims=({name: f"- - {words}" for name, words in kernels.items()}, dims))


@lru_cache
def ran(word, plan):
    layer, x, dy = asked(word), drawn(1, BATCH, SIDE, SIDE, WIDTH), drawn(2, BATCH, SIDE, SIDE, 2 * WIDTH)
    apply = laid_out(layer, plan, SIZES, (f"{DIMS} {word}",) * 2)
    return jax.jit(lambda *args: pull(apply, *args))(*layer.init(jax.random.key(0)), x, dy)


@each_plan
@pytest.mark.parametrize("word", ["embed", "channels"])
def test_what_a_layer_is_told_does_not_depend_on_the_mesh(word, plan):
    assert_equal(ran(word, plan), ran(word, "data=1"), tolerance=5e-6)


def test_on_one_device_it_is_what_a_loop_finds():
    ctx = context(Settings(SINGLE, fp32(), device_wire()))
    x, start, kernel = (
        np.asarray(a) for a in (drawn(1, BATCH, 3, 3, WIDTH), drawn(2, PARTS, WIDTH), drawn(3, 3, 2, 4))
    )
    means = x.reshape(6, 2, 9, 8, 3).mean((1, 2, 4))
    got = ctx.mean(x, "embed", f"{DIMS} embed", {"embed": 8, "batch": 6})
    assert_equal(got[:, 0, 0], np.repeat(np.repeat(means, 2, 0), 3, 1), tolerance=1e-6)
    before, last = ctx.recurrence(np.cos(x[:, 0, 0]), x[:, 1, 1], start, "batch embed")
    for part, state in enumerate(start):
        for n in range(4 * part, 4 * part + 4):
            assert_equal(before[n], state, tolerance=1e-5)
            state = np.cos(x[n, 0, 0]) * state + x[n, 1, 1]
        assert_equal(last[part], state, tolerance=1e-5)
    assert_equal(ctx.columns(kernel, "embed embed"), kernel.sum((0, 1)), tolerance=1e-6)
    assert_equal(ctx.concat([x, 2 * x], "embed"), np.concatenate([x, 2 * x], -1), tolerance=0)
    for parts in ({"batch": 5}, {"embed": 7}):
        with pytest.raises(ValueError, match="equal parts"):
            ctx.mean(x, "embed", f"{DIMS} embed", parts)


CONVS = [("SAME", 1, 2), (2, 3, 2), ("VALID", 1, 2), (1, 2, 3)]


@pytest.mark.parametrize("padding, strides, space", CONVS)
@pytest.mark.parametrize("matrices", [False, True])
def test_a_convolution_is_that_of_lax_whatever_its_padding_and_the_dims_of_space(padding, strides, space, matrices):
    x, w = drawn(1, 2, *[7] * space, 3), drawn(2, *[3] * space, 3, 4)
    ctx = context(Settings(SINGLE, fp32()._replace(matrices=matrices), device_wire()))
    sides = padding if isinstance(padding, str) else [(padding, padding)] * space
    numbers = ("NHWC", "HWIO", "NHWC") if space == 2 else ("NDHWC", "DHWIO", "NDHWC")

    def ours(x, w):
        return ctx.conv(x, w, "embed channels", strides, padding)

    def plain(x, w):
        return jax.lax.conv_general_dilated(x, w, (strides,) * space, sides, dimension_numbers=numbers)

    got, want = (jax.value_and_grad(lambda *a, f=f: (f(*a) ** 2).sum(), argnums=(0, 1))(x, w) for f in (ours, plain))
    assert_equal(got, want, tolerance=2e-6)
