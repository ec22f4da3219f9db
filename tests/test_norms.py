"""Every norm keeps one contract, however it is laid out."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laid_out import laid_out, pull
from parity import assert_equal

from jaxpar.core import family, spec
from jaxpar.core.parts import chain, function
from jaxpar.core.refuse import Refused
from jaxpar.layers.conv import conv
from jaxpar.layers.dense import dense
from jaxpar.layers.normalized import free, normalized
from jaxpar.step.pieces import halves

NAMES = family.names("norms")
each_norm = pytest.mark.parametrize("norm", NAMES)
OPTIONS = [
    "batch:replicas=2",
    "batch:cumulative=true",
    "batch_renorm:begin=0",
    "group:groups=3",
    "instance:running=true",
    "layer:over=example",
    "streaming:back=0.5+current=0.2",
    "weight:mean_only=true",
]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Entries of x: the rows that a plan may split, those of space, and the features."""

    batch: int = 8
    context: int = 0
    space: tuple[int, ...] = ()
    width: int = 8

    @property
    def sizes(self) -> dict[str, int]:
        return {"batch": self.batch} | ({"context": self.context} if self.context else {})

    @property
    def array(self) -> tuple[int, ...]:
        return (*self.sizes.values(), *self.space, self.width)

    def dims(self, word: str) -> str:
        return " ".join([*self.sizes, *["depth", "height", "width"][-len(self.space) or 3 :], word])


TEXT = Shape(context=4)
IMAGES, FLAT, VOLUMES = Shape(space=(3, 2)), Shape(), Shape(space=(2, 3, 2), batch=4)
ODD = Shape(batch=6, space=(3, 2), width=12)  # groups of 4 channels, or parts of 3 examples, lie over devices


def drawn(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def reads(norm) -> bool:
    return family.constant(spec.member("norms", norm, ""), "READS", None) is not None


def product(into, out, dims, rank):
    return dense(into, out, dims, bias=False) if rank < 4 else conv(into, out, dims, window=1, space=rank - 2)


def alone(norm, width=8, word="embed", rank=3):
    """The norm, and where it acts on weights the product before it as well."""
    if reads(norm):
        return normalized(product(width, width, f"embed {word}", rank), norm, width, word)
    return spec.member("norms", norm, "")(width, word)


def bare(norm, width=8):
    """The norm; where it acts on weights, of which it gets the squares, on those of some product of all weights 1."""
    layer = spec.member("norms", norm, "")(width)
    if not reads(norm):
        return layer
    return layer._replace(apply=lambda p, e, x, ctx: layer.apply(p, e, (x, jnp.full(width, float(width))), ctx))


def placed(norm, shape=TEXT, plan="data=1", make=None, **mode):
    """A norm of outer features as a function, its parameters and its state."""
    layer = make(norm) if make else alone(norm, shape.width, "embed", len(shape.array))
    dims = (shape.dims("embed"),) * 2
    return jax.jit(laid_out(layer, plan, shape.sizes, dims, **mode)), *layer.init(jax.random.key(0))


@lru_cache
def on_both_sides(norm, plan, shape):
    """A norm of outer features and one of inner ones: values, gradients, both halves of the state, and evaluation."""
    bend, rank = function(lambda x, ctx: jnp.tanh(x)), len(shape.array)
    up = {} if reads(norm) else {"up": product(shape.width, shape.width, "embed mlp", rank)}
    parts = {"outer": alone(norm, shape.width, "embed", rank), "bend": bend, **up, "again": bend}
    layer = chain(parts | {"inner": alone(norm, shape.width, "mlp", rank)})
    dims = shape.dims("embed"), shape.dims("mlp")
    steps = [laid_out(layer, plan, shape.sizes, dims, first_example=first) for first in (0, shape.batch)]
    still = laid_out(layer, plan, shape.sizes, dims, train=False)

    @jax.jit
    def run(params, extra, x, dy):
        found = []
        # two microbatches and one after the weights have changed, where that may matter
        for n, step in enumerate([*steps, steps[0]] if jax.tree.leaves(halves(extra)[1]) else steps[:1]):
            found.append(pull(step, params, extra, x + n / 2, dy))
            extra = found[-1].extra
        return found, still(params, extra, x)

    params, extra = layer.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.3 * drawn(leaf.size, leaf.shape), params)  # no gain of 1, no bias of 0
    return run(params, extra, 2 + drawn(1, shape.array), drawn(2, shape.array))


