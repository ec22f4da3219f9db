"""Batch normalization."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpar.core.types import Layer


def batch(width: int, dims: str = "embed", eps: float = 1e-5, keep: float = 0.9, bias: bool = True) -> Layer:
    """Shift and scale each feature by the mean and variance of the whole microbatch, over all devices.

    Args:
        width: size of the last dim of x, over all devices.
        dims: name of that dim.
        eps: added to the variance, so in units of x squared.
        keep: share of the running statistics that a step keeps; torch's momentum is 1 - keep.
        bias: whether to have a bias.

    Returns:
        A layer from `x[batch, .., width]` to the same shape and dtype. Training normalizes with the biased variance and
        keeps the unbiased one, as torch does; evaluation uses the running statistics, `extra["forward"]`.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2.
    """

    def init(key):
        params = {"gain": jnp.ones(width)} | ({"bias": jnp.zeros(width)} if bias else {})
        return params, {"forward": {"mean": jnp.zeros(width), "variance": jnp.ones(width)}}

    def apply(params, extra, x, ctx):
        over = {2: "batch", 3: "batch context", 4: "batch height width"}[x.ndim]
        centred, running = x.astype(jnp.float32), extra["forward"]
        if ctx.train:
            mean = ctx.mean(centred, dims, over)
            centred = centred - mean
            variance = ctx.mean(centred**2, dims, over)
            count = math.prod(ctx.extent(word, n, beside=dims) for word, n in zip(over.split(), x.shape, strict=False))
            new = {"mean": mean, "variance": variance * count / max(count - 1, 1)}
            new = jax.tree.map(lambda now: jax.lax.stop_gradient(now).reshape(-1), new)
            extra = {"forward": jax.tree.map(lambda old, now: keep * old + (1 - keep) * now, running, new)}
        else:
            centred, variance = centred - running["mean"], running["variance"]
        y = centred * jax.lax.rsqrt(variance + eps) * params["gain"]
        return checkpoint_name((y + params["bias"] if bias else y).astype(x.dtype), "norm"), extra

    names = {"gain": dims} | ({"bias": dims} if bias else {})
    return Layer(init, apply, dims=(names, {"forward": {"mean": dims, "variance": dims}}))
