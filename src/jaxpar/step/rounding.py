"""Weights that are stored in few bits: what is added to them is rounded so that they stay on their format's grid."""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxpar.core import compat, formats
from jaxpar.core.formats import Format
from jaxpar.core.types import Tree
from jaxpar.plan import padding

SITE = zlib.crc32(b"rounding of updates")  # beside that of dropout, drawn from the same seed


class Origin(NamedTuple):
    """Where the rows of parameters come from, so that random bits follow them and not the places they lie at.

    Attributes:
        words: dims of each leaf, `Layer.dims[0]`.
        shapes: what has the shape of each leaf on disk, without padding.
        stack: `Placement.stack`: the layer at each place of the `layers` dim; empty where they are in order.
    """

    words: Tree
    shapes: Tree
    stack: tuple[int, ...] = ()


class RoundingState(NamedTuple):
    """State of `rounded`: `count`, int32: updates done."""

    count: jax.Array


def rounded(
    fmt: Format, stochastic: bool = True, seed: int = 0, origin: Origin | None = None
) -> optax.GradientTransformation:
    """The last link of a chain: an update u of a parameter p becomes q - p, with q = p + u rounded onto the grid.

    `optax.apply_updates` then gives q to the last bit. Numbers beyond the largest become the largest.

    Random bits depend on (seed, count of updates, name of the leaf, index of the entry on disk) alone: not on the
    mesh, on padding or on where a pipeline has its layers; so copies stay equal. It works on global arrays.

    Args:
        fmt: of the parameters, on whose grid they must lie already; their dtype may be float32 or a smaller one.
        stochastic: round up or down at random, so that small updates count on average; else to nearest.
        seed: of the run.
        origin: of the parameters; None if they lie as on disk.

    Source: Wang et al. 2018, arXiv:1812.08011, section 2.4; Gupta et al. 2015, arXiv:1502.02551, section 3.
    """

    def init(params):
        return RoundingState(jnp.int32(0))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(f"rounding to {fmt.name} needs the parameters: call update(updates, state, params).")
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(np.uint32(seed)), SITE), state.count)

        def one(path, u, p, words, like):
            p = p.astype(jnp.float32)
            wanted = p + u.astype(jnp.float32)
            if not stochastic:
                return _step(p, formats.nearest(wanted, fmt), fmt)
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            high, low = counters(p.shape, like.shape, _layers(words, origin))
            return _step(p, formats.stochastic(wanted, fmt, compat.random_bits(own, high, low)), fmt)

        words, shapes = origin[:2] if origin else (jax.tree.map(lambda p: "", params), params)
        return jax.tree_util.tree_map_with_path(one, updates, params, words, shapes), RoundingState(state.count + 1)

    return optax.GradientTransformation(init, update)


def _step(p, q, fmt: Format):
    """What added to p gives q in float32, or the number of the format beside it.

    q - p is exact unless p has bits below the last one of q as a float32, and those are lost again in p + (q - p). But
    if q is a power of two, thousands of times as large as p and of the other sign, the sum is just below q, where
    float32 is twice as fine: it may be that nothing added to p gives q. Then its neighbour towards zero is taken.
    """
    q = jnp.where(p + (q - p) == q, q, q * np.float32(1 - 2.0 ** -(fmt.mantissa + 1)))
    return q - p


def _layers(words: str, origin: Origin | None) -> tuple[int, ...]:
    return origin.stack if origin and padding.moves(origin.stack, words) else ()


def counters(shape: tuple[int, ...], on_disk: tuple[int, ...], rows: tuple[int, ...] = ()):
    """Two uint32 counters per entry: its index on disk, that of the first half of dims and that of the others.

    What is padding there has the counters of some other entry, and holds zeros.

    Args:
        shape: as it lies.
        on_disk: without padding.
        rows: of the first dim, the index on disk of each; by default they are in order.
    """
    words = [jnp.zeros(shape, jnp.uint32)] * 2
    for dim, count in enumerate(on_disk):
        index = lax.broadcasted_iota(jnp.uint32, shape, dim)
        if rows and dim == 0:
            index = jnp.asarray(np.array(rows, np.int32).astype(np.uint32))[index]
        word = int(2 * dim >= len(shape))
        words[word] = words[word] * np.uint32(count) + index
    return words
