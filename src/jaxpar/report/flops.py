"""Floating-point operations of a model, counted in the products that it asks for."""

import math

import jax

from jaxpar.plan.layout import SINGLE
from jaxpar.plan.wire import device_wire
from jaxpar.step.objective import nats
from jaxpar.step.parts import Parts

BACKWARD = 2  # products in the backward pass for each one forward: one per operand


def of_model(parts: Parts) -> float:
    """Flops of the matrix products and convolutions of one step, forward and backward, over all devices.

    What a device computes twice, or for a masked entry of attention, is no work of the model, but the latter is counted
    as is usual: attention is not discounted for causality. Nothing is compiled.

    Source: 3 x the forward pass: Kaplan et al. 2020, arXiv:2001.08361, section 2.1; MFU: Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B.
    """
    settings = parts.settings._replace(placement=SINGLE, wire=device_wire())
    params, extra = jax.eval_shape(lambda: parts.model.init(jax.random.key(0)))
    batch = parts.inputs, parts.labels
    walked = jax.make_jaxpr(lambda *args: nats(parts.model, settings._replace(key=jax.random.key(0)), *args))(
        params, extra, batch
    )
    return (1 + BACKWARD) * forward(walked.jaxpr)


def forward(jaxpr) -> float:
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
    found = [forward(getattr(one, "jaxpr", one)) for one in inner]
    if name == "cond":
        return max(found)
    return sum(found) * (equation.params["length"] if name == "scan" else 1)


def _is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")
