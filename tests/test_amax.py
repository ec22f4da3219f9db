"""Scales of 8-bit numbers: as flax's, step for step; and the policies that use them, on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import fp8_ops
from golden import load
from laid_out import laid_out, pull

from jaxpar.core import amax, blocks, family
from jaxpar.core.policy import Site, bits
from jaxpar.layers.dense import dense

GOLDEN = load("fp8_delayed_scaling_flax_e4m3fn")


def alone(role, history=None):
    """A site on one device."""
    return Site("embed mlp", role, (1, 1), lambda a, dims=None: a, None, history)


def test_delayed_scaling_goes_as_flaxs():
    policy = family.pick("policies", "fp8_delayed")(length=GOLDEN["hist"].shape[1])
    history = policy.history()
    for step, x in enumerate(GOLDEN["x"]):
        made, seen = policy.enter(jnp.asarray(x)[None], alone("activation", history))
        history = policy.remember(history, seen)
        assert made.array.dtype == jnp.uint8 and made.format == jnp.float8_e4m3fn
        np.testing.assert_array_equal(np.float32(history["scale"]), GOLDEN["scale"][step, 0], err_msg=f"step {step}")
        np.testing.assert_array_equal(history["amax"], GOLDEN["hist"][step])
        np.testing.assert_array_equal((made.values.astype(jnp.float32) * made.scale)[0], GOLDEN["qdq"][step])


def test_the_formulas_are_flaxs():
    old, amaxes = jnp.float32(0.25), jnp.float32([3.0, 0.0, jnp.inf, 1e-30, 1e30, jnp.nan])
    for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2):
        for margin in (0, 3):
            want = fp8_ops.compute_scale(amaxes, old, fp8_ops.get_fp8_max(dtype, jnp.float32), margin)
            np.testing.assert_array_equal(amax.scale_of(amaxes, dtype, old, margin), want)
        x = jax.random.normal(jax.random.key(0), (64,)) * 10.0 ** jnp.arange(-32, 32)
        for scale in (0.1, 7.0):
            want = fp8_ops.quantize(x, dtype, jnp.float32(scale), jnp.float32)
            np.testing.assert_array_equal(amax.quantized(x, scale, dtype), want)
    history = {"scale": old, "amax": jnp.float32([2.0, 5.0, 1.0])}
    new = amax.remembered(history, {"scale": old, "amax": jnp.float32(9.0)})
    np.testing.assert_array_equal(new["amax"], fp8_ops.compute_amax_history(jnp.float32([-9.0]), history["amax"]))


def test_an_array_too_small_for_a_scale_is_zero_and_no_nan():
    made = amax.live(jnp.float32([[1e-37, 0.0]]), alone("gradient"))
    np.testing.assert_array_equal(made.values.astype(jnp.float32) * made.scale, [[0.0, 0.0]])


def test_the_last_use_alone_may_decide_and_a_margin_is_left():
    history = {"scale": jnp.float32(1.0), "amax": jnp.float32([2.0, 0.0, 8.0])}
    assert amax.foreseen(history, jnp.float8_e4m3fn) == jnp.float32(8 / 448)
    assert amax.foreseen(history, jnp.float8_e4m3fn, recent=True) == jnp.float32(2 / 448)
    assert amax.foreseen(history, jnp.float8_e4m3fn, margin=2) == jnp.float32(4 * 8 / 448)
    assert amax.start()["amax"].shape == (1024,)


def operands(policy, shapes=((96, 256), (256, 192), (96, 192)), scale=1.0):
    """x, w and dy, as arrays and as the policy's operands."""
    keys = jax.random.split(jax.random.key(1), 3)
    roles = ("activation", "weight", "gradient")
    arrays = [
        policy.cast(scale * jax.random.normal(key, shape) * jnp.exp(jax.random.normal(key, shape[-1:])), role)
        for key, shape, role in zip(keys, shapes, roles, strict=True)
    ]
    return arrays, [policy.enter(a, alone(role))[0] for a, role in zip(arrays, roles, strict=True)]


def multiply(a, b, dtype, precision=None):
    return jnp.matmul(a, b, preferred_element_type=dtype, precision=precision)


def whole(operand):
    return np.float64(blocks.whole(operand, jnp.float32))


