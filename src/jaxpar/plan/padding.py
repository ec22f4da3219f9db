"""Between disk and devices: the vocabulary is padded, and layers lie where a pipeline has their stages.

On disk every parameter has the model's own shape, and layers are in order. On devices the `vocab` dims are filled up
with zeros to what the plan splits them into; and a leading `layers` dim has the places of `Placement.stack`, some of
which may be filler: rows of zeros, which take part in nothing, so that their gradients are zero and they stay zeros.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.plan import layout
from jaxpar.plan.layout import FILLER, Placement


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
    """The tree as it lies on devices: layers in the places of the stack, each `vocab` dim a multiple of `parts`."""

    def one(words, leaf):
        return laid(placement.stack, words, leaf, shape(placement, words, leaf.shape))

    return jax.tree.map(one, dims, tree)


def unpad(placement: Placement, dims, tree, like):
    """The tree as it lies on disk: what `pad` was given. The leaves of `like` only need a shape: that on disk."""
    return jax.tree.map(lambda words, leaf, to: stored(placement.stack, words, leaf, to.shape), dims, tree, like)


def shape(placement: Placement, words: str, on_disk: tuple[int, ...]) -> tuple[int, ...]:
    """The shape on devices of a parameter that has the shape `on_disk` there."""
    multiple, stack = parts(placement), placement.stack
    sizes = zip(words.split(), on_disk, strict=True)
    filled = tuple(size + (-size % multiple if word == "vocab" else 0) for word, size in sizes)
    return (len(stack), *filled[1:]) if _is_stacked(stack, words) else filled


def moves(stack: tuple[int, ...], words: str) -> bool:
    """Whether the layers of a parameter lie on devices in another order than on disk, or with filler among them."""
    return _is_stacked(stack, words) and stack != tuple(range(len(stack)))


def laid(stack: tuple[int, ...], words: str, leaf, wanted: tuple[int, ...]):
    """One leaf of a State, from disk to devices.

    Args:
        stack: as in `Placement`.
        words: of its dims; empty for a leaf that follows no parameter, which is only filled up.
        leaf: as on disk, an array of numpy or jax.
        wanted: its shape on devices.

    Raises:
        ValueError: if the leaf has another number of layers than the stack.
    """
    if moves(stack, words):
        layers = max(stack) + 1
        if leaf.shape[0] != layers:
            raise ValueError(f"{words!r}: a leaf of {leaf.shape[0]} layers, but the stack {stack} has {layers}.")
        filled = _fill(leaf, (layers + 1, *leaf.shape[1:]))  # FILLER = -1 picks the row of zeros
        leaf = filled[np.array(stack)]
    return _fill(leaf, wanted)


def stored(stack: tuple[int, ...], words: str, leaf, wanted: tuple[int, ...]):
    """The inverse of `laid`; `wanted` is the shape on disk."""
    if moves(stack, words):
        places = {layer: place for place, layer in enumerate(stack) if layer != FILLER}
        leaf = leaf[np.array([places[layer] for layer in range(len(places))])]
    return leaf[tuple(map(slice, wanted))]


def _is_stacked(stack: tuple[int, ...], words: str) -> bool:
    return bool(stack) and words.split()[:1] == ["layers"]


def _fill(leaf, wanted: tuple[int, ...]):
    """`leaf` with zeros behind its entries; numpy stays on the host."""
    widths = [(0, size - there) for size, there in zip(wanted, leaf.shape, strict=True)]
    if not any(after for _, after in widths):
        return leaf
    return (np if isinstance(leaf, np.ndarray) else jnp).pad(leaf, widths)
