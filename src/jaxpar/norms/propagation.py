"""Normalization propagation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.core.moments import affine, moved, wide
from jaxpar.core.types import Layer

READS = "squares"  # of the weights of the product before it
FARTHEST, NODES = 10.0, 64  # of the integrals over each half of a normal distribution


def propagation(width: int, dims: str = "embed", bias: bool = True) -> Layer:
    """Divide each output of a product by the length of its weights; no statistics are taken.

        y = f(g (product by w) / |w| + b),  f(a) = (ReLU(a) - sqrt(1 / 2 pi)) / sqrt((1 - 1 / pi) / 2)

    If the inputs have mean 0, variance 1 and no correlation, so have, with g = 1 and b = 0, what the function sees and,
    if that is normal, what it gives: so normalized data stays normalized through all layers. `AFTER` is f, for any
    elementwise function in place of ReLU.

    Args:
        width: features of the product, over all devices.
        dims: name of that dim.
        bias: whether to have a bias.

    Returns:
        A layer from `(y[.., width], squares)`, the product and the sums of squares of the weights of each output, to
        the shape and dtype of y. The gain is 1 at first.

    Source: Arpit et al. 2016, arXiv:1603.01431, section 3.
    """
    init, names = affine(width, dims, bias=bias)

    def apply(params, extra, x, ctx):
        y, squares = x
        return moved(params, wide(y) * jax.lax.rsqrt(squares), y.dtype), extra

    return Layer(lambda key: (init(), {}), apply, dims=(names, {}))


def propagated(function: Callable) -> Callable:
    """`function`, shifted and scaled so that for a standard normal number it has mean 0 and variance 1.

    The two moments are integrals by Gauss and Legendre's rule on each side of 0, where ReLU has its corner.
    """
    points, weights = np.polynomial.legendre.leggauss(NODES)
    half = (points + 1) * FARTHEST / 2
    normal = np.concatenate([-half[::-1], half])
    chances = np.concatenate([weights[::-1], weights]) * np.exp(-(normal**2) / 2) * FARTHEST / 2 / np.sqrt(2 * np.pi)

    def standard(x):
        value = function(jnp.asarray(normal, wide(x).dtype))
        mean = (chances * value).sum()
        scale = jax.lax.rsqrt((chances * (value - mean) ** 2).sum())
        return ((wide(function(x)) - mean) * scale).astype(x.dtype)

    return standard


AFTER = propagated  # what becomes of the function behind the norm
