"""ZeRO: state of which each device of the data axes holds a part, and parameters that are whole only while in use.

Devices of the data axes compute with the same parameters, so each may keep a part of the optimizer's state (stage 1),
of the gradients (2) and of the parameters (3). At rest a leaf is split along one more dim than where layers use it.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.core import compat
from jaxpar.core.plan import Plan
from jaxpar.core.scheme import Axes
from jaxpar.core.types import Tree
from jaxpar.plan import layout, padding
from jaxpar.plan.layout import Layout, Placement
from jaxpar.plan.wire import Wire, device_wire

GATHERS = ("block", "step")


class Rest(NamedTuple):
    """How a parameter rests.

    Attributes:
        used: its layout where layers use it.
        stored: its layout at rest.
        steps: what makes it whole: (dim, counted from the last, axis), one gather after the other.
        matrix: whether it is a factor of products, and so cast before it travels.
        stacked: whether it belongs to a stack of blocks.
    """

    used: Layout
    stored: Layout
    steps: tuple[tuple[int, str], ...]
    matrix: bool
    stacked: bool


class Zero(NamedTuple):
    """The ZeRO of a run.

    Attributes:
        stage: 0 to 3.
        gather: when stage 3 gathers parameters: at every entry of a `block`, forward and back, or once per `step`.
        axes: over which state is split.
        rests: a `Rest` for each parameter.
    """

    stage: int
    gather: str
    axes: Axes
    rests: Tree

    def layouts(self, stage: int) -> Tree:
        """Where what is split from `stage` on lies: 1 for the optimizer's state, 2 gradients, 3 parameters."""
        split = self.stage >= stage
        return jax.tree.map(lambda one: one.stored if split else one.used, self.rests, is_leaf=_is_rest)


@partial(jax.tree_util.register_dataclass, data_fields=["part", "whole"], meta_fields=["rest", "late"])
@dataclasses.dataclass(frozen=True)
class Resting:
    """A parameter that rests in parts, as it goes through a model until `fetched` makes it whole.

    In a stack of blocks its gradient is scattered by each block, to be that of `part`. Elsewhere it is that of `whole`,
    and scattered by `owned`: several parts of a model may read one table, whose gradients are summed first.

    Attributes:
        part: what this device holds of it.
        whole: all of it, if it is at hand.
        rest: how it rests; dims are counted from the last, so a slice of a stack of layers rests alike.
        late: whether it is gathered where it is used; a `whole` is then there for the sake of its gradient alone.
    """

    part: Any
    whole: Any
    rest: Rest
    late: bool


NONE = Zero(0, "block", (), None)


def zero_of(plan: Plan, placement: Placement, dims: Tree, shapes: Tree) -> Zero:
    """The ZeRO that a plan asks for.

    Args:
        plan: `zero`, `zero_group` and `zero_gather`.
        placement: where parameters lie without it.
        dims: tree of dim strings.
        shapes: tree of what has a shape: that on disk.

    Source: Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, section 5; Zhang et al. 2022 (MiCS), arXiv:2205.00119,
        section 3.2, for `zero_group`.
    """
    axes = _axes(plan, placement)
    rests = jax.tree.map(lambda words, leaf: _rest(placement, words, leaf.shape, axes), dims, shapes)
    return Zero(plan.zero, plan.zero_gather, axes, rests)


def _axes(plan: Plan, placement: Placement) -> Axes:
    if not plan.zero:
        return ()
    copies = layout.replicas(placement)
    return (layout.GROUP,) if layout.GROUP in copies else copies


