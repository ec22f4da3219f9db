"""Dropout."""

from jaxpar.core.parts import function
from jaxpar.core.types import Layer


def dropout(rate: float, site: str, dims: str = "embed") -> Layer:
    """Zero entries with probability `rate` in training and scale up the rest.

    Args:
        rate: share of entries zeroed, in [0, 1).
        site: names the place in the model; each has masks of its own.
        dims: dim words of x, or its feature word.

    Source: Srivastava et al. 2014, section 10, in the inverted form.
    """
    return function(lambda x, ctx: ctx.dropout(x, rate, site, dims))
