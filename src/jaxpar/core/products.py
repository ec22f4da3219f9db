"""Floating-point operations of the products in a traced program."""

import math

import jax


def flops(jaxpr) -> float:
    """Flops of all products in a jaxpr, two for each multiplication with its addition, as often as its loops run."""
    return float(sum(_of(equation) for equation in jaxpr.eqns))


def _of(equation) -> float:
    name, out = equation.primitive.name, equation.outvars[0].aval if equation.outvars else None
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * math.prod(out.shape) * math.prod(equation.invars[0].aval.shape[dim] for dim in contracted)
    if name == "conv_general_dilated":
        kernel, spec = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
        return 2 * math.prod(out.shape) * math.prod(kernel[dim] for dim in spec[1:])
    inner = [value for value in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr) if _is_jaxpr(value)]
    found = [flops(getattr(one, "jaxpr", one)) for one in inner]
    if name == "cond":
        return max(found)
    return sum(found) * (equation.params["length"] if name == "scan" else 1)


def _is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")
