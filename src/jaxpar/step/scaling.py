"""The loss scale in a step: gradients are divided by it first, and it moves whatever becomes of the update.

Its state is that of the first link of the optimizer's chain, so it is saved, restored and copied to every device with
the rest of `State.opt`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpar.core import scaling
from jaxpar.core.policy import Policy
from jaxpar.core.types import LossScale, Tree

AUTO = "auto"


class Scaling(NamedTuple):
    """State of the first link.

    Attributes:
        scale: state of the loss scale.
        skipped: steps in a row, up to now, that were no numbers.
        total: all such steps.
    """

    scale: Tree
    skipped: Any
    total: Any


def chosen(text: str, policy: Policy) -> LossScale | None:
    """The loss scale of `Recipe.loss_scale`, where `auto` is what the policy asks for; None where nothing is scaled.

    Raises:
        Refused: with one problem, as `core.scaling.loss_scale_of`.
    """
    found = scaling.loss_scale_of(policy.loss_scale if text == AUTO else text)
    return found if found.init else None


def unscaling(loss_scale: LossScale, clip: float = 0.0) -> optax.GradientTransformation:
    """Divides gradients by the scale, and clips them; nothing but `settled` moves its state.

    Both are one product, with the inverse of the scale rounded to float32, as torch.amp.GradScaler has it. The norm is
    that of the gradients as they come, divided after: so the product has no other reader than the optimizer, and XLA
    for CPU, which computes nothing twice, does it there instead of in a pass of its own. Squares of scaled gradients
    end at 1e38, so a scale times the norm at 1e19, far beyond what formats that need a scale can hold.

    Args:
        loss_scale: what gradients were multiplied by.
        clip: largest global norm once they are divided; 0 for no limit.
    """

    def init(params):
        return Scaling(loss_scale.init(), jnp.int32(0), jnp.int32(0))

    def update(gradients, state, params=None):
        factor = 1 / loss_scale.scale(state.scale)
        if clip:
            norm = _norm(loss_scale, gradients, state)
            factor = jnp.where(norm < clip, factor, factor * (clip / norm))
        return jax.tree.map(lambda leaf: leaf * factor, gradients), state

    return optax.GradientTransformation(init, update)


def _norm(loss_scale: LossScale, gradients: Tree, state: Scaling):
    return optax.global_norm(gradients) / loss_scale.scale(state.scale)


def _state(loss_scale: LossScale, opt: Tree) -> Scaling:
    """That of the first link; the first of all where there is no optimizer."""
    return opt[0] if opt else unscaling(loss_scale).init(None)


def scale_of(loss_scale: LossScale | None, opt: Tree):
    """What a step is scaled by that begins with this optimizer's state; None where nothing is scaled."""
    return None if loss_scale is None else loss_scale.scale(_state(loss_scale, opt).scale)


def norm_of(loss_scale: LossScale | None, gradients: Tree, opt: Tree):
    """Global norm of gradients, as if the backward pass had begun with 1."""
    if loss_scale is None:
        return optax.global_norm(gradients)
    return _norm(loss_scale, gradients, _state(loss_scale, opt))


def unscaled(loss_scale: LossScale | None, gradients: Tree, opt: Tree) -> Tree:
    """Gradients as if the backward pass had begun with 1."""
    if loss_scale is None:
        return gradients
    return unscaling(loss_scale).update(gradients, _state(loss_scale, opt))[0]


def settled(loss_scale: LossScale | None, opt: Tree, loss, fine) -> tuple[Tree, dict]:
    """The optimizer's state after a step, with a scale that has moved, and what metrics tell of it.

    Args:
        loss_scale: None where nothing is scaled.
        opt: state after the update, or, if that was skipped, before it.
        loss: of the step.
        fine: whether loss and gradients were numbers.

    Returns:
        The state; and `loss_scale`, that of this step, with `lowered`: whether the step was skipped for gradients
        alone, and the scale, then above 1, fell for it. So the next one may well be finite.
    """
    if loss_scale is None:
        return opt, {}
    was, *rest = opt
    now = loss_scale.update(was.scale, fine)
    before, after = loss_scale.scale(was.scale), loss_scale.scale(now)
    new = Scaling(now, jnp.where(fine, 0, was.skipped + 1), was.total + ~fine)
    lowered = ~fine & jnp.isfinite(loss) & (before > 1) & (after < before)
    return (new, *rest), {"loss_scale": before, "lowered": lowered}
