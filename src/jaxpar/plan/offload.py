"""What rests in the memory of the host between uses, and how it is brought to the device.

jax types every array with the memory that it lies in, so nothing here is told what is offloaded: an array of the host is
seen to be one. A host array takes part in nothing but slices along its first dim and moves, which XLA makes transfers;
arithmetic on it would be done by the host's cores.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpar.core import compat
from jaxpar.core.refuse import near_miss
from jaxpar.core.types import Tree

KINDS = ("parameters", "optimizer", "activations")
NONE = "none"
HOST = "pinned_host"  # jax's name of memory that the device reads and writes by itself
JOINED = "+"


def parse(text: str) -> frozenset[str]:
    """What `plan.offload` names, in any order; the empty set for `none`.

    Raises:
        ValueError: with what to write instead, for a name that is none, one that is given twice, or none at all.
    """
    if text == NONE:
        return frozenset()
    names = text.split(JOINED)
    for name in names:
        if name not in KINDS:
            raise ValueError(f"`{name}` is not among what can be offloaded; {near_miss(name, (*KINDS, NONE))}.")
        if names.count(name) > 1:
            raise ValueError(f"names {name} twice.")
    return frozenset(names)


def on_host(leaf) -> bool:
    """Whether an array, inside `jax.jit`, lies in the memory of the host."""
    return jax.typeof(leaf).memory_space == jax.memory.Space.Host


def to_device(leaf):
    """An array of the host brought to the device; any other as it is."""
    return jax.device_put(leaf, jax.memory.Space.Device) if on_host(leaf) else leaf


def to_where(leaf, like):
    """An array of the device put where `like` lies."""
    return jax.device_put(leaf, jax.memory.Space.Host) if on_host(like) else leaf


def resting(shardings: Tree, shapes: Tree) -> Tree:
    """Shardings of a tree that rests on the host; single numbers, such as counts, stay on the device."""
    return jax.tree.map(lambda one, leaf: one.with_memory_kind(HOST) if leaf.ndim else one, shardings, shapes)


class Hosted(NamedTuple):
    """A parameter of a stack of blocks that rests on the host, as it goes through a model until `brought` brings it to the device.

    A gradient has the type of what it is of, so one of `array` would lie on the host as well, and be added up there.
    It is taken by `shadow` instead.

    Attributes:
        array: the parameter; it has no gradient.
        shadow: zeros in its shape on the device, which nobody reads, so that they are never there.
    """

    array: Any
    shadow: Any


def entered(dims: Tree, params: Tree) -> Tree:
    """Parameters as a step takes them: of those on the host, stacks of blocks as `Hosted`, and the rest brought here.

    What is no stack is read at both ends of a step, or kept from its forward to its backward pass, so that to bring it
    anew would save nothing.

    Args:
        dims: tree of dim strings.
        params: local parts.
    """

    def one(words, leaf):
        if not (on_host(leaf) and words.startswith("layers ")):
            return to_device(leaf)
        return Hosted(leaf, compat.vary(jnp.zeros(leaf.shape, leaf.dtype), compat.varying_axes(leaf)))

    return jax.tree.map(one, dims, params)


def brought(tree: Tree) -> Tree:
    """A tree whose `Hosted` parameters are on the device, ready for use."""
    return jax.tree.map(lambda leaf: _bring(*leaf) if _is_hosted(leaf) else leaf, tree, is_leaf=_is_hosted)


def any_hosted(tree: Tree) -> bool:
    """Whether `brought` would have something to bring."""
    return any(map(_is_hosted, jax.tree.leaves(tree, is_leaf=_is_hosted)))


def apart(tree: Tree) -> tuple[Tree, list]:
    """A tree of parameters with shadows in place of `Hosted`, which is what is differentiated; and the arrays."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_hosted)
    trained = [leaf.shadow if _is_hosted(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, trained), [leaf.array if _is_hosted(leaf) else None for leaf in leaves]


def together(trained: Tree, arrays: list) -> Tree:
    """The inverse of `apart`."""
    leaves, structure = jax.tree.flatten(trained)
    pairs = zip(leaves, arrays, strict=True)
    return jax.tree.unflatten(structure, [leaf if array is None else Hosted(array, leaf) for leaf, array in pairs])


@jax.custom_jvp
def _bring(array, shadow):
    return to_device(array)


@_bring.defjvp
def _bring_jvp(primals, tangents):
    return _bring(*primals), tangents[1]


def _is_hosted(node) -> bool:
    return isinstance(node, Hosted)
