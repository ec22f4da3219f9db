"""Batch normalization."""

import math

import jax
import jax.numpy as jnp

from jaxpar.core.moments import affine, moved, ranges, refuse_cut, rows, standardized, wide
from jaxpar.core.types import Layer


def batch(
    width: int,
    dims: str = "embed",
    eps: float = 1e-5,
    keep: float = 0.9,
    replicas: int = 1,
    cumulative: bool = False,
    bias: bool = True,
) -> Layer:
    """Shift and scale each feature by the mean and variance of the microbatch, over all devices, or of parts of it.

    Args:
        width: size of the last dim of x, over all devices.
        dims: name of that dim.
        eps: added to the variance, so in units of x squared.
        keep: share of the running statistics that a step keeps; torch's momentum is 1 - keep.
        replicas: into how many runs of consecutive examples the microbatch is cut, each with statistics of its own, as
            on devices that do not talk of them; with as many as the data axis has devices, none are sent for y and its
            gradient. The running statistics are the mean of those of all parts, one small sum.
        cumulative: whether the running statistics are the mean of those of all microbatches; `keep` then counts for
            nothing. Torch's momentum None.
        bias: whether to have a bias.

    Returns:
        A layer from `x[batch, .., width]` to the same shape and dtype. Training normalizes with the biased variance and
        keeps the unbiased one, as torch does; evaluation uses the running statistics, `extra["forward"]`.

    Raises:
        Refused: at trace time, if the parts are not equal.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2.
    """
    ranges("batch", eps=(eps, 0, math.inf), keep=(keep, 0, 1), replicas=(replicas, 1, math.inf))
    init, names = affine(width, dims, bias=bias)

    def start(key):
        running = {"mean": jnp.zeros(width), "variance": jnp.ones(width)}
        return init(), {"forward": running | ({"count": jnp.zeros(())} if cumulative else {})}

    def apply(params, extra, x, ctx):
        over, running = rows(x), extra["forward"]
        if not ctx.train:
            y = (wide(x) - running["mean"]) * jax.lax.rsqrt(running["variance"] + eps)
            return moved(params, y, x.dtype), extra
        refuse_cut("batch", ctx.extent("batch", len(x), beside=dims), replicas)
        y, (mean, variance) = standardized(lambda a: ctx.mean(a, dims, over, {"batch": replicas}), x, params, eps)
        whole = math.prod(ctx.extent(word, n, beside=dims) for word, n in zip(over.split(), x.shape, strict=False))
        count = whole // replicas
        now = {"mean": mean, "variance": variance * count / max(count - 1, 1)}
        if replicas > 1:
            now = {name: ctx.mean(one, dims, "batch", trained=False) for name, one in now.items()}
        if cumulative:
            running = running | {"count": running["count"] + 1}
        share = 1 / running["count"] if cumulative else 1 - keep
        new = {name: (1 - share) * running[name] + share * one.reshape(-1) for name, one in now.items()}
        return y, {"forward": running | new}

    state = {"mean": dims, "variance": dims} | ({"count": ""} if cumulative else {})
    return Layer(start, apply, dims=(names, {"forward": state}))