@pytest.mark.parametrize("name", ["fp8_current", "fp8_delayed", "fp8_block"])
def test_products_are_those_of_the_rounded_operands(name):
    policy = family.pick("policies", name)()

    @jax.jit
    def found():
        arrays, (a, b, g) = operands(policy)
        return arrays, (a, b, g), [policy.dot(multiply, *pair) for pair in ((a, b), (g, b.T), (a.T, g))]

    (x, w, _), (a, b, g), products = found()
    assert {one.array.dtype.itemsize for one in (a, b, g)} == {1}
    assert g.format == (jnp.float8_e4m3fn if name == "fp8_block" else jnp.float8_e5m2)
    pairs = ((a, b, np.float64(x) @ np.float64(w)), (g, b.T, None), (a.T, g, None))
    for got, (left, right, near) in zip(map(np.float64, products), pairs, strict=True):
        want = whole(left) @ whole(right)
        again = 4e-4 if name == "fp8_block" and left is not a and right is g else 0  # laid out anew
        np.testing.assert_allclose(got, want, rtol=2**-8, atol=(1e-5 + again) * np.abs(want).max())
        if near is not None:
            assert np.abs(got - near).max() < 0.05 * np.abs(near).max()


@pytest.mark.parametrize("name", ["fp8_current", "fp8_delayed", "fp8_block"])
def test_an_infinite_entry_is_seen_in_the_product(name):
    policy = family.pick("policies", name)()
    x = jnp.ones((4, 8), jnp.bfloat16).at[1, 2].set(jnp.inf)
    a, _ = policy.enter(x, alone("activation", policy.history and policy.history()))
    b, _ = policy.enter(jnp.ones((8, 8), jnp.bfloat16), alone("weight"))
    assert not np.isfinite(np.float32(policy.dot(multiply, a, b))).all()


def test_blocks_have_scales_of_their_own():
    policy = family.pick("policies", "fp8_block")()
    _, (a, b, _) = operands(policy)
    assert a.scale.shape == (96, 2) and b.scale.shape == (2, 2) and b.array.shape == (256, 192)
    x = jnp.ones((2, 256)).at[0, 3].set(1e6)
    one = policy.enter(policy.cast(x, "activation"), alone("activation"))[0]
    error = np.abs(whole(one) - np.float64(x)).max(0)
    assert error[4:128].max() == 1 and error[128:].max() == 0, "an outlier costs its own block alone"
    assert (whole(one)[1] == 1).all()
    np.testing.assert_array_equal(jnp.frexp(one.scale)[0], 0.5)


def test_the_head_and_convolutions_are_products_of_bfloat16():
    policy = family.pick("policies", "fp8_block")()
    a, b = (policy.enter(jnp.ones((8, 8), jnp.bfloat16), alone(role)._replace(name="embed vocab"))[0] for role in "aw")
    seen = []
    for left, right in ((a, b), (bits(jnp.ones((1, 4, 4, 8), jnp.float8_e4m3fn), jnp.ones((1, 4, 4, 1))),) * 2):
        policy.dot(lambda a, b, dtype, precision=None: seen.append((a.dtype, b.dtype)) or jnp.zeros(1), left, right)
    assert {*map(str, sum(seen, ()))} == {"bfloat16"}


@pytest.mark.parametrize("plan", ["data=4", "tensor=two_d:2x2", "tensor=three_d:2x2x2"])
def test_what_is_too_small_beside_what_other_devices_hold_is_zero(plan):
    """A scale of its own would keep it: half of the rows of x, columns of w and rows of dy are 2^-40 of the rest."""
    keys, half = jax.random.split(jax.random.key(0), 3), jnp.where(jnp.arange(16) < 8, 1.0, 2.0**-40)
    x, w, dy = (jax.random.normal(key, (16, 16)) for key in keys)
    x, w, dy = half[:, None] * x, half * w, half[::-1, None] * dy
    layer, dims = dense(16, 16, "embed mlp", bias=False), ("batch embed", "batch mlp")
    policy = family.pick("policies", "fp8_current")()

    def found(plan):
        apply = laid_out(layer, plan, {"batch": 16}, dims, policy=policy)
        y, (gradients, by_x), _ = jax.jit(lambda: pull(apply, {"weight": w}, {}, x, dy.astype(jnp.bfloat16)))()
        return [np.float32(a) for a in (y, by_x, gradients["weight"])]

    y, by_x, by_w = want = found("data=1")
    assert y[:8, :8].all() and not y[8:].any() and not y[:, 8:].any(), "x and w"
    assert by_x[8:].all() and not by_x[:8].any() and not by_w.any(), "dy"
    for got, alone in zip(found(plan), want, strict=True):
        np.testing.assert_allclose(got, alone, rtol=0, atol=0.02 * np.abs(alone).max())
        assert not got[alone == 0].any(), plan
