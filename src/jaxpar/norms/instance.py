"""Instance normalization."""

import math

import jax
import jax.numpy as jnp

from jaxpar.core.moments import SPACE, affine, moved, ranges, standardized, wide, wrong
from jaxpar.core.types import Layer

AHEAD = True  # of a sequence all positions share statistics, so none may be asked to foretell the next


def instance(
    width: int,
    dims: str = "embed",
    eps: float = 1e-5,
    running: bool = False,
    keep: float = 0.9,
    bias: bool = True,
) -> Layer:
    """Shift and scale each feature of each example to mean 0 and variance 1 over its places, then by a gain and bias.

    On sequences `x[batch, context, width]` it is torch's InstanceNorm1d: a position sees later ones, so language models
    refuse it. Of a single place there are no such statistics.

    Args:
        width: size of the last dim of x, over all devices.
        dims: name of that dim.
        eps: added to the variance, so in units of x squared.
        running: whether evaluation uses running statistics, as torch's with track_running_stats.
        keep: share of them that a step keeps; torch's momentum is 1 - keep.
        bias: whether to have a bias.

    Returns:
        A layer from `x[batch, .., width]` to the same shape and dtype; statistics in float32.

    Raises:
        Refused: at trace time, if an example has no places or a single one.

    Source: Ulyanov et al. 2016, arXiv:1607.08022, eq. 1.
    """
    ranges("instance", eps=(eps, 0, math.inf), keep=(keep, 0, 1))
    init, names = affine(width, dims, bias=bias)

    def start(key):
        state = {"mean": jnp.zeros(width), "variance": jnp.ones(width)}
        return init(), {"forward": state} if running else {}

    def apply(params, extra, x, ctx):
        held, space = extra.get("forward"), SPACE[x.ndim]
        count = math.prod(ctx.extent(word, n, beside=dims) for word, n in zip(space.split(), x.shape[1:], strict=False))
        if x.ndim < 3 or count < 2:
            rule = "has statistics over the places of an example, and where it stands there is one at most."
            raise wrong("instance", rule, "layer or group")
        if running and not ctx.train:
            y = (wide(x) - held["mean"]) * jax.lax.rsqrt(held["variance"] + eps)
            return moved(params, y, x.dtype), extra
        y, (mean, variance) = standardized(lambda a: ctx.mean(a, dims, space), x, params, eps)
        if not running:
            return y, extra
        now = {"mean": mean, "variance": variance * count / (count - 1)}
        now = {name: ctx.mean(one, dims, "batch", trained=False).reshape(-1) for name, one in now.items()}
        return y, {"forward": {name: keep * held[name] + (1 - keep) * one for name, one in now.items()}}

    state = {"forward": {"mean": dims, "variance": dims}} if running else {}
    return Layer(start, apply, dims=(names, state))
