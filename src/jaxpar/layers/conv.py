"""Convolutions on images, channels last."""

import math

from jax.ad_checkpoint import checkpoint_name

from jaxpar.core.parts import normal
from jaxpar.core.types import Layer


def conv(into: int, out: int, dims: str, *, window: int = 3, strides: int = 1) -> Layer:
    """A window x window convolution without bias, zero-padded to keep size / strides.

    Args:
        into: channels of x, over all devices.
        out: channels of y, over all devices.
        dims: names of the two, such as `"embed channels"`.
        window: height and width of the kernel.
        strides: step between outputs.

    Returns:
        A layer from `x[batch, height, width, into]` to `y[batch, height/strides, width/strides, out]`.

    Source: initial weights of He et al. 2015, arXiv:1502.01852, eq. 10.
    """

    def init(key):
        return {"kernel": normal(key, (window, window, into, out), math.sqrt(2 / (window * window * into)))}, {}

    def apply(params, extra, x, ctx):
        return checkpoint_name(ctx.conv(x, params["kernel"], dims, strides), "conv"), extra

    return Layer(init, apply, dims=({"kernel": f"- - {dims}"}, {}))
