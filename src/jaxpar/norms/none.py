"""No normalization: a bias alone."""

from jaxpar.core.moments import affine, moved
from jaxpar.core.types import Layer


def none(width: int, dims: str = "embed", bias: bool = True) -> Layer:
    """Nothing but a bias, so that a network without norms is the published one.

    Args:
        width: size of the last dim of x, over all devices.
        dims: name of that dim.
        bias: whether to have one.

    Returns:
        A layer from `x[..., width]` to the same shape and dtype.
    """
    init, names = affine(width, dims, gain=False, bias=bias)

    def apply(params, extra, x, ctx):
        return moved(params, x, x.dtype), extra

    return Layer(lambda key: (init(), {}), apply, dims=(names, {}))
