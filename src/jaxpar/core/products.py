"""Floating-point operations of the products in a traced program."""

import math
from collections import Counter

from jaxpar.core.walk import Shares, visits


def flops(jaxpr, shares: Shares | None = None) -> float:
    """Flops of all products in a jaxpr, two for each multiplication with its addition, as often as its loops run.

    Args:
        jaxpr: traced; inside `jax.shard_map`, its products are those of one device.
        shares: how often each branch of a switch is taken, as of `walk.visits`; by default the costliest counts.
    """
    return float(sum(visit.times * of(visit.equation) for visit in visits(jaxpr, of, shares)))


def traffic(jaxpr, shares: Shares | None = None) -> float:
    """Bytes that all products read and write if each operand and result goes through memory once; as of `flops`.

    What lies between them is taken to be fused into them, and nothing to stay in a cache.
    """
    return float(sum(visit.times * _moved(visit.equation) for visit in visits(jaxpr, _moved, shares)))


def each(jaxpr, shares: Shares | None = None) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    """How often each product runs, by `sizes` of it; arguments as of `flops`."""
    found: Counter = Counter()
    for equation, times in visits(jaxpr, of, shares):
        if shape := sizes(equation):
            found[shape] += times
    return found


def sizes(equation) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The sizes of a product's result, and of what each entry is a sum over; None for any other operation.

    No entry of a convolution's input meets one of the kernel twice, so along each dim of space there are no more sums
    than entries of either: the gradient of a convolution counts as much as the convolution, whatever zeros stand
    between and around what it reads; less where the map is smaller than the kernel.
    """
    name, out = equation.primitive.name, equation.outvars[0].aval.shape if equation.outvars else ()
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return out, tuple(shape[dim] for dim in contracted)
    if name == "conv_general_dilated":
        left, kernel = (var.aval.shape for var in equation.invars)
        reads, spec, makes = equation.params["dimension_numbers"]
        places = dict(zip(makes[2:], reads[2:], strict=True))
        out = tuple(min(size, left[places[dim]]) if dim in places else size for dim, size in enumerate(out))
        return out, tuple(kernel[dim] for dim in spec[1:])
    return None


def of(equation) -> float:
    """Flops of one run of an operation; 0 if it is no product."""
    found = sizes(equation)
    return 2.0 * math.prod(found[0]) * math.prod(found[1]) if found else 0.0


def _moved(equation) -> float:
    around = (*equation.invars, *equation.outvars) if sizes(equation) else ()
    return float(sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in around))
