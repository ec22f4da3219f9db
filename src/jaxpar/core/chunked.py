"""Sums that are kept in few bits while they grow: in chunks, and then over the chunks' sums.

No hardware is asked to do so: products are taken one by one along the contraction, and the sum is rounded after each.
Source: Wang et al. 2018, arXiv:1812.08011, section 2.3, figure 3a: the error of a sum of N grows as N / chunk + chunk
instead of as N.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from jaxpar.core import compat
from jaxpar.core.formats import Format, nearest


def total(x, chunk: int, fmt: Format):
    """Sums over the last dim, in order.

    Args:
        x: float32 `[..., count]`, on the format's grid or not.
        chunk: how many are added up before their sum is added to that of the chunks before; the last may have fewer.
        fmt: of every sum, rounded to nearest; what is too large becomes an infinity or NaN.

    Returns:
        float32 `[...]`.
    """
    return _chunked(lambda x: x, (jnp.moveaxis(x, -1, 0),), x.shape[:-1], chunk, fmt)


def matmul(a, b, chunk: int, fmt: Format):
    """`a @ b`; each product is exact, as in a multiply-add unit, if a's and b's mantissas have 24 bits together.

    Sums are float32 before they are rounded. That is one rounding as long as the product has no more bits than sums do
    (the 2 + 1 times 2 + 1 of e5m2), and almost always else.

    Args:
        a: `[m, k]`, float32 or smaller.
        b: `[k, n]`.
        chunk, fmt: as of `total`.

    Returns:
        float32 `[m, n]`, beside which one more array of that size is held.
    """

    def product(row, column):  # a product of matrices, so that it is counted as one; XLA for CPU makes no call of it
        return lax.dot(row[:, None], column[None], precision=lax.Precision.HIGHEST)

    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return _chunked(product, (a.T, b), (a.shape[0], b.shape[1]), chunk, fmt)


def _chunked(term: Callable, operands: tuple, shape: tuple[int, ...], chunk: int, fmt: Format):
    """The sum of `term(*rows)`, of the given shape, over rows of the operands."""
    count = operands[0].shape[0]
    chunk = max(1, min(chunk, count))
    axes = sorted({axis for a in operands for axis in compat.varying_axes(a)})
    zero = compat.vary(jnp.zeros(shape, jnp.float32), axes)

    def add(total, rows):  # one at a time: XLA for CPU makes slower kernels of several
        return nearest(total + term(*rows), fmt, saturate=False), None

    def add_chunk(total, rows):
        return nearest(total + lax.scan(add, zero, rows)[0], fmt, saturate=False), None

    def cut(a):  # zeros at the end change no sum
        a = jnp.pad(a, ((0, -count % chunk), *[(0, 0)] * (a.ndim - 1)))
        return a.reshape(-1, chunk, *a.shape[1:])

    return lax.scan(add_chunk, zero, tuple(map(cut, operands)))[0]
