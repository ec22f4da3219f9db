"""Every norm keeps one contract, however it is laid out; layer and batch norm are those of torch."""

from functools import lru_cache, partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laid_out import laid_out, pull
from parity import assert_equal

from jaxpar.core import family
from jaxpar.core.parts import chain, function
from jaxpar.layers.dense import dense

WIDTH, SHAPE, SIZES = 8, (8, 4, 8), {"batch": 8, "context": 4}
EMBED, MLP = "batch context embed", "batch context mlp"
each_norm = pytest.mark.parametrize("name", family.names("norms"))


def drawn(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


def alone(name, **mode):
    """A jitted norm on one device, its parameters and its state."""
    norm = family.pick("norms", name)(WIDTH)
    return jax.jit(laid_out(norm, "data=1", SIZES, (EMBED, EMBED), **mode)), *norm.init(jax.random.key(0))


@lru_cache
def on_both_sides(name, plan):
    """A norm of outer features and one of inner features: values, gradients, new state, values in evaluation."""
    norm, bend = family.pick("norms", name), function(lambda x, ctx: jnp.tanh(x))
    parts = {"outer": norm(WIDTH), "bend": bend, "up": dense(WIDTH, WIDTH, "embed mlp"), "again": bend}
    layer = chain(parts | {"inner": norm(WIDTH, "mlp")})
    train, still = (laid_out(layer, plan, SIZES, (EMBED, MLP), train=mode) for mode in (True, False))

    @jax.jit
    def run(params, extra, x, dy):
        pulled = pull(train, params, extra, x, dy)
        return pulled, still(params, pulled.extra, x)

    params, extra = layer.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.3 * drawn(leaf.size, leaf.shape), params)  # no gain of 1, no bias of 0
    return run(params, extra, 2 + drawn(1), drawn(2))


@pytest.mark.parametrize("plan", ["data=4", "tensor=one_d:4", "tensor=two_d:2x2", "tensor=three_d:2x2x2"])
@each_norm
def test_layout_changes_neither_values_nor_gradients_nor_state(name, plan):
    assert_equal(on_both_sides(name, plan), on_both_sides(name, "data=1"), tolerance=5e-6)


@each_norm
def test_evaluation_treats_each_example_alone_and_keeps_the_state(name):
    apply, params, extra = alone(name, train=False)
    x = 3 + 2 * drawn(1)
    y, after = apply(params, extra, x)
    beside_others, _ = apply(params, extra, x.at[1:].set(drawn(2)[1:]))
    assert_equal(beside_others[0], y[0], tolerance=0)
    assert_equal(after, extra, tolerance=0)


@each_norm
def test_a_norm_keeps_the_dtype_of_x_and_holds_float32(name):
    apply, params, extra = alone(name)
    x = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    y, after = jax.eval_shape(apply, params, extra, x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((params, after))} == {"float32"}


# the dims of x[batch, context, width] that a norm shifts to mean 0 and scales to variance 1 together
together = pytest.mark.parametrize("name, dims", [("layer", (2,)), ("batch", (0, 1))])


@together
def test_what_is_normalized_together_has_mean_0_and_variance_1(name, dims):
    apply, *held = alone(name)
    y, _ = apply(*held, 3 + 5 * drawn(1))
    np.testing.assert_allclose(y.mean(dims), 0, atol=1e-6)
    np.testing.assert_allclose(y.var(dims), 1, atol=1e-5)  # less than 1 by eps over the variance of x


@together
def test_shift_and_scale_of_what_is_normalized_together_do_not_matter(name, dims):
    apply, *held = alone(name)
    x, change = 5 * drawn(1), drawn(2).mean(dims, keepdims=True)
    y, _ = apply(*held, x)
    changed, _ = apply(*held, x * jnp.exp(change) + change)
    assert_equal(changed, y, tolerance=1e-5)


@pytest.mark.parametrize(
    "name, reference, rows",
    [("layer", "ln", "batch"), ("batch", "bn1d", "batch"), ("batch", "bn2d", "batch height width")],
)
def test_three_training_steps_and_an_evaluation_match_torch(name, reference, rows):
    def read(key):  # channels last
        array = golden.load("norms_torch")[f"{reference}/{key}"]
        return np.moveaxis(array, 1, -1) if array.ndim > 1 else array

    def gain_and_bias(key):
        return {"gain": read(f"{key}/weight"), "bias": read(f"{key}/bias")}

    def running(step):
        return {"mean": read(f"{step}/buf_running_mean"), "variance": read(f"{step}/buf_running_var")}

    norm, params = family.pick("norms", name)(WIDTH), gain_and_bias("param")
    _, extra = norm.init(jax.random.key(0))
    place = partial(laid_out, norm, "data=1", {"batch": len(read("t0/x"))}, (f"{rows} embed", f"{rows} embed"))
    train = jax.jit(partial(pull, place()))
    for step in ("t0", "t1", "t2"):
        got = train(params, extra, read(f"{step}/x"), read(f"{step}/gy"))
        extra = got.extra
        assert_equal(got.y, read(f"{step}/y"), tolerance=1e-6)
        assert_equal(got.gradients, (gain_and_bias(f"{step}/grad"), read(f"{step}/grad_x")), tolerance=2e-6)
        assert_equal(extra, {"forward": running(step)} if extra else {}, tolerance=1e-6)
    y, _ = jax.jit(place(train=False))(params, extra, read("t0/x"))
    assert_equal(y, read("eval_y"), tolerance=1e-6)
