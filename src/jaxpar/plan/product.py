"""Products with weights: dot, conv and lookup, each by the moves that `plan/matmul.py` derives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxpar.core.policy import Policy
from jaxpar.core.scheme import Axes
from jaxpar.plan import layout
from jaxpar.plan.layout import Layout, Placement
from jaxpar.plan.matmul import Moves, Step, derive
from jaxpar.plan.remat import Remat
from jaxpar.plan.wire import Wire
from jaxpar.plan.zero import NONE, Zero


class Settings(NamedTuple):
    """What a Context is made of.

    Attributes:
        placement: the scheme, set down on the model.
        policy: precision.
        wire: collectives, real or counted.
        zero: who holds which parts of parameters and of what follows them.
        train: training or evaluation.
        key: random key of this step and layer; None if nothing is drawn.
        first_example: global index of the first example of this microbatch.
        first_layer: number of the first block of a stack that is here, where a pipeline stage holds some of them.
        unroll: run the blocks of a stack one by one (True), in one scan (False), or as is faster (None).
        regather: inside that scan, gather again in the backward pass.
        remat: what the backward pass computes again, in training.
        constrain: `constrain(a, dims, role)`: the array itself, but where XLA decides the collectives: an operand or
            result of a product, held to the scheme's layout. `role` is `"weight"`, `"activation"`, or `"rows"` for
            ids that stand for activations with the features `dims`.
    """

    placement: Placement
    policy: Policy
    wire: Wire
    zero: Zero = NONE
    train: bool = True
    key: Any = None
    first_example: Any = 0
    first_layer: Any = 0
    unroll: bool | None = None
    regather: bool = True
    remat: Remat = Remat()
    constrain: Callable = lambda a, dims, role: a


class Held(NamedTuple):
    """A weight fetched ahead of a loop (`Context.hold`); `dot` takes it in place of the stored one."""

    array: Any


class Route(NamedTuple):
    """Where the operands of one product lie, and what follows."""

    x: Layout
    w: Layout
    y: Layout
    moves: Moves


def route(placement: Placement, dims: str, rank: int) -> Route:
    """The route of a product with the weight `dims`, for x and y of `rank` dims."""
    into, out = dims.split()
    x, y = (layout.activation(placement, word, rank) for word in (into, out))
    w = layout.weight(placement, dims)
    return Route(x, w, y, derive(x, w, y))


def dot_of(settings: Settings) -> Callable:
    """`Context.dot`."""

    def multiply(x, w, dtype):  # as one matrix: XLA on CPU is slower on gradients of a batch of them
        y = jnp.matmul(x.reshape(-1, x.shape[-1]), w, preferred_element_type=dtype)
        return y.reshape(*x.shape[:-1], w.shape[-1])

    def dot(x, w, dims):
        if isinstance(dims, str):
            return _product(settings, multiply, x, (w,), (dims,))[0]
        return _product(settings, multiply, x, w, dims)

    return dot


def conv_of(settings: Settings) -> Callable:
    """`Context.conv`."""

    def conv(x, w, dims, strides=1):
        def multiply(x, w, dtype):
            numbers, window = ("NHWC", "HWIO", "NHWC"), (strides, strides)
            return lax.conv_general_dilated(
                x, w, window, "SAME", dimension_numbers=numbers, preferred_element_type=dtype
            )

        return _product(settings, multiply, x, (w,), (dims,))[0]

    return conv


def _product(settings: Settings, multiply: Callable, x, weights, names) -> list:
    """x times each weight; x is cast, marked and gathered once for all weights that want it alike."""
    placement, policy, wire = settings.placement, settings.policy, settings.wire
    routes = [route(placement, dims, x.ndim) for dims in names]
    site, first = ", ".join(names), routes[0].x
    shared = layout.axes_of(*(at for one in routes for at in one[:3]))
    trained = not site.startswith("-")  # whole features are data: nothing upstream of them is trained
    x = policy.cast(x if trained else lax.stop_gradient(x), "activation")
    x = settings.constrain(x, names[0].split()[0], "activation")
    x = wire.vary(x, _but(shared, layout.axes_of(first)), f"x of {site}", trained)

    gathered, results = {}, []
    for w, dims, one in zip(weights, names, routes, strict=True):
        moves = one.moves
        wanted = (moves.gather_x, moves.keep_x)
        if wanted not in gathered:
            gathered[wanted] = _move(settings, x, *wanted, f"x of {site}", trained=trained)
        w = w.array if isinstance(w, Held) else _fetch(settings, w, dims, one.w, moves, shared)
        results.append(_finish(settings, policy.dot(multiply, gathered[wanted], w), moves, dims))
    return results


def _but(axes: Axes, *others: Axes) -> Axes:
    return tuple(axis for axis in axes if not any(axis in other for other in others))


def _move(settings: Settings, a, gathers: tuple[Step, ...], keeps: tuple[Step, ...], site: str, **known):
    """Gather, then keep own parts."""
    for dim, axis in gathers:
        a = settings.wire.gather(a, dim, axis, site, **known)
    for dim, axis in keeps:
        count = a.shape[dim] // settings.placement.scheme.axes[axis]
        a = lax.dynamic_slice_in_dim(a, settings.wire.index(axis) * count, count, axis=dim)
    return a


def _fetch(settings: Settings, w, dims: str, own: Layout, moves: Moves, shared: Axes):
    """Cast, mark as varying, then gather: so fewer bytes travel, and gradients are scattered before they are summed."""
    missing = _but(shared, layout.axes_of(own), layout.replicas(settings.placement))
    w = settings.constrain(settings.policy.cast(w, "weight"), dims, "weight")
    w = settings.wire.vary(w, missing, f"w of {dims}")
    first = w.ndim - 2
    gathers, keeps = (tuple((first + dim, axis) for dim, axis in steps) for steps in (moves.gather_w, moves.keep_w))
    return _move(settings, w, gathers, keeps, f"w of {dims}", fixed=True)


def _finish(settings: Settings, y, moves: Moves, dims: str):
    """Scatter partial sums to where they are wanted; sum what is left."""
    for dim, axis in moves.scatter:
        y = settings.wire.scatter(y, dim, axis, f"y of {dims}")
    return settings.constrain(settings.wire.total(y, moves.total, f"y of {dims}"), dims.split()[1], "activation")


def hold_of(settings: Settings) -> Callable:
    """`Context.hold`; inside the loop, activations are x[batch, features]."""

    def hold(w, dims):
        if " " not in dims:
            axes = layout.axes_of(layout.activation(settings.placement, dims, 2))
            return settings.wire.vary(w, axes, dims, trained=False)  # stands on the bill as any bias does
        one = route(settings.placement, dims, 2)
        return Held(_fetch(settings, w, dims, one.w, one.moves, layout.axes_of(*one[:3])))

    return hold


def lookup_of(settings: Settings) -> Callable:
    """`Context.lookup`: a product with one-hot rows, which each device can make for any part of the vocabulary."""
    placement, dims = settings.placement, "vocab embed"

    def lookup(table, ids):
        in_rows = layout.activation(placement, "vocab", ids.ndim + 1)[:-1]
        own, y_layout = layout.weight(placement, dims), layout.activation(placement, "embed", ids.ndim + 1)
        split = _but(own[0], layout.axes_of(in_rows))
        moves = derive((*in_rows, split), own, y_layout)
        table = _fetch(settings, table, dims, own, moves, moves.vary)
        ids = _move(settings, ids, moves.gather_x, moves.keep_x, "ids")
        ids = settings.constrain(ids, "embed", "rows")
        near, inside = local_ids(ids, offset(settings, split, table.shape[0]), table.shape[0])
        return _finish(settings, jnp.where(inside[..., None], jnp.take(table, near, axis=0), 0), moves, dims)

    return lookup


def local_ids(ids, first, count: int):
    """Ids relative to a local part of the vocabulary, clipped into it, and which of them lie inside."""
    near = ids - first
    return jnp.clip(near, 0, count - 1), (near >= 0) & (near < count)


def offset(settings: Settings, axes: Axes, count: int):
    """Global index of the first of `count` local entries of a dim that lies over `axes`, major first."""
    place = 0
    for axis in axes:
        place = place * settings.placement.scheme.axes[axis] + settings.wire.index(axis)
    return place * count
