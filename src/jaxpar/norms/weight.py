"""Weight normalization."""

import jax
import jax.numpy as jnp

from jaxpar.core.moments import affine, moved, ranges, rows, wide
from jaxpar.core.types import Layer

READS = "squares"  # of the weights of the product before it


def weight(width: int, dims: str = "embed", mean_only: bool = False, keep: float = 0.9, bias: bool = True) -> Layer:
    """The product by weights g v / |v|, for each output a direction v / |v| and a length g, its gain; plus a bias.

    It is computed as g (product by v) / |v|, so all gradients are those of the paper and the product reads v as it is.

    Args:
        width: features of the product, over all devices.
        dims: name of that dim.
        mean_only: whether to take away the mean of each feature over the microbatch as well, in evaluation the running
            mean (mean-only batch normalization).
        keep: share of the running mean that a step keeps.
        bias: whether to have a bias.

    Returns:
        A layer from `(y[.., width], squares)`, the product and the sums of squares of the weights of each output, to
        the shape and dtype of y. The gain is 1 at first; `started` finds gain and bias from data.

    Source: Salimans and Kingma 2016, arXiv:1602.07868, eqs. 2 and 3; for mean-only batch normalization section 2.3.
    """
    ranges("weight", keep=(keep, 0, 1))
    init, names = affine(width, dims, bias=bias)

    def start(key):
        return init(), {"forward": {"mean": jnp.zeros(width)}} if mean_only else {}

    def apply(params, extra, x, ctx):
        y, squares = x
        along = wide(y) * jax.lax.rsqrt(squares)
        along = along * params["gain"]
        if mean_only and ctx.train:
            mean = ctx.mean(along, dims, rows(y))
            now = jax.lax.stop_gradient(mean).reshape(-1)
            extra = {"forward": {"mean": keep * extra["forward"]["mean"] + (1 - keep) * now}}
            along = along - mean
        elif mean_only:
            along = along - extra["forward"]["mean"]
        return moved({name: leaf for name, leaf in params.items() if name == "bias"}, along, y.dtype), extra

    state = {"forward": {"mean": dims}} if mean_only else {}
    return Layer(start, apply, dims=(names, state))


def started(params, x, ctx, dims: str = "embed", eps: float = 0.0):
    """The gain and bias with which each feature of x has mean 0 and variance 1 on this, the first batch.

    Args:
        params: of a norm of this kind.
        x: as of its `apply`.
        ctx: as of its `apply`.
        dims: as of the norm.
        eps: added to the variance.

    Source: Salimans and Kingma 2016, arXiv:1602.07868, eqs. 5 and 6.
    """
    y, squares = x
    along = wide(y) * jax.lax.rsqrt(squares)
    mean = ctx.mean(along, dims, rows(y))
    gain = jax.lax.rsqrt(ctx.mean((along - mean) ** 2, dims, rows(y)) + eps)
    found = {"gain": gain.reshape(-1), "bias": -(mean * gain).reshape(-1)}
    return {name: found[name] for name in params}
