"""Precision: what is cast before it travels, and how products accumulate."""

from collections.abc import Callable
from typing import NamedTuple


class Policy(NamedTuple):
    """Stands before every gather and around every product, and nowhere else.

    Attributes:
        cast: `cast(a, role)`, role `"weight"` or `"activation"`: applied before a gather, so that fewer bytes travel
            and what is kept for the backward pass is small.
        dot: `dot(product, x, w)`: calls `product(x, w, preferred_element_type)` and gives the result its dtype.
    """

    cast: Callable
    dot: Callable
