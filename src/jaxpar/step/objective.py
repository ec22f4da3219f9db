"""What a model is trained for: the nats of its labels."""

import jax.numpy as jnp

from jaxpar.core.types import Layer
from jaxpar.plan.context import Settings, context


def nats(model: Layer, settings: Settings, params, extra, batch):
    """One device's part of the summed cross entropy of one microbatch.

    Args:
        model: from inputs to logits.
        settings: what the Context is made of.
        params: local parameters.
        extra: local state without gradient.
        batch: local (inputs, labels); a negative label counts nothing.

    Returns:
        Sum over local rows, in nats, and the new extra.
    """
    inputs, labels = batch
    ctx = context(settings)
    logits, extra = model.apply(params, extra, inputs, ctx)
    return ctx.cross_entropy(logits, labels).sum(), extra


def labelled(settings: Settings, labels):
    """How many labels the whole batch has, over all devices, float32."""
    count = (labels >= 0).sum().astype(jnp.float32)
    return settings.wire.total(count, settings.placement.scheme.inner[0], "labels")