def assert_layout_changes_nothing(norm, plan, shape, tolerance=5e-6):
    assert_equal(on_both_sides(norm, plan, shape), on_both_sides(norm, "data=1", shape), tolerance)


@pytest.mark.parametrize("plan", ["data=4", "tensor=one_d:4", "tensor=two_d:2x2", "tensor=three_d:2x2x2"])
@each_norm
def test_layout_changes_neither_values_nor_gradients_nor_state(norm, plan):
    assert_layout_changes_nothing(norm, plan, TEXT)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["data=4", "tensor=one_d:4", "tensor=two_d:2x2", "tensor=three_d:2x2x2"])
@pytest.mark.parametrize("shape", [IMAGES, FLAT, VOLUMES], ids=["images", "flat", "volumes"])
@pytest.mark.parametrize("norm", [*NAMES, *OPTIONS])
def test_layout_changes_no_other_shape(norm, shape, plan):
    if "instance" in norm and shape is FLAT:
        pytest.skip("an example without places has no such statistics")
    if norm == "group:groups=3":
        shape = dataclasses.replace(shape, width=12)
    assert_layout_changes_nothing(norm, plan, shape, tolerance=1e-5)


ODD_CASES = [
    ("group:groups=3", "tensor=one_d:4"),
    ("group:groups=6", "data=2,tensor=one_d:4"),
    ("group:groups=3", "tensor=two_d:2x4"),
    ("batch:replicas=3", "data=2"),
    ("batch:replicas=2", "tensor=two_d:3x2"),
    ("batch_renorm", "data=3,tensor=one_d:2"),
]


@pytest.mark.parametrize(
    ("norm", "plan"), [ODD_CASES[0], *(pytest.param(*c, marks=pytest.mark.slow) for c in ODD_CASES[1:])]
)
def test_what_is_normalized_together_may_lie_over_devices(norm, plan):
    assert_layout_changes_nothing(norm, plan, ODD)


@each_norm
def test_evaluation_treats_each_example_alone_and_keeps_the_state(norm):
    apply, params, extra = placed(norm, train=False)
    extra, x = jax.tree.map(lambda leaf: leaf + 0.5, extra), 3 + 2 * drawn(1, TEXT.array)  # both halves of it
    y, after = apply(params, extra, x)
    beside_others, _ = apply(params, extra, x.at[1:].set(drawn(2, TEXT.array)[1:]))
    assert_equal(beside_others[0], y[0], tolerance=0)
    assert_equal(after, extra, tolerance=0)


@each_norm
def test_a_norm_keeps_the_dtype_of_x_and_holds_float32(norm):
    apply, params, extra = placed(norm, make=bare)
    x = jax.ShapeDtypeStruct(TEXT.array, jnp.bfloat16)
    y, after = jax.eval_shape(apply, params, extra, x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((params, after))} <= {"float32"}


@each_norm
def test_under_x64_everything_is_float64(norm):
    with jax.enable_x64(True):
        apply, params, extra = placed(norm, make=bare)
        x = jax.ShapeDtypeStruct(TEXT.array, jnp.float64)
        y, after = jax.eval_shape(apply, params, extra, x)
        assert {leaf.dtype.name for leaf in jax.tree.leaves((y, after))} == {"float64"}
        text = str(jax.make_jaxpr(lambda *a: pull(apply, *a))(params, extra, x, x))
        assert "f32[8,4,8]" not in text


# the dims of x that a norm shifts to mean 0 and scales to variance 1 together
together = pytest.mark.parametrize(
    ("norm", "shape", "dims"),
    [
        ("layer", TEXT, (2,)),
        ("layer", IMAGES, (3,)),
        ("layer:over=example", IMAGES, (1, 2, 3)),
        ("layer:over=example", TEXT, (2,)),
        ("batch", TEXT, (0, 1)),
        ("batch", VOLUMES, (0, 1, 2, 3)),
        ("batch_renorm", TEXT, (0, 1)),  # as long as it has not begun
        ("group:groups=1", TEXT, (2,)),
        ("group:groups=1", IMAGES, (1, 2, 3)),
        ("instance", TEXT, (1,)),
        ("instance", IMAGES, (1, 2)),
    ],
)


