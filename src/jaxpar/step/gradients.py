"""Loss and gradients of one device, inside `jax.shard_map`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.core import compat
from jaxpar.core.types import Layer, Reducer
from jaxpar.plan import layout
from jaxpar.plan.context import Settings
from jaxpar.step.objective import labelled, nats


class Found(NamedTuple):
    """Mean loss in nats, gradients, the new extra and the reducer's new state."""

    loss: object
    gradients: object
    extra: object
    comm: object


def gradients(model: Layer, settings: Settings, reducer: Reducer, params, extra, comm, batch, key) -> Found:
    """Loss and gradients of a whole batch, one microbatch after the other.

    Parameters are made to vary over the data axes first, so that gradients arrive as each device found them and the
    reducer owns the one sum over data, however many microbatches there are.

    Args:
        model: from inputs to logits.
        settings: what the Context is made of, without key and first example.
        reducer: how gradients are summed over data.
        params, extra, comm: local parts of the State.
        batch: local (inputs, labels), each `[microbatches, examples, ...]`.
        key: random key of this step.
    """
    replicas, rows = layout.replicas(settings.placement), settings.placement.scheme.inner[0]
    params = jax.tree.map(lambda leaf: compat.vary(leaf, replicas), params)
    count = jnp.maximum(labelled(settings, batch[1]), 1)
    parts = batch[1].shape[0]
    examples = batch[1].shape[1] * layout.size(settings.placement.scheme, layout.rows(settings.placement, "batch", "-"))

    def work(extra, one):
        index, microbatch = one
        here = settings._replace(key=key, first_example=index * examples)

        def loss(params):
            total, new = nats(model, here, params, extra, microbatch)
            return _share(total, rows) / count, new

        (loss, extra), found = jax.value_and_grad(loss, has_aux=True)(params)
        return extra, (loss, found)

    extra, (loss, found) = _accumulate(work, extra, (jnp.arange(parts), batch))
    found, comm = reducer.reduce(found, comm, lambda leaf: settings.wire.total(leaf, replicas, "gradients"))
    return Found(lax.psum(loss, compat.varying_axes(loss)), found, extra, comm)


def _share(total, rows):
    """A sum that devices beyond the row axes hold copies of is shared out among them, so that it counts once."""
    copies = [axis for axis in compat.varying_axes(total) if axis not in rows]
    for axis in copies:
        total = total / lax.axis_size(axis)
    return total


def _accumulate(work, extra, xs):
    """Thread `extra` through the microbatches in order and add up the rest of what `work` returns."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        return work(extra, jax.tree.map(lambda leaf: leaf[0], xs))
    shapes = jax.eval_shape(lambda: work(extra, jax.tree.map(lambda leaf: leaf[0], xs)))[1]
    zeros = jax.tree.map(lambda leaf: compat.vary(jnp.zeros(leaf.shape, leaf.dtype), compat.varying_axes(leaf)), shapes)

    def body(carry, one):
        extra, total = carry
        extra, part = work(extra, one)
        return (extra, jax.tree.map(jnp.add, total, part)), None

    return lax.scan(body, (extra, zeros), xs)[0]


def evaluate(model: Layer, settings: Settings, params, extra, batch):
    """Summed nats and number of labels of a batch, over all devices, with dropout off and `extra` unchanged.

    Args: as for `gradients`.
    """
    rows = settings.placement.scheme.inner[0]
    still = settings._replace(train=False)

    def work(total, microbatch):
        local, _ = nats(model, still, params, extra, microbatch)
        return total + lax.psum(_share(local, rows), compat.varying_axes(local)), None

    total, _ = lax.scan(work, jnp.float32(0), batch)
    return total, labelled(settings, batch[1])
