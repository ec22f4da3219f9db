"""What travels between pipeline stages: any tree of arrays, such as a map and those that a later stage joins to it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpar.core import compat
from jaxpar.core.types import Tree


class Boundary(NamedTuple):
    """How all stages send what they give: a message is a tuple of arrays, of the same shapes at every boundary.

    If all stages give arrays of the same shapes, these are sent as they are; else all that a stage gives is sent as one
    flat array, filled up to the longest.

    Attributes:
        shapes: of the arrays of a message.
        dtype: of all of them.
        axes: mesh axes over which they vary.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: Any
    axes: tuple[str, ...]

    def send(self, y: Tree) -> tuple:
        """`y` as a message."""
        leaves = [leaf.astype(self.dtype) for leaf in jax.tree.leaves(y)]
        if tuple(leaf.shape for leaf in leaves) != self.shapes:
            flat = jnp.concatenate([leaf.reshape(-1) for leaf in leaves]) if len(leaves) > 1 else leaves[0].reshape(-1)
            leaves = [jnp.pad(flat, (0, self.shapes[0][0] - flat.size))]
        return tuple(compat.vary(leaf, self.axes) for leaf in leaves)

    def receive(self, message: tuple, like: Tree) -> Tree:
        """A message as what the stage before gave, a tree like `like`."""
        leaves, structure = jax.tree.flatten(like)
        if tuple(leaf.shape for leaf in leaves) != self.shapes:
            (flat,), start, message = message, 0, []
            for leaf in leaves:
                message.append(flat[start : start + leaf.size].reshape(leaf.shape))
                start += leaf.size
        whole = [one.astype(leaf.dtype) for one, leaf in zip(message, leaves, strict=True)]
        return jax.tree.unflatten(structure, whole)

    def nothing(self) -> tuple:
        """A message of zeros."""
        return tuple(compat.vary(jnp.zeros(shape, self.dtype), self.axes) for shape in self.shapes)


def boundary(given: Sequence[Tree], axes: tuple[str, ...]) -> Boundary:
    """The boundary of stages that give trees of these shapes and vary over `axes`."""
    trees = [jax.tree.leaves(one) for one in given]
    shapes = {tuple(leaf.shape for leaf in leaves) for leaves in trees}
    if len(shapes) > 1:
        shapes = {((max(sum(math.prod(shape) for shape in one) for one in shapes),),)}
    return Boundary(shapes.pop(), jnp.result_type(*(leaf.dtype for leaves in trees for leaf in leaves)), axes)
