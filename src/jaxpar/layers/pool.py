"""Pooling over height and width (and depth); no device holds a part of these, so nothing is sent but by whole means."""

import math

import jax.numpy as jnp
from jax import lax

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
    """As `max_pool`, of `x[batch, height, width, channels]` or with a depth before height."""
    sides, steps, padding = _windows(x.ndim, window, strides, padding)
    return lax.reduce_window(x, -jnp.inf, lax.max, sides, steps, padding)


def average_pool(window: int, strides: int | None = None) -> Layer:
    """The mean of each window that lies within x, added up in float32; arguments as of `max_pool`."""

    def apply(x, ctx):
        sides, steps, padding = _windows(x.ndim, window, strides, "VALID")
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        sums = lax.reduce_window(wide, 0.0, lax.add, sides, steps, padding)
        return (sums / math.prod(sides)).astype(x.dtype)

    return function(apply)


def global_average(dims: str = "embed") -> Layer:
    """From `x[batch, height, width, channels]` to the mean over height and width, `y[batch, channels]`."""
    return function(lambda x, ctx: ctx.mean(x, dims, "height width")[:, 0, 0])


def _windows(rank: int, window: int, strides: int | None, padding: str | int) -> tuple:
    """Sides, steps and padding of each dim."""
    sides, steps = ((1, *(length,) * (rank - 2), 1) for length in (window, strides or window))
    return sides, steps, padding if isinstance(padding, str) else [(0, 0), *[(padding, padding)] * (rank - 2), (0, 0)]
