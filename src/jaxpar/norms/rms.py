"""Root-mean-square normalization."""

import math

from jaxpar.core.moments import affine, ranges, standardized
from jaxpar.core.types import Layer


def rms(width: int, dims: str = "embed", eps: float = 2**-23, bias: bool = False) -> Layer:
    """Scale each row to unit mean square, then by a learned gain.

    Args:
        width: size of the last dim of x, over all devices.
        dims: name of that dim.
        eps: added to the mean square, so in units of x squared; by default the distance from 1 to the next float32, as
            torch has it. Llama models have 1e-5 or 1e-6.
        bias: ignored: there is none, whatever the model's other parts have.

    Returns:
        A layer from `x[..., width]` to the same shape and dtype; the mean square in float32.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    ranges("rms", eps=(eps, 0, math.inf))
    init, names = affine(width, dims, bias=False)

    def apply(params, extra, x, ctx):
        return standardized(lambda a: ctx.mean(a, dims), x, params, eps, centre=False)[0], extra

    return Layer(lambda key: (init(), {}), apply, dims=(names, {}))
