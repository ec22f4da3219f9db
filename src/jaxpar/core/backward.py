"""State without gradient: a forward half, and a backward half, whose new value is the cotangent of the old one.

A loop over time that carries the backward half takes it against time by itself: what each position leaves is what the
position before it begins with. What is carried forward has no meaning; so it is zeros.
"""

import jax
import jax.numpy as jnp

from jaxpar.core import compat
from jaxpar.core.types import Tree


def halves(extra: Tree) -> tuple[Tree, Tree]:
    """The forward and the backward half of state without gradient; each has None where the other has its own."""

    def backward(path):
        return any(getattr(step, "key", None) == "backward" for step in path)

    one = jax.tree_util.tree_map_with_path(lambda path, leaf: None if backward(path) else leaf, extra)
    other = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf if backward(path) else None, extra)
    return one, other


def merged(forward: Tree, backward: Tree) -> Tree:
    """The state whose halves these are."""
    return jax.tree.map(lambda a, b: b if a is None else a, forward, backward, is_leaf=lambda leaf: leaf is None)


@jax.custom_vjp
def begun(state):
    """Zeros in place of the state of a backward pass, for a loop to carry: only their cotangent, the state, counts.

    So nothing that the loop keeps has read the state, which another microbatch may change before the way back.
    """
    return jax.tree.map(lambda leaf: compat.vary(jnp.zeros_like(leaf), compat.varying_axes(leaf)), state)


begun.defvjp(lambda state: (begun(state), None), lambda _, cotangent: (cotangent,))


@jax.custom_vjp
def ended(h, carried, control):
    """(h, the state), behind the loop; back, the loop begins with it, or with what a later use has made of it.

    Args:
        h: what the loop made: its gradient is what sets the way back going.
        carried: what came out of the loop in place of `control`.
        control: the backward half, in which each norm has the number of its `passes`.
    """
    return h, control


def _ended_back(control, cotangents):
    dh, later = cotangents

    def newest(later, stored):
        return jax.tree.map(lambda new, old: jnp.where(later["passes"] > 0, new, old), later, stored)

    def whole(tree):
        return isinstance(tree, dict) and "passes" in tree

    return dh, jax.tree.map(newest, later, control, is_leaf=whole), None


ended.defvjp(lambda h, carried, control: ((h, control), control), _ended_back)