@together
def test_what_is_normalized_together_has_mean_0_and_variance_1(norm, shape, dims):
    apply, *held = placed(norm, shape)
    y, _ = apply(*held, 3 + 5 * drawn(1, shape.array))
    np.testing.assert_allclose(y.mean(dims), 0, atol=1e-6)
    np.testing.assert_allclose(y.var(dims), 1, atol=2e-5)  # less than 1 by eps over the variance of x


@together
def test_shift_and_scale_of_what_is_normalized_together_do_not_matter(norm, shape, dims):
    apply, *held = placed(norm, shape)
    x, change = 5 * drawn(1, shape.array), drawn(2, shape.array).mean(dims, keepdims=True)
    y, _ = apply(*held, x)
    changed, _ = apply(*held, x * jnp.exp(change) + change)
    assert_equal(changed, y, tolerance=2e-5)


def test_each_group_and_each_part_has_statistics_of_its_own():
    x = 3 + 5 * drawn(1, ODD.array)
    apply, *held = placed("group:groups=3", ODD)
    y = apply(*held, x)[0].reshape(6, 3, 2, 3, 4)
    np.testing.assert_allclose(y.var((1, 2, 4)), 1, atol=2e-5)
    apply, *held = placed("batch:replicas=2", ODD)
    y = apply(*held, x)[0].reshape(2, 3, 3, 2, 12)
    np.testing.assert_allclose(y.mean((1, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(y.var((1, 2, 3)), 1, atol=2e-5)


def test_only_the_length_of_a_weight_drops_out():
    apply, params, extra = placed("weight")
    x = drawn(1, TEXT.array)
    longer = jax.tree.map(lambda leaf: leaf, params)
    longer["product"]["weight"] = params["product"]["weight"] * jnp.arange(1.0, 9)
    assert_equal(apply(longer, extra, x)[0], apply(params, extra, x)[0], tolerance=2e-6)


def test_a_norm_that_reads_weights_is_refused_where_there_are_none():
    with pytest.raises(Refused, match=r"model\.norm.*propagation.*acts on the weights"):
        free("propagation")
    with pytest.raises(Refused, match=r"model\.norm.*instance:running=true.*that it is to predict"):
        free("instance:running=true", causal=True)
    for norm in ("streaming", "batch_renorm:begin=0"):
        with pytest.raises(Refused, match=rf"model\.norm = {norm}: .*inside a cell"):
            free(norm, cell=True)
    assert free("instance")(8).dims[0] == {"gain": "embed", "bias": "embed"}


def test_a_product_before_a_norm_has_no_bias():
    with pytest.raises(ValueError, match="one parameter"):
        normalized(dense(8, 8, "embed mlp"), "layer", 8, "mlp")


@pytest.mark.parametrize(
    ("norm", "problem"),
    [("grup", "group"), ("group:size=2", "groups"), ("group:groups=two", "whole number"), ("layer:bias=false", "bias")],
)
def test_a_norm_that_is_none_is_refused(norm, problem):
    with pytest.raises(Refused, match=problem):
        free(norm)


UNFIT = ["group:groups=5", "layer:over=batch", "batch:keep=1.5", "rms:eps=-1.0", "batch_renorm:rmax=0.5"]
UNFIT += ["streaming:current=0.5", "weight:keep=nan", "instance:eps=-1.0", "batch:replicas=0", "group:groups=-1"]
UNFIT += ["online:groups=3", "online:replicas=0"]


@pytest.mark.parametrize("norm", UNFIT)
def test_arguments_out_of_range_are_refused(norm):
    with pytest.raises(Refused, match=norm):
        spec.member("norms", norm, "model.norm")(8)


def test_what_does_not_fit_the_data_is_refused():
    for norm in ("batch:replicas=3", "online:replicas=3"):
        with pytest.raises(Refused, match=rf"{norm}: .*8 examples is not 3 equal parts.*replicas=1"):
            jax.eval_shape(*placed(norm), jnp.zeros(TEXT.array))
    with pytest.raises(Refused, match=r"model\.norm.*instance"):
        jax.eval_shape(*placed("instance", FLAT), jnp.zeros(FLAT.array))
