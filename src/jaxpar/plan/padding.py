"""The vocabulary is padded up to what the plan splits it into; on disk parameters are unpadded."""

import math

import jax
import jax.numpy as jnp

from jaxpar.plan import layout
from jaxpar.plan.layout import Placement


def parts(placement: Placement) -> int:
    """Into how many parts any array of the model splits its `vocab` dim: their least common multiple."""
    scheme = placement.scheme
    layouts = [
        layout.weight(placement, "vocab embed")[:1],
        layout.weight(placement, "embed vocab")[1:],
        (scheme.inner[1],),
    ]
    return math.lcm(*(layout.size(scheme, axes) for (axes,) in layouts))


def pad(placement: Placement, dims, tree):
    """The tree with each `vocab` dim filled up with zeros to a multiple of `parts`."""
    multiple = parts(placement)

    def one(words, leaf):
        widths = [(0, more) for more in fill(words, leaf.shape, multiple)]
        return jnp.pad(leaf, widths) if any(after for _, after in widths) else leaf

    return jax.tree.map(one, dims, tree)


def fill(words: str, shape: tuple[int, ...], multiple: int) -> list[int]:
    """How many entries each dim of a parameter gains."""
    return [-size % multiple if word == "vocab" else 0 for word, size in zip(words.split(), shape, strict=True)]


def unpad(tree, like):
    """The tree cut back to the shapes of `like`, whose leaves only need a shape."""
    return jax.tree.map(lambda leaf, to: leaf[tuple(slice(0, size) for size in to.shape)], tree, like)
