"""The second half of a step, on global arrays: from gradients to a new state; if they are no numbers, to the old."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxpar.core.types import LossScale, State
from jaxpar.step import scaling
from jaxpar.step.stream import Descent


def updated(
    optimizer: optax.GradientTransformation,
    found: tuple,
    state: State,
    loss_scale: LossScale | None = None,
    stream: Descent | None = None,
) -> tuple[State, dict]:
    """The second half of a step: (new state, metrics), from a `Found` as a tuple and the old state.

    If loss or gradients are no numbers, only the count of steps moves on, and the loss scale.

    Args:
        optimizer: all of it; if gradients are scaled, its first link unscales them.
        found: a `Found`.
        state: before the step.
        loss_scale: what gradients are scaled by; None for 1.
        stream: the same optimizer where something rests on the host.
    """
    loss, grads, extra, comm = found
    norm = scaling.norm_of(loss_scale, grads, state.opt)
    fine = jnp.isfinite(loss) & jnp.isfinite(norm)
    params, opt = (stream or partial(_descended, optimizer))(grads, state.params, state.opt, fine)
    extra, comm = _kept(fine, (extra, comm), (state.extra, state.comm))
    opt, more = scaling.settled(loss_scale, opt, loss, fine)
    metrics = {"loss": loss, "grad_norm": norm, "skipped": ~fine}
    return State(state.step + 1, params, extra, opt, comm), metrics | more


def _descended(optimizer: optax.GradientTransformation, gradients, params, opt, fine) -> tuple:
    """New (params, opt), or the old ones."""
    updates, new = optimizer.update(gradients, opt, params)
    return _kept(fine, (optax.apply_updates(params, updates), new), (params, opt))


def _kept(fine, new, old):
    return jax.tree.map(partial(jnp.where, fine), new, old)
