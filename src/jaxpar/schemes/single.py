"""No tensor parallelism: every device of a data-parallel group holds the whole model."""

from jaxpar.core.scheme import Scheme


def single() -> Scheme:
    """All weights and features whole; with `data=N`, plain data parallelism."""
    return Scheme(axes={}, outer=((), ()), inner=((), ()), up=((), ()), down=((), ()))
