"""Floating-point operations of a model, counted in the products that it asks for."""

import jax

from jaxpar.core import products
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
    return (1 + BACKWARD) * products.flops(walked.jaxpr)
