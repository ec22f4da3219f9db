"""Collectives derived from layouts: the product of one device, or a refusal; never a silently wrong number.

The devices are simulated by numpy: an array has one leading dim per mesh axis, so that `a[i, j]` is what one device
holds. Numbers are small and whole, so that sums are exact in any order and equal means equal.
"""

import functools
import itertools
import random
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P
from parity import assert_equal

from jaxpar.core import compat, family
from jaxpar.core.plan import scheme_of
from jaxpar.core.scheme import Scheme
from jaxpar.plan import layout, mesh, product
from jaxpar.plan.context import Settings, context
from jaxpar.plan.layout import Placement, place
from jaxpar.plan.matmul import Moves, derive
from jaxpar.plan.wire import device_wire

MESHES = [{"a": 2, "b": 2}, {"a": 2, "b": 4}, {"a": 2, "b": 2, "c": 2}]
SIZES = {0: (), 1: (4,), 2: (2, 4), 3: (2, 2, 2)}  # of a scheme, by how many it takes
SCHEMES = [
    ":".join(filter(None, [name, "x".join(map(str, SIZES[len(family.parameters(family.pick("schemes", name)))]))]))
    for name in family.names("schemes")
]
PRODUCTS = ("embed mlp", "mlp embed", "embed heads", "heads embed", "embed embed", "mlp mlp", "- embed", "embed vocab")

rng = np.random.default_rng(0)
X_BSK, W_KN, C_BSN = (rng.integers(-4, 5, shape) for shape in [(8, 8, 8), (8, 8), (8, 8, 8)])


# what a device does, for all devices at once


def gather(a, sizes, dim, axis):
    where = list(sizes).index(axis)
    whole = np.concatenate(np.split(a, sizes[axis], where), len(sizes) + dim)
    return np.repeat(whole, sizes[axis], where)


def keep(a, sizes, dim, axis):
    where = list(sizes).index(axis)
    parts = np.split(a, sizes[axis], len(sizes) + dim)
    return np.concatenate([part.take([place], where) for place, part in enumerate(parts)], where)


def total(a, sizes, axis):
    where = list(sizes).index(axis)
    return np.repeat(a.sum(where, keepdims=True), sizes[axis], where)


def spread(a, sizes, lies):
    """The array `a` on the devices, as the layout says: of each dim a device keeps its own part, major axis first."""
    a = np.broadcast_to(a, (*sizes.values(), *a.shape))
    for dim, axes in enumerate(lies):
        for axis in axes:
            a = keep(a, sizes, dim, axis)
    return a


def simulated(x, w, sizes, moves):
    """y on all devices, by `moves` in the order in which `Moves` documents them."""
    for step in moves.gather_w:
        w = gather(w, sizes, *step)
    for step in moves.keep_w:
        w = keep(w, sizes, *step)
    for step in moves.gather_x:
        x = gather(x, sizes, *step)
    for step in moves.keep_x:
        x = keep(x, sizes, *step)
    y = np.einsum("...bsk,...kn->...bsn", x, w)
    for dim, axis in moves.scatter:
        y = keep(total(y, sizes, axis), sizes, dim, axis)
    for axis in moves.total:
        y = total(y, sizes, axis)
    return y


@functools.cache
def spread_once(letter, sizes, lies):
    return spread({"x": X_BSK, "w": W_KN, "y": X_BSK @ W_KN}[letter], dict(sizes), lies)


def is_right(sizes, lies):
    """Whether the derived moves make the product; None if the layouts are refused."""
    try:
        moves = derive(*lies)
    except ValueError:
        return None
    x, w, want = (spread_once(letter, tuple(sizes.items()), one) for letter, one in zip("xwy", lies, strict=True))
    return np.array_equal(simulated(x, w, sizes, moves), want)


def layouts(axes, dims):
    """All ways to spread some of the axes over the dims, in any order."""
    for where in itertools.product(range(dims + 1), repeat=len(axes)):
        chosen = [[axis for axis, at in zip(axes, where, strict=True) if at == dim] for dim in range(dims)]
        yield from itertools.product(*map(itertools.permutations, chosen))


