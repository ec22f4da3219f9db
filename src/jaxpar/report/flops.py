"""Floating-point operations of a model, counted in the products that it asks for."""

import jax

from jaxpar.core import compat, family, products
from jaxpar.core.walk import jaxprs
from jaxpar.plan.layout import SINGLE
from jaxpar.plan.remat import NONE
from jaxpar.plan.wire import device_wire
from jaxpar.report.traced import shares_of
from jaxpar.step.objective import nats
from jaxpar.step.parts import Parts
from jaxpar.step.program import traced


def of_model(parts: Parts) -> float:
    """Flops of the matrix products and convolutions of one step, forward and backward, over all devices.

    Each product counts once forward, and once backward for each operand that a parameter comes into: images, unlike
    embedded tokens, need no gradient. What a device computes twice, or for a masked entry of attention, is no work of
    the model, but the latter is counted as is usual: attention is not discounted for causality. Nothing is compiled.

    Source: 3 x the forward pass: Kaplan et al. 2020, arXiv:2001.08361, section 2.1; MFU: Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B.
    """
    settings = parts.settings._replace(placement=SINGLE, wire=device_wire(), remat=NONE)  # a budget is one of a device
    settings = settings._replace(policy=family.pick("policies", "fp32")())  # however they are carried out
    params, extra = jax.eval_shape(lambda: parts.model.init(jax.random.key(0)))
    batch = parts.inputs, parts.labels
    walked = jax.make_jaxpr(lambda *args: nats(parts.model, settings._replace(key=jax.random.key(0)), *args))(
        params, extra, batch
    )
    trained = len(jax.tree.leaves(params))
    return _trained(walked.jaxpr, [n < trained for n in range(len(walked.jaxpr.invars))])[0]


def _trained(jaxpr, depends: list[bool]) -> tuple[float, list[bool]]:
    """Flops forward and backward, and which results a parameter comes into, given which arguments it does."""
    known = {var for var, one in zip(jaxpr.invars, depends, strict=True) if one}
    total = 0.0
    for equation in jaxpr.eqns:
        on = [not hasattr(var, "val") and var in known for var in equation.invars]
        done, results = _of_one(equation, on)
        total += done
        known.update(var for var, one in zip(equation.outvars, results, strict=True) if one)
    return total, [not hasattr(var, "val") and var in known for var in jaxpr.outvars]


def _of_one(equation, on: list[bool]) -> tuple[float, list[bool]]:
    inner = [getattr(one, "jaxpr", one) for one in jaxprs(equation)]
    if not inner:
        return products.of(equation) * (1 + sum(on)), [any(on)] * len(equation.outvars)
    if equation.primitive.name == "scan":
        consts, carry = compat.scan_counts(equation)
        while True:  # what a trip makes of the carry, the next one takes
            done, results = _trained(inner[0], on)
            joined = [*on[:consts], *map(max, on[consts : consts + carry], results[:carry]), *on[consts + carry :]]
            if joined == on:
                return done * equation.params["length"], results
            on = joined
    if equation.primitive.name == "cond":
        found = [_trained(one, on[1:]) for one in inner]
        return max(done for done, _ in found), [
            any(some) for some in zip(*(results for _, results in found), strict=True)
        ]
    if len(inner[0].invars) == len(on) and len(inner[0].outvars) == len(equation.outvars):  # a call
        return _trained(inner[0], on)
    return sum(_trained(one, [any(on)] * len(one.invars))[0] for one in inner), [any(on)] * len(equation.outvars)


def executed(parts: Parts, trace=None) -> float:
    """Flops of the products that one device carries out in a step; of a pipeline the device that does most.

    Work that is done again, by rematerialization or by each of several devices, and padding count; not in `of_model`.

    Args:
        parts: of the run.
        trace: `traced(parts)`, if it is at hand.
    """
    found = trace or traced(parts)
    return max(products.flops(found, one) for one in shares_of(parts))
