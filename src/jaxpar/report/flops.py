"""Floating-point operations of a model, counted in the products that it asks for."""

import jax

from jaxpar.core import products
from jaxpar.plan.layout import SINGLE
from jaxpar.plan.wire import device_wire
from jaxpar.report.traced import shares_of
from jaxpar.step.objective import nats
from jaxpar.step.parts import Parts
from jaxpar.step.program import traced

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
    return (1 + BACKWARD) * products.flops(walked.jaxpr)


def executed(parts: Parts, trace=None) -> float:
    """Flops of the products that one device carries out in a step; of a pipeline the device that does most.

    Work that is done again, by rematerialization or by each of several devices, and padding count; not in `of_model`.

    Args:
        parts: of the run.
        trace: `traced(parts)`, if it is at hand.
    """
    found = trace or traced(parts)
    return max(products.flops(found, one) for one in shares_of(parts))
