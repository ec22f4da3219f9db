"""Layer normalization."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpar.core.types import Layer


def layer(width: int, dims: str = "embed", eps: float = 1e-5, bias: bool = True) -> Layer:
    """Shift and scale each row to mean 0 and variance 1, then by a learned gain and bias.

    Args:
        width: size of the last dim of x, over all devices.
        dims: name of that dim.
        eps: added to the variance, so in units of x squared.
        bias: whether to have a bias.

    Returns:
        A layer from `x[..., width]` to the same shape and dtype; statistics in float32, in two passes, since a mean of
        squares less the square of the mean loses digits.

    Source: Ba et al. 2016, arXiv:1607.06450, eq. 4.
    """

    def init(key):
        params = {"gain": jnp.ones(width)}
        return (params | {"bias": jnp.zeros(width)} if bias else params), {}

    def apply(params, extra, x, ctx):
        centred = x.astype(jnp.float32)
        centred = centred - ctx.mean(centred, dims)
        y = centred * jax.lax.rsqrt(ctx.mean(centred**2, dims) + eps) * params["gain"]
        return checkpoint_name((y + params["bias"] if bias else y).astype(x.dtype), "norm"), extra

    return Layer(init, apply, dims=({"gain": dims} | ({"bias": dims} if bias else {}), {}))