def _rest(placement: Placement, words: str, on_disk: tuple[int, ...], axes: Axes) -> Rest:
    """Split along the first dim that divides, a leading `layers` aside: its parts are contiguous.

    What a dim is split over already comes first. A leaf without such a dim stays whole.
    """
    used, named = layout.weight(placement, words), words.split()
    matrix = len(named) > 1 and named[-2] not in ("layers", *layout.ROWS)
    stacked = named[:1] == ["layers"]
    parts, sizes = layout.size(placement.scheme, axes), padding.shape(placement, words, on_disk)
    for dim, (word, size, own) in enumerate(zip(named, sizes, used, strict=True)):
        if axes and word != "layers" and size % (layout.size(placement.scheme, own) * parts) == 0:
            stored = (*used[:dim], (*own, *axes), *used[dim + 1 :])
            return Rest(used, stored, tuple((dim - len(named), axis) for axis in reversed(axes)), matrix, stacked)
    return Rest(used, used, (), matrix, stacked)


def entered(settings, params: Tree) -> Tree:
    """Parameters as a step takes them: from stage 2 on, `Resting` where they are split.

    Args:
        settings: `Settings` of the run.
        params: local parts; at stage 2 whole.
    """
    zero, wire = settings.zero, settings.wire

    def enter(rest: Rest, leaf):
        if zero.stage < 2 or not rest.steps:
            return leaf
        if zero.stage == 2:
            return Resting(_own_part(wire, rest, leaf), leaf, rest, late=False)
        whole = _gathered(settings, rest, leaf) if zero.gather == "step" else None
        return Resting(leaf, whole, rest, late=whole is None)

    return params if zero.rests is None else jax.tree.map(enter, zero.rests, params, is_leaf=_is_rest)


def apart(tree: Tree) -> tuple[Tree, Tree]:
    """What of `entered` parameters gradients are taken of, and the rest of them."""

    def trained(leaf):
        if not isinstance(leaf, Resting):
            return leaf
        if leaf.rest.stacked:
            return dataclasses.replace(leaf, whole=None)
        return _zeros(leaf) if leaf.late else leaf.whole

    def other(leaf):
        return leaf if isinstance(leaf, Resting) else None

    return tuple(jax.tree.map(one, tree, is_leaf=_is_resting) for one in (trained, other))


def together(trained: Tree, other: Tree) -> Tree:
    """The inverse of `apart`."""

    def one(leaf, known):
        if known is None:
            return leaf
        return dataclasses.replace(known, **({"part": leaf.part} if known.rest.stacked else {"whole": leaf}))

    return jax.tree.map(one, trained, other, is_leaf=_is_resting)


def fetched(settings, tree: Tree, x) -> tuple[Tree, Any]:
    """A tree whose `Resting` leaves are whole, and x.

    Args:
        settings: `Settings` of the run.
        tree: of parameters, of one block of a stack or of a part that is no stack.
        x: what they will meet. Gathers outside of stacks wait for it, lest XLA make one of several, or one for all
            microbatches, and keep what it gathered all the while.
    """
    waiting = [leaf.part for leaf in _resting(tree) if leaf.late and not leaf.rest.stacked]
    if waiting:
        waiting, x = lax.optimization_barrier((waiting, x))
    parts = iter(waiting)

    def fetch(leaf):
        if not isinstance(leaf, Resting):
            return leaf
        if leaf.rest.stacked:
            return _gathered(settings, leaf.rest, leaf.part) if leaf.late else _ahead(settings.wire, leaf)
        return _late(settings, leaf, next(parts)) if leaf.late else leaf.whole

    return jax.tree.map(fetch, tree, is_leaf=_is_resting), x


def gathers(tree: Tree) -> bool:
    """Whether `fetched` would have something to gather."""
    return any(leaf.late for leaf in _resting(tree))


def owned(params: Tree, gradients: Tree) -> Tree:
    """Gradients of `entered` parameters, of those that are whole the part that this device owns."""

    def one(leaf, found):
        if not isinstance(leaf, Resting) or leaf.rest.stacked:
            return found
        return dataclasses.replace(
            leaf, part=_scattered(device_wire(), leaf.rest, found).astype(leaf.part.dtype), whole=None
        )

    return jax.tree.map(one, params, gradients, is_leaf=_is_resting)


