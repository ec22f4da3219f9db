"""Convolutions on images and volumes, channels last."""

import itertools
import math

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpar.core.parts import broadened, normal
from jaxpar.core.types import Layer


def conv(
    into: int,
    out: int,
    dims: str,
    *,
    window: int | tuple[int, ...] = 3,
    strides: int = 1,
    padding: str | int = "SAME",
    space: int = 2,
) -> Layer:
    """A convolution without bias.

    Args:
        into: channels of x, over all devices.
        out: channels of y, over all devices.
        dims: names of the two, such as `"embed channels"`.
        window: sides of the kernel; one number for all.
        strides: step between outputs.
        padding: zeros around x: `"SAME"`: as many as keep size / strides; `"VALID"`: none; or how many on each side.
        space: dims of space: 2 for images, 3 for volumes.

    Returns:
        A layer from `x[batch, height, width, into]` to `y[batch, height, width, out]`, or with a depth before height.

    Source: initial weights of He et al. 2015, arXiv:1502.01852, eq. 10.
    """
    sides = (window,) * space if isinstance(window, int) else window

    def init(key):
        return {"kernel": normal(key, (*sides, into, out), math.sqrt(2 / (math.prod(sides) * into)))}, {}

    def apply(params, extra, x, ctx):
        return checkpoint_name(ctx.conv(x, params["kernel"], dims, strides, padding), "conv"), extra

    return Layer(init, apply, dims=({"kernel": "- " * len(sides) + dims}, {}))


def up_conv(into: int, out: int, dims: str, *, space: int = 2) -> Layer:
    """A transposed convolution with bias, whose window and strides are 2: each entry of x becomes a square of y.

    Squares do not overlap, so it is a product with a matrix and then a change of shape. Columns of the matrix are by
    channel of y first and by place in the square last, so that a device holds whole channels.

    Args:
        into: channels of x, over all devices.
        out: channels of y, over all devices.
        dims: names of the two.
        space: dims of space: 2 for images, 3 for volumes.

    Returns:
        A layer from `x[batch, height, width, into]` to `y[batch, 2 height, 2 width, out]`, or with a depth as well.

    Source: Ronneberger et al. 2015, arXiv:1505.04597, section 2.
    """

    def init(key):
        return {"weight": normal(key, (into, out * 2**space), math.sqrt(2 / into)), "bias": jnp.zeros(out)}, {}

    def apply(params, extra, x, ctx):
        y = ctx.dot(x, params["weight"], dims)
        batch, *sides, columns = y.shape
        y = y.reshape(batch, *sides, columns // 2**space, *[2] * space)
        order = [0, *(place for dim in range(space) for place in (1 + dim, 2 + space + dim)), 1 + space]
        y = y.transpose(order).reshape(batch, *(2 * side for side in sides), -1)
        return checkpoint_name(broadened(y, params["bias"]), "conv"), extra

    return Layer(init, apply, dims=({"weight": dims, "bias": dims.split()[1]}, {}))


def turns(count: int) -> list[str]:
    """Dims of `count` products in a row, from whole features, outer and inner in turn, to `embed`, as a head reads it.

    So each is an up or a down projection, for which schemes have the fewest moves.
    """
    words = ["-", *("embed" if (count - n) % 2 else "channels" for n in range(count))]
    return [f"{into} {out}" for into, out in itertools.pairwise(words)]