LAYOUTS = {n: [list(layouts("abc"[:n], dims)) for dims in (3, 2, 3)] for n in (2, 3)}  # of x, w and y


@pytest.mark.parametrize("sizes", MESHES[:2], ids=str)
def test_two_axes_in_every_layout(sizes):
    found = Counter(is_right(sizes, lies) for lies in itertools.product(*LAYOUTS[2]))
    assert found[True] > 3000 and found[None] > 0 and not found[False], found


def test_three_axes_in_random_layouts():
    found = Counter()

    @settings(max_examples=2000, deadline=None, derandomize=True, database=None)
    @given(st.tuples(*map(st.sampled_from, LAYOUTS[3])))
    def check(lies):
        right = is_right(MESHES[2], lies)
        found[right] += 1
        assert right is not False

    check()
    assert min(found[True], found[None]) > 600, found  # neither answer is given to all


@pytest.mark.parametrize("tensor", SCHEMES)
@pytest.mark.parametrize("data", [1, 2])
def test_every_product_of_a_scheme_is_right(tensor, data):
    scheme = scheme_of(tensor)
    for sizes in ({"batch": 8}, {"batch": layout.size(scheme, scheme.inner[0]) * data, "context": 8}):
        placement = place(scheme, data, sizes)
        for dims in PRODUCTS:
            lies = product.route(placement, dims, 3)[:3]
            assert is_right(placement.scheme.axes, lies), f"{dims}: {lies}"


# refusals


def test_gathering_a_major_axis_before_the_minor_one_is_refused():
    x, w, y = ((), (), ("a", "b")), (("b",), ()), ((), (), ())
    with pytest.raises(ValueError, match=r"x must gather 'a' on dim 2, which lies over \('a', 'b'\).*Write 'a' last"):
        derive(x, w, y)
    with pytest.raises(ValueError, match=r"w must gather 'a' on dim 0.*Write 'a' last"):
        derive(((), (), ("b",)), (("a", "b"), ()), y)

    sizes = MESHES[1]  # what would come of it: the shapes fit, the numbers do not
    done_anyway = Moves(("a", "b"), (), (), ((2, "a"),), (), (), ("b",))
    got = simulated(spread(X_BSK, sizes, x), spread(W_KN, sizes, w), sizes, done_anyway)
    want = spread(X_BSK @ W_KN, sizes, y)
    assert got.shape == want.shape and not np.array_equal(got, want)


def test_a_contraction_in_two_orders_is_refused():
    with pytest.raises(ValueError, match="the contraction lies over"):
        derive(((), (), ("a", "b")), (("b", "a"), ()), ((), (), ()))


def test_an_order_that_y_cannot_get_is_refused():
    with pytest.raises(ValueError, match="y comes to lie over"):
        derive((("b", "a"), (), ()), ((), ()), (("a", "b"), (), ()))


def test_keeping_own_parts_needs_no_collective():
    assert derive(((), (), ()), ((), ()), (("a",), (), ("b",))) == Moves(
        vary=("a", "b"), gather_w=(), keep_w=((1, "b"),), gather_x=(), keep_x=((0, "a"),), scatter=(), total=()
    )
    within = derive((("a",), (), ()), ((), ("b",)), (("a", "c"), (), ("b", "d")))
    assert (within.keep_x, within.keep_w) == (((0, "c"),), ((1, "d"),))


# gradients, on devices of jax


def accepted_cases(sizes):
    """Some layouts that are accepted: at random, until every kind of move occurs in four."""
    draw, found = random.Random(0), {}
    wanted = Counter({kind: 4 for kind in Moves._fields if kind != "vary"})
    choices = LAYOUTS[len(sizes)]
    while wanted.total():
        lies = tuple(map(draw.choice, choices))
        if is_right(sizes, lies):
            kinds = [kind for kind, steps in derive(*lies)._asdict().items() if steps and wanted[kind]]
            if kinds:
                found[f"case {len(found)}"] = lies
                wanted.subtract(kinds)
    return found


