"""Operands in blocks along the contraction, each with a scale of its own, and the product of such matrices.

Source: DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.core.amax import limit
from jaxpar.core.formats import cast
from jaxpar.core.policy import Operand, bits

BLOCK = 128  # features


def size_of(count: int, parts: int) -> int:
    """Entries of a dim, of which this device has `count` and all have `parts` times as many, that share a scale.

    Raises:
        ValueError: if devices would cut a block, but for one that is all of a short dim (then they share it).
    """
    if count * parts <= BLOCK:
        return count
    if parts > 1 and count % BLOCK:
        raise ValueError(f"{parts} devices hold {count} entries each, which blocks of {BLOCK} do not divide.")
    return BLOCK


def blocked(a, sizes: tuple[int, ...], dtype, largest=lambda amax: amax) -> tuple:
    """An array in blocks of `sizes`, one size per dim; the last block of a dim may be shorter.

    Scales are powers of two, so that a block may be laid out anew, or made bfloat16, without a second rounding: what it
    costs is a bit of range at most. Blocks with infinities have the scale NaN, so that these are seen.

    Args:
        a: any array.
        sizes: as many as dims, each at most the dim.
        dtype: of 8 bits.
        largest: `largest(amax)`: the same shared with devices that hold other parts of these blocks.

    Returns:
        The array in `dtype`, and its scales: float32, a dim being that of `a` over its size, rounded up.
    """
    a = a.astype(jnp.float32)
    amax = largest(_over_blocks(jnp.abs(a), sizes))
    _, exponent = jnp.frexp(amax * (1.0 / limit(dtype)))  # in [2^(e-1), 2^e)
    scale = jnp.ldexp(jnp.ones_like(amax), jnp.clip(exponent, -100, 120))
    scale = jnp.where(amax > 0, scale, 1.0)
    array = cast(a / spread(scale, a.shape), dtype)
    return array, jnp.where(jnp.isfinite(amax), scale, jnp.nan)


def _over_blocks(a, sizes: tuple[int, ...]):
    """The largest entry of each block of an array without negative entries."""
    for dim, size in enumerate(sizes):
        if size > 1:
            short = -a.shape[dim] % size
            a = jnp.pad(a, [(0, short if d == dim else 0) for d in range(a.ndim)]) if short else a
            a = a.reshape(*a.shape[:dim], -1, size, *a.shape[dim + 1 :]).max(dim + 1)
    return a


def spread(scale, shape: tuple[int, ...]):
    """A scale for each entry of an array of this shape, or 1 along dims in which all entries share theirs."""
    for dim, count in enumerate(shape):
        if scale.shape[dim] not in (1, count):
            scale = lax.slice_in_dim(jnp.repeat(scale, BLOCK, axis=dim), 0, count, axis=dim)
    return scale


def whole(operand: Operand, dtype):
    """The array that an operand stands for."""
    if operand.scale is None:
        return operand.values.astype(dtype)
    return (operand.values.astype(jnp.float32) * spread(operand.scale, operand.array.shape)).astype(dtype)


def regrouped(operand: Operand, dim: int) -> Operand:
    """A matrix with a scale for each 128 of its entries along `dim`, and for each entry along the other."""
    a = whole(operand, jnp.float32)
    sizes = tuple(min(BLOCK, a.shape[d]) if d == dim else 1 for d in (0, 1))
    return bits(*blocked(a, sizes, operand.format))


def product(multiply, a: Operand, b: Operand):
    """The product of two matrices in 8 bits whose scales go along with blocks of the contraction, in float32.

    The product of each block is accumulated by the hardware, and scaled and added in float32: in exact order, one block
    after the other, as in section 3.3.2, which does so in the registers of one kernel. Where an operand has a scale for
    each entry of the contraction, both are laid out anew (`regrouped`).
    """
    length = a.array.shape[1]
    if length > 1 and length in (a.scale.shape[1], b.scale.shape[0]):
        a, b = regrouped(a, 1), regrouped(b, 0)
    count = max(a.scale.shape[1], b.scale.shape[0])
    size = BLOCK if count > 1 else length
    wide = spread(b.scale, (b.scale.shape[0], b.array.shape[1]))
    tall = spread(a.scale, (a.array.shape[0], a.scale.shape[1]))

    def one(a, b, tall, wide):
        return multiply(a, b, jnp.float32) * tall[:, None] * wide[None]

    def parts(array, scale):
        """Blocks of the first dim, and their scales."""
        short = count * size - length
        array = jnp.pad(array, ((0, short), (0, 0))) if short else array
        return array.reshape(count, size, -1), jnp.broadcast_to(scale, (count, scale.shape[1]))

    xs = (*parts(a.values.T, tall.T), *parts(b.values, wide))
    first, rest = (jax.tree.map(lambda leaf, at=at: leaf[at], xs) for at in (0, slice(1, None)))

    def add(total, xs):
        a, tall, b, wide = xs
        return total + one(a.T, b, tall, wide), None

    a, tall, b, wide = first
    total = one(a.T, b, tall, wide)
    return lax.scan(add, total, rest)[0] if count > 1 else total
