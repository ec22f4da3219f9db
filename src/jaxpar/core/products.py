"""Floating-point operations of the products in a traced program."""

import math

from jaxpar.core.walk import Shares, visits


def flops(jaxpr, shares: Shares | None = None) -> float:
    """Flops of all products in a jaxpr, two for each multiplication with its addition, as often as its loops run.

    Args:
        jaxpr: traced; inside `jax.shard_map`, its products are those of one device.
        shares: how often each branch of a switch is taken, as of `walk.visits`; by default the costliest counts.
    """
    return float(sum(visit.times * _of(visit.equation) for visit in visits(jaxpr, _of, shares)))


def _of(equation) -> float:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[dim] for dim in contracted)
    if name == "conv_general_dilated":
        kernel, spec = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel[dim] for dim in spec[1:])
    return 0.0
