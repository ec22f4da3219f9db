"""Products with weights: dot, conv and lookup, each by the moves that `plan/matmul.py` derives."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxpar.core import compat
from jaxpar.core.policy import Operand, Policy
from jaxpar.core.scheme import Axes
from jaxpar.plan import layout
from jaxpar.plan.bilinear import Bilinear, conv, matmul, patched
from jaxpar.plan.contraction import Recorded, Way, contract, moved, stay
from jaxpar.plan.draws import offset
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
        scale: what the backward pass begins with: the loss scale, or 1.
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
    scale: Any = 1.0
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

    def dot(x, w, dims):
        if isinstance(dims, str):
            return _product(settings, matmul, x, (w,), (dims,))[0]
        return _product(settings, matmul, x, w, dims)

    return dot


def conv_of(settings: Settings) -> Callable:
    """`Context.conv`."""
    form = patched if settings.policy.matrices else conv

    def convolve(x, w, dims, strides=1, padding="SAME"):
        if isinstance(dims, str):
            return _product(settings, form(strides, padding), x, (w,), (dims,))[0]
        return _product(settings, form(strides, padding), x, w, dims)

    return convolve


def _product(settings: Settings, form: Bilinear, x, weights, names) -> list:
    """x times each weight; x is cast, marked and gathered once for all weights that want it alike."""
    policy = settings.policy
    routes = [route(settings.placement, dims, x.ndim) for dims in names]
    site, shared = ", ".join(names), layout.axes_of(*(at for one in routes for at in one[:3]))
    trained = not site.startswith("-")  # whole features are data: nothing upstream of them is trained
    x = policy.cast(x if trained else lax.stop_gradient(x), "activation")
    x = settings.constrain(x, names[0].split()[0], "activation")
    ways, arrays, histories = [], [], []
    for w, dims, one in zip(weights, names, routes, strict=True):
        w, history = (w.array, w.histories) if isinstance(w, Recorded) else (w, {})
        held = isinstance(w, Held)
        w = policy.cast(w.array if held else w, "weight")
        arrays.append(w if held else settings.constrain(w, dims, "weight"))
        histories.append(history)
        ways.append(_way(settings, site, dims, one, shared, trained=trained, held=held))
    results = contract(settings, form, ways, x, tuple(arrays), tuple(histories))
    return [settings.constrain(y, dims.split()[1], "activation") for y, dims in zip(results, names, strict=True)]


def _way(settings: Settings, site: str, dims: str, one: Route, shared: Axes, *, trained, held) -> Way:
    """How the operands of one product move.

    Args:
        settings: as of the Context.
        site: all products that share x.
        dims: of this weight.
        one: its route.
        shared: mesh axes of all that is multiplied.
        trained: whether x has a gradient.
        held: whether w was fetched before.
    """
    wire, moves = settings.wire, one.moves
    missing_x = _but(shared, layout.axes_of(one.x))
    missing_w = _but(shared, layout.axes_of(one.w), layout.replicas(settings.placement))
    x_stays = not (missing_x or moves.gather_x or moves.keep_x)
    w_stays = held or not (missing_w or moves.gather_w or moves.keep_w)

    def x(a, along=None):
        a = wire.vary(a, missing_x, f"x of {site}", trained) if along is None else a
        return _move(settings, a, moves.gather_x, moves.keep_x, f"x of {site}", along, trained=trained)

    def w(a, along=None):
        return _fetch(settings, a, dims, one.w, moves, shared, along)

    def y(a):
        for dim, axis in moves.scatter:
            a = wire.scatter(a, dim, axis, f"y of {dims}")
        return wire.total(a, moves.total, f"y of {dims}")

    def back(dy: Operand) -> Operand:
        for step in reversed(moves.scatter):
            dy = moved(lambda a, along=None, step=step: _move(settings, a, (step,), (), f"y of {dims}", along), dy)
        return dataclasses.replace(dy, array=compat.vary(dy.array, moves.total))

    lies = (one.x, _fetched(one) if held else one.w, one.y)
    return Way(dims, lies, stay if x_stays else x, stay if w_stays else w, y, back, (moves.gather_x, moves.keep_x))


def _fetched(one: Route) -> Layout:
    """Where a weight lies once it is fetched."""
    now = [[axis for axis in axes if (dim, axis) not in one.moves.gather_w] for dim, axes in enumerate(one.w)]
    for dim, axis in one.moves.keep_w:
        now[dim].append(axis)
    return tuple(map(tuple, now))


def _but(axes: Axes, *others: Axes) -> Axes:
    return tuple(axis for axis in axes if not any(axis in other for other in others))


def _move(settings: Settings, a, gathers: tuple[Step, ...], keeps: tuple[Step, ...], site: str, along=None, **known):
    """Gather, then keep own parts; of a scale only along the dims in which it has entries, counted from the last."""
    for dim, axis in gathers:
        a = settings.wire.gather(a, dim, axis, site, **known) if along is None or dim - a.ndim in along else a
    for dim, axis in keeps:
        if along is None or dim - a.ndim in along:
            count = a.shape[dim] // settings.placement.scheme.axes[axis]
            a = lax.dynamic_slice_in_dim(a, settings.wire.index(axis) * count, count, axis=dim)
    return a


def _fetch(settings: Settings, w, dims: str, own: Layout, moves: Moves, shared: Axes, along=None):
    """Mark as varying, then gather: so gradients are scattered before they are summed."""
    missing = _but(shared, layout.axes_of(own), layout.replicas(settings.placement))
    w = settings.wire.vary(w, missing, f"w of {dims}") if along is None else w
    first = w.ndim - 2
    gathers, keeps = (tuple((first + dim, axis) for dim, axis in steps) for steps in (moves.gather_w, moves.keep_w))
    return _move(settings, w, gathers, keeps, f"w of {dims}", along, fixed=True)


def hold_of(settings: Settings) -> Callable:
    """`Context.hold`; inside the loop, activations are x[batch, features].

    A held weight is float32, whatever it was gathered in, so that its gradients are summed over the loop in float32.
    """

    def hold(w, dims):
        if " " not in dims:
            axes = layout.axes_of(layout.activation(settings.placement, dims, 2))
            return settings.wire.vary(w, axes, dims, trained=False)  # stands on the bill as any bias does
        one = route(settings.placement, dims, 2)
        array = w.array if isinstance(w, Recorded) else w
        array = settings.constrain(settings.policy.cast(array, "weight"), dims, "weight")
        array = _fetch(settings, array, dims, one.w, one.moves, layout.axes_of(*one[:3]))
        held = Held(array.astype(jnp.float32))
        return dataclasses.replace(w, array=held) if isinstance(w, Recorded) else held

    return hold


def lookup_of(settings: Settings) -> Callable:
    """`Context.lookup`: a product with one-hot rows, which each device can make for any part of the vocabulary.

    Gradients of rows that were looked up several times are added up in float32.
    """
    placement, dims = settings.placement, "vocab embed"

    def lookup(table, ids):
        table = table.array if isinstance(table, Recorded) else table
        in_rows = layout.activation(placement, "vocab", ids.ndim + 1)[:-1]
        own, y_layout = layout.weight(placement, dims), layout.activation(placement, "embed", ids.ndim + 1)
        split = _but(own[0], layout.axes_of(in_rows))
        moves = derive((*in_rows, split), own, y_layout)
        table = settings.constrain(settings.policy.cast(table, "weight"), dims, "weight")
        table = _fetch(settings, table, dims, own, moves, moves.vary)
        ids = _move(settings, ids, moves.gather_x, moves.keep_x, "ids")
        ids = settings.constrain(ids, "embed", "rows")
        near, inside = local_ids(ids, offset(settings, split, table.shape[0]), table.shape[0])
        y = jnp.where(inside[..., None], jnp.take(table.astype(jnp.float32), near, axis=0), 0).astype(table.dtype)
        for dim, axis in moves.scatter:
            y = settings.wire.scatter(y, dim, axis, f"y of {dims}")
        return settings.constrain(settings.wire.total(y, moves.total, f"y of {dims}"), "embed", "activation")

    return lookup


def local_ids(ids, first, count: int):
    """Ids relative to a local part of the vocabulary, clipped into it, and which of them lie inside."""
    near = ids - first
    return jnp.clip(near, 0, count - 1), (near >= 0) & (near < count)
