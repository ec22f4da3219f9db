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

    def layout(self, stage: int, since: int) -> Layout:
        """Where what is split `since` some stage lies at a stage: 1 is the optimizer's state, 2 gradients, 3 itself."""
        return self.stored if stage >= since else self.used


class Zero(NamedTuple):
    """The ZeRO of a run.

    Attributes:
        stage: 0 to 3.
        once: whether stage 3 gathers parameters once per step, rather than for each block, forward and back.
        axes: over which state is split.
        rests: a `Rest` for each parameter.
    """

    stage: int
    once: bool
    axes: Axes
    rests: Tree

    def layouts(self, since: int) -> Tree:
        """`Rest.layout` of each parameter."""
        return jax.tree.map(lambda one: one.layout(self.stage, since), self.rests, is_leaf=_is_rest)

    def leaves(self) -> list[Rest]:
        """All rests, in the order of the parameters."""
        return jax.tree.leaves(self.rests, is_leaf=_is_rest)


@partial(jax.tree_util.register_dataclass, data_fields=["part", "whole"], meta_fields=["rest"])
@dataclasses.dataclass(frozen=True)
class Resting:
    """A parameter that rests in parts, as it goes through a model until `fetched` makes it whole.

    In a stack of blocks each block scatters its gradient, which is that of `part`. Elsewhere gradients are those of the
    whole, and `owned` scatters them: several parts of a model may read one table, whose gradients are summed first.

    Attributes:
        part: what this device holds of it.
        whole: all of it, if it is at hand.
        rest: how it rests; dims are counted from the last, so a slice of a stack of layers rests alike.
    """

    part: Any
    whole: Any
    rest: Rest


NONE = Zero(0, False, (), None)


def zero_of(plan: Plan, placement: Placement, dims: Tree, shapes: Tree) -> Zero:
    """The ZeRO that a plan asks for.

    Args:
        plan: `zero`, `zero_group` and `regather`.
        placement: where parameters lie without it.
        dims: tree of dim strings.
        shapes: tree of what has a shape: that on disk.

    Source: Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, section 5; Zhang et al. 2022 (MiCS), arXiv:2205.00119,
        section 3.2, for `zero_group`.
    """
    axes = _axes(plan, placement)
    rests = jax.tree.map(lambda words, leaf: _rest(placement, words, leaf.shape, axes), dims, shapes)
    return Zero(plan.zero, not plan.regather, axes, rests)


def _axes(plan: Plan, placement: Placement) -> Axes:
    """All axes that hold copies, those of a scheme as well; but of a group only those of the data axis."""
    if not plan.zero:
        return ()
    copies = layout.replicas(placement)
    if not plan.zero_group:
        return copies
    return (layout.GROUP if layout.GROUP in copies else "data",)


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
            return Resting(_own_part(wire, rest, leaf), leaf, rest)
        return Resting(leaf, _gathered(settings, rest, leaf) if zero.once else None, rest)

    return params if zero.rests is None else jax.tree.map(enter, zero.rests, params, is_leaf=_is_rest)


def apart(settings, tree: Tree) -> tuple[Tree, Tree]:
    """What of `entered` parameters gradients are taken of, and what else is known of them.

    Outside of a stack parameters are made whole here, once for all that read them. To gather them part by part, and
    again in the backward pass, would be in vain: XLA makes one of equal gathers that stand in no loop.
    """
    gathered: dict[int, Any] = {}

    def trained(leaf):
        if not isinstance(leaf, Resting):
            return leaf
        if leaf.rest.stacked:
            return dataclasses.replace(leaf, whole=None)
        if leaf.whole is not None:
            return leaf.whole
        if id(leaf.part) not in gathered:
            gathered[id(leaf.part)] = _gathered(settings, leaf.rest, leaf.part)
        return gathered[id(leaf.part)]

    def other(leaf):
        return leaf.whole if isinstance(leaf, Resting) and leaf.rest.stacked else None

    return tuple(jax.tree.map(one, tree, is_leaf=_is_resting) for one in (trained, other))


def together(trained: Tree, other: Tree) -> Tree:
    """The inverse of `apart`, parameters outside of stacks whole."""

    def one(leaf, whole):
        return dataclasses.replace(leaf, whole=whole) if isinstance(leaf, Resting) else leaf

    return jax.tree.map(one, trained, other, is_leaf=_is_resting)


def fetched(settings, tree: Tree) -> Tree:
    """A tree whose `Resting` leaves are whole.

    Args:
        settings: `Settings` of the run.
        tree: parameters of one block of a stack, or of a part that is no stack.
    """

    def fetch(leaf):
        if not isinstance(leaf, Resting):
            return leaf
        return _gathered(settings, leaf.rest, leaf.part) if leaf.whole is None else _at_hand(settings.wire, leaf)

    return jax.tree.map(fetch, tree, is_leaf=_is_resting)


def gathers(tree: Tree) -> bool:
    """Whether `fetched` would have something to gather."""
    leaves = jax.tree.leaves(tree, is_leaf=_is_resting)
    return any(_is_resting(leaf) and leaf.whole is None for leaf in leaves)


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
    if zero.rests is None:
        return jax.tree.map(lambda leaf: wire.total(leaf, copies, "gradients"), gradients)

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


def _at_hand(wire: Wire, resting: Resting):
    """The whole, with the gradient of the part."""
    like = jax.typeof(resting.part)

    @jax.custom_vjp
    def whole_of(part, whole):
        return whole

    def backward(_, cotangent):
        found = _scattered(wire, resting.rest, cotangent).astype(like.dtype)
        return compat.vary(found, compat.varying_axes(like)), None

    whole_of.defvjp(lambda part, whole: (whole, None), backward)
    return whole_of(resting.part, resting.whole)


def _is_rest(node) -> bool:
    return isinstance(node, Rest)


def _is_resting(node) -> bool:
    return isinstance(node, Resting)