def loss_over(devices, local_sum, in_specs):
    """The sum over all entries of what `local_sum` gives in parts, with the axes that split them."""

    def local(*args):
        losses = 0.0
        for part, axes in local_sum(*args):
            varying = compat.varying_axes(part)
            assert set(axes) <= set(varying)
            copies = tuple(axis for axis in varying if axis not in axes)
            losses += lax.psum(lax.pmean(part, copies) if copies else part, axes) if varying else part
        return losses

    return jax.shard_map(local, mesh=devices, in_specs=in_specs, out_specs=P())


def test_gradients_are_those_of_one_device(monkeypatch):
    sizes = MESHES[2]
    cases = accepted_cases(sizes)
    routes = {name: product.Route(*lies, derive(*lies)) for name, lies in cases.items()}
    monkeypatch.setattr(product, "route", lambda placement, dims, rank: routes[dims])
    bare = Placement(Scheme(axes=sizes, outer=((), ()), inner=((), ()), up=((), ()), down=((), ())))
    dot = product.dot_of(Settings(bare, family.pick("policies", "fp32")(), device_wire()))

    def products(x, w, c):
        for name, (_, _, y) in cases.items():
            yield jnp.sum(dot(x[name], w[name], name) * c[name]), layout.axes_of(y)

    specs = tuple({name: mesh.spec(lies[which]) for name, lies in cases.items()} for which in range(3))
    loss = loss_over(mesh.mesh_of(sizes), products, specs)
    x, w, c = ({name: jnp.asarray(a, jnp.float32) for name in cases} for a in (X_BSK, W_KN, C_BSN))
    got, (dx, dw) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, w, c)
    assert got == len(cases) * np.sum(X_BSK @ W_KN * C_BSN)
    for name in cases:
        assert np.array_equal(dx[name], C_BSN @ W_KN.T), cases[name]
        assert np.array_equal(dw[name], np.einsum("bsk,bsn->kn", X_BSK, C_BSN)), cases[name]


# convolutions

# window, channels of x and of y, strides
KERNELS = {"- embed": (5, 3, 8, 2), "embed channels": (3, 8, 16, 3), "channels embed": (3, 16, 8, 1)}
KERNELS |= {"embed embed": (1, 8, 8, 3)}


def convolved(conv, x, kernels):
    for dims, (_, _, _, strides) in KERNELS.items():
        x = conv(x, kernels[dims], dims, strides)
    return x


def whole_conv(x, kernel, dims, strides):
    return lax.conv_general_dilated(x, kernel, (strides, strides), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.cache
def one_device():
    """Images, kernels, and the summed squares of what the convolutions make of them, with its gradient."""
    draw = np.random.default_rng(1)
    x = jnp.asarray(draw.normal(size=(8, 13, 11, 3)), jnp.float32)
    kernels = {
        dims: jnp.asarray(draw.normal(size=(window, window, into, out)) / window / into**0.5, jnp.float32)
        for dims, (window, into, out, _) in KERNELS.items()
    }
    loss = jax.value_and_grad(lambda kernels: jnp.sum(convolved(whole_conv, x, kernels) ** 2))
    return x, kernels, jax.jit(loss)(kernels)


@pytest.mark.parametrize("tensor", SCHEMES)
def test_a_convolution_does_not_depend_on_the_scheme(tensor):
    placement = place(scheme_of(tensor), 2 if tensor == "single" else 1, {"batch": 8})
    conv = context(Settings(placement, family.pick("policies", "fp32")(), device_wire())).conv
    y_layout = layout.activation(placement, "embed", 4)

    def squares(x, kernels):
        yield jnp.sum(convolved(conv, x, kernels) ** 2), layout.axes_of(y_layout)

    x_spec = mesh.spec(layout.activation(placement, "-", 4))
    specs = (x_spec, {dims: mesh.spec(layout.weight(placement, f"- - {dims}")) for dims in KERNELS})
    loss = loss_over(mesh.mesh_of(placement.scheme.axes), squares, specs)
    x, kernels, want = one_device()
    assert_equal(jax.jit(jax.value_and_grad(loss, argnums=1))(x, kernels), want, tolerance=2e-6)