def nothing_found(params: Tree) -> Tree:
    """Gradients of `entered` parameters before there is any, as `owned` gives them."""

    def one(leaf):
        return dataclasses.replace(leaf, whole=None) if isinstance(leaf, Resting) else leaf

    return jax.tree.map(jnp.zeros_like, jax.tree.map(one, params, is_leaf=_is_resting))


def summed(settings, gradients: Tree) -> Tree:
    """Gradients summed over the data axes, each device with the parts that it owns.

    Args:
        settings: `Settings` of the run.
        gradients: like parameters, `owned`, as this device found them.
    """
    zero, wire, copies = settings.zero, settings.wire, layout.replicas(settings.placement)

    def one(rest: Rest, leaf):
        found = leaf.part if isinstance(leaf, Resting) else _scattered(wire, rest, leaf)
        done = zero.axes if rest.steps else ()
        return wire.total(found, tuple(axis for axis in copies if axis not in done), "gradients")

    return jax.tree.map(one, zero.rests, gradients, is_leaf=_is_rest)


def _gathered(settings, rest: Rest, leaf):
    """Whole, cast before it travels."""
    leaf = settings.policy.cast(leaf, "weight") if rest.matrix else leaf
    for dim, axis in rest.steps:
        leaf = settings.wire.gather(leaf, leaf.ndim + dim, axis, "parameters at rest")
    return leaf


def _scattered(wire: Wire, rest: Rest, leaf):
    for dim, axis in reversed(rest.steps):
        leaf = wire.scatter(leaf, leaf.ndim + dim, axis, "gradients")
    return leaf


def _own_part(wire: Wire, rest: Rest, leaf):
    for dim, axis in reversed(rest.steps):
        count = leaf.shape[dim] // lax.axis_size(axis)
        leaf = lax.dynamic_slice_in_dim(leaf, wire.index(axis) * count, count, leaf.ndim + dim)
    return leaf


def _ahead(wire: Wire, resting: Resting):
    """What is at hand, with the gradient of the part."""
    like = jax.typeof(resting.part)

    @jax.custom_vjp
    def whole_of(part, whole):
        return whole

    def backward(_, cotangent):
        found = _scattered(wire, resting.rest, cotangent).astype(like.dtype)
        return compat.vary(found, compat.varying_axes(like)), None

    whole_of.defvjp(lambda part, whole: (whole, None), backward)
    return whole_of(resting.part, resting.whole)


def _late(settings, resting: Resting, part):
    """What is gathered now from `part`, with the gradient of the whole, if it is there to have one."""

    def whole_of(part, whole):
        return _gathered(settings, resting.rest, part)

    if resting.whole is None:
        return whole_of(part, None)
    like, gathered = jax.typeof(resting.whole), jax.custom_vjp(whole_of)

    def backward(_, cotangent):  # it varies over what x does, since the gather waited for x
        own = compat.varying_axes(like)
        beyond = tuple(axis for axis in compat.varying_axes(cotangent) if axis not in own)
        return None, compat.vary(settings.wire.total(cotangent, beyond, "gradients").astype(like.dtype), own)

    gathered.defvjp(lambda part, whole: (whole_of(part, whole), None), backward)
    return gathered(part, resting.whole)


def _zeros(resting: Resting):
    """As large as the whole parameter."""
    shape = list(resting.part.shape)
    for dim, axis in resting.rest.steps:
        shape[dim] *= lax.axis_size(axis)
    return compat.vary(jnp.zeros(shape, resting.part.dtype), compat.varying_axes(resting.part))


def _is_rest(node) -> bool:
    return isinstance(node, Rest)


def _is_resting(node) -> bool:
    return isinstance(node, Resting)


def _resting(tree: Tree) -> list[Resting]:
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=_is_resting) if _is_resting(leaf)]
