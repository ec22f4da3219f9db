"""Loss and gradients of one device, inside `jax.shard_map`."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.core import compat
from jaxpar.core.timetable import Timetable
from jaxpar.core.types import Layer, Part, Reducer, Tree
from jaxpar.plan import layout, offload, zero
from jaxpar.plan.context import Settings
from jaxpar.plan.layout import PIPE
from jaxpar.step.executor import Carry, play
from jaxpar.step.master import wide
from jaxpar.step.objective import labelled
from jaxpar.step.rehearsal import Manner, score
from jaxpar.step.stages import Division


class Found(NamedTuple):
    """Mean loss in nats, gradients (times the loss scale), the new extra and the reducer's new state."""

    loss: object
    gradients: object
    extra: object
    comm: object


class Pipeline(NamedTuple):
    """How the microbatches of a batch go through the stages of a model; one stage is no pipeline at all.

    Attributes:
        table: who does what when, in training.
        ahead: the same where nothing is learned: forward work only.
        division: the model in stages.
        storage: what a stage keeps of its forward pass: `recompute` or `residual`.
    """

    table: Timetable
    ahead: Timetable
    division: Division
    storage: str

    @property
    def plain(self) -> bool:
        """Whether this is one stage that does a microbatch forward and back before it takes the next."""
        return self.table.stages == 1 and "W" not in self.table.kinds and self.storage == "recompute"


def gradients(
    model: Layer, pipeline: Pipeline, settings: Settings, reducer: Reducer, state: tuple, batch: tuple, key, scale=None
) -> Found:
    """Loss and gradients of a whole batch, one microbatch after the other.

    Parameters are made to vary over the data axes first, so that gradients arrive as each device found them and the
    reducer owns the one sum over data, however many microbatches there are.

    Args:
        model: from inputs to logits.
        pipeline: in which order.
        settings: what the Context is made of, without key and first example.
        reducer: how gradients are summed over data.
        state: local (params, extra, comm).
        batch: local (inputs, labels), each `[microbatches, examples, ...]`.
        key: random key of this step.
        scale: gradients come out multiplied by it, the loss does not; None for 1.
    """
    params, extra, comm = state
    count = jnp.maximum(labelled(settings, batch[1]), 1)
    replicas = layout.replicas(settings.placement)
    varied = jax.tree.map(lambda leaf: compat.vary(leaf, replicas), wide(params))
    entered = zero.entered(settings, offload.entered(model.dims[0], varied))

    def loss(ctx, logits, labels):
        return _share(settings, ctx.cross_entropy(logits, labels).sum()) / count

    scale = 1.0 if scale is None else scale
    manner = Manner(True, pipeline.storage, _examples(settings, batch), loss, scale)
    done = _played(model, pipeline, settings._replace(key=key, scale=scale), manner, (entered, extra, batch))
    found, comm = reducer.reduce(_summed(model, pipeline, done.total), comm, partial(zero.summed, settings))
    if settings.policy.gradient:
        found = jax.tree.map(settings.policy.gradient, found, model.dims[0])
    new = _from_owners(model, pipeline, done.extra)
    return Found(lax.psum(done.loss, compat.varying_axes(done.loss)), found, new, comm)


def evaluate(model: Layer, pipeline: Pipeline, settings: Settings, params, extra, batch):
    """Summed nats, number of labels, and how many of them are right, of a batch over all devices; dropout is off.

    A label is right if its logit is the largest; where an example has many labels that is not looked at, and is 0.
    `extra` stays as it is.

    Args: as for `gradients`.
    """

    def loss(ctx, logits, labels):
        nats = ctx.cross_entropy(logits, labels).sum()
        right = ctx.correct(logits, labels).sum() if labels.ndim == 1 else jnp.zeros_like(nats)
        return _share(settings, jnp.stack([nats, right]))

    manner = Manner(False, pipeline.storage, _examples(settings, batch), loss)
    entered = zero.entered(settings, offload.entered(model.dims[0], wide(params)))
    done = _played(model, pipeline, settings._replace(train=False), manner, (entered, extra, batch))
    nats, right = lax.psum(done.loss, compat.varying_axes(done.loss))
    return nats, labelled(settings, batch[1]), right


def _played(model: Layer, pipeline: Pipeline, settings: Settings, manner: Manner, local: tuple) -> Carry:
    """What the executor found; everything that it is given varies over `pipe`."""
    table = pipeline.table if manner.learn else pipeline.ahead
    over = (PIPE,) if table.devices > 1 else ()
    params, extra, batch = jax.tree.map(lambda leaf: compat.vary(leaf, over), local)
    if not model.parts:  # one stage of one nameless part
        params, extra = {"": params}, {"": extra}
    found = score(table, pipeline.division.stages, settings, manner, (params, extra, batch))
    done = play(found, params, extra, batch, zero.nothing_found(offload.apart(params)[0]) if manner.learn else None)
    return done if model.parts else done._replace(total=done.total and done.total[""], extra=done.extra[""])


def _examples(settings: Settings, batch) -> int:
    """Of one microbatch, over all devices."""
    return batch[1].shape[1] * layout.size(settings.placement.scheme, layout.rows(settings.placement, "batch", "-"))


def _share(settings: Settings, total):
    """A sum that devices beyond the row axes hold copies of is shared out among them, so that it counts once."""
    rows = settings.placement.scheme.inner[0]
    for axis in compat.varying_axes(total):
        if axis not in rows and axis != PIPE:
            total = total / lax.axis_size(axis)
    return total


def _is_split(part: Part, pipeline: Pipeline) -> bool:
    """Whether the blocks of a part lie on the devices of their own stages alone."""
    return bool(part.layer.blocks and pipeline.division.stack)


def _summed(model: Layer, pipeline: Pipeline, found: Tree) -> Tree:
    """Gradients of what all devices of the pipeline hold, summed over them: a tied table has two stages' gradients."""
    if pipeline.table.devices == 1:
        return found
    split = {part.name for part in model.parts if _is_split(part, pipeline)}
    return {name: tree if name in split else lax.psum(tree, PIPE) for name, tree in found.items()}


def _from_owners(model: Layer, pipeline: Pipeline, extra: Tree) -> Tree:
    """State that all devices of the pipeline hold, as the one that runs the part left it."""
    if pipeline.table.devices == 1:
        return extra
    here, new = lax.axis_index(PIPE), dict(extra)
    for part in model.parts:
        if part.name in extra and not _is_split(part, pipeline):
            owners = np.array([device for device, _ in _runs(part, pipeline)])

            def one(leaf, owners=owners, rows=bool(part.layer.blocks)):
                mine = jnp.asarray(owners) == here if rows else owners[0] == here
                mine = mine.reshape(-1, *[1] * (leaf.ndim - 1)) if rows else mine
                return lax.psum(jnp.where(mine, leaf, 0), PIPE)

            new[part.name] = jax.tree.map(one, extra[part.name])
    return new


def _runs(part: Part, pipeline: Pipeline) -> list[tuple[int, int]]:
    """(device, block) of each block of a part, or of the part itself, in the order of blocks."""
    found = []
    for stage, device in zip(pipeline.division.stages, pipeline.table.order.place, strict=True):
        for piece in stage:
            if piece.part == part:
                found += [(device, piece.first + n) for n in range(max(piece.count, 1))]
    return sorted(found, key=lambda pair: pair[1])
