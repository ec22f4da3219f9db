"""Group normalization."""

import math

from jaxpar.core.moments import SPACE, affine, ranges, standardized, wrong
from jaxpar.core.types import Layer

MOST = 32  # groups of a width that leaves open how many
FEWEST = 4  # features of a group, where that is left open


def group(width: int, dims: str = "embed", groups: int = 0, eps: float = 1e-5, bias: bool = True) -> Layer:
    """Shift and scale each group of features of each example to mean 0 and variance 1, then by a gain and bias.

    Statistics are over the features of a group and, of images and volumes, over all their places. Those of a sequence
    are of each position alone, so that none sees a later one.

    Args:
        width: size of the last dim of x, over all devices.
        dims: name of that dim.
        groups: how many groups of consecutive features; 0 stands for 32, or of a small width for the largest power of
            two that leaves equal groups of at least 4 features.
        eps: added to the variance, so in units of x squared.
        bias: whether to have a bias.

    Returns:
        A layer from `x[.., width]` to the same shape and dtype; statistics in float32.

    Raises:
        Refused: if there are no so many equal groups.

    Source: Wu and He 2018, arXiv:1803.08494, eq. 7.
    """
    count = groups or math.gcd(MOST, max(width // FEWEST, 1))
    if count < 1 or width % count:
        rule = f"{width} features, which a layer of the model has, are no {groups} equal groups."
        raise wrong(f"group:groups={groups}", rule, f"groups={math.gcd(width, groups)}")
    ranges("group", eps=(eps, 0, math.inf))
    init, names = affine(width, dims, bias=bias)

    def apply(params, extra, x, ctx):
        over = f"{SPACE[x.ndim] if x.ndim > 3 else ''} {dims}"
        return standardized(lambda a: ctx.mean(a, dims, over, {dims: count}), x, params, eps)[0], extra

    return Layer(lambda key: (init(), {}), apply, dims=(names, {}))
