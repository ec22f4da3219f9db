"""Layer normalization."""

import math

from jaxpar.core.moments import SPACE, affine, ranges, standardized, wrong
from jaxpar.core.types import Layer


def layer(width: int, dims: str = "embed", eps: float = 1e-5, over: str = "position", bias: bool = True) -> Layer:
    """Shift and scale each row to mean 0 and variance 1, then by a learned gain and bias for each feature.

    Args:
        width: size of the last dim of x, over all devices.
        dims: name of that dim.
        eps: added to the variance, so in units of x squared.
        over: what is normalized together: the features at each `position`, or, of images and volumes, all of an
            `example`. Sequences are always taken position by position, so that none sees a later one.
        bias: whether to have a bias.

    Returns:
        A layer from `x[..., width]` to the same shape and dtype; statistics in float32.

    Raises:
        Refused: if `over` is neither.

    Source: Ba et al. 2016, arXiv:1607.06450, eq. 4.
    """
    if over not in ("position", "example"):
        raise wrong(f"layer:over={over}", "there is no such `over`.", "position or example")
    ranges("layer", eps=(eps, 0, math.inf))
    init, names = affine(width, dims, bias=bias)

    def apply(params, extra, x, ctx):
        space = SPACE[x.ndim] if over == "example" and x.ndim > 3 else ""
        return standardized(lambda a: ctx.mean(a, dims, f"{space} {dims}"), x, params, eps)[0], extra

    return Layer(lambda key: (init(), {}), apply, dims=(names, {}))
