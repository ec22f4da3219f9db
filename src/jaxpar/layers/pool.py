"""Pooling over height and width (and depth); no device holds a part of these, so nothing is sent but by whole means.

Windows are slices that are taken together, along one dim after the other. XLA's own windows know the gradient of a
largest entry only as a scatter, for which its compiler for CPUs writes down the place of every entry.
"""

from collections.abc import Callable
from functools import reduce
from operator import add

import jax.numpy as jnp
from jax import lax

from jaxpar.core.moments import wide
from jaxpar.core.parts import function
from jaxpar.core.types import Layer


def max_pool(window: int, strides: int | None = None, padding: str | int = "VALID") -> Layer:
    """The largest entry of each window.

    Args:
        window: sides of a window.
        strides: step between windows; by default they do not overlap.
        padding: entries around x that are less than any: `"SAME"`: as many as keep size / strides, so that nothing is
            left over; `"VALID"`: none; or how many on each side.
    """
    return function(lambda x, ctx: largest(x, window, strides, padding))


def largest(x, window: int, strides: int | None = None, padding: str | int = "VALID"):
    """As `max_pool`, of `x[batch, height, width, channels]` or with a depth before height.

    Of several equal entries the first one has the gradient, in the order in which they lie in memory.
    """
    return _together(x, window, strides or window, padding, -jnp.inf, _larger)


def average_pool(window: int, strides: int | None = None) -> Layer:
    """The mean of each window that lies within x, added up in float32; arguments as of `max_pool`."""

    def apply(x, ctx):
        sums = _together(wide(x), window, strides or window, "VALID", 0, add)
        return (sums / window ** (x.ndim - 2)).astype(x.dtype)

    return function(apply)


def global_average(dims: str = "embed") -> Layer:
    """From `x[batch, height, width, channels]` to the mean over height and width, `y[batch, channels]`."""
    return function(lambda x, ctx: ctx.mean(x, dims, "height width")[:, 0, 0])


def _larger(first, second):
    """The larger one, the first if they are equal; what is no number stays none."""
    return jnp.where((second > first) | (second != second), second, first)


def _together(x, window: int, strides: int, padding: str | int, fill: float, join: Callable):
    """The entries of each window joined, along the last dim of space first."""
    for dim in reversed(range(1, x.ndim - 1)):
        low, high = _around(x.shape[dim], window, strides, padding)
        around = [(low, high, 0) if one == dim else (0, 0, 0) for one in range(x.ndim)]
        x = lax.pad(x, jnp.asarray(fill, x.dtype), around) if low or high else x
        span = (x.shape[dim] - window) // strides * strides + 1
        parts = [lax.slice_in_dim(x, start, start + span, strides, dim) for start in range(window)]
        x = reduce(join, parts)
    return x


def _around(size: int, window: int, strides: int, padding: str | int) -> tuple[int, int]:
    """How many entries are filled in before and behind a dim."""
    if padding == "SAME":
        missing = max(0, (-(-size // strides) - 1) * strides + window - size)
        return missing // 2, missing - missing // 2
    return (0, 0) if padding == "VALID" else (int(padding),) * 2
