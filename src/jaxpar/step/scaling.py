"""The loss scale in a step: gradients are divided by it first, and it moves whatever becomes of the update.

Its state is that of the first link of the optimizer's chain, so it is saved, restored and copied to every device with the
rest of `State.opt`.
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
    found = scaling.loss_scale_of(getattr(policy, "loss_scale", "none") if text == AUTO else text)
    return found if found.init else None


def unscaling(loss_scale: LossScale) -> optax.GradientTransformation:
    """Divides gradients by the scale; nothing but `settled` moves its state.

    It is a product with the inverse, rounded to float32 as torch.amp.GradScaler has it, and elementwise: XLA does it
    where the gradients are read next.
    """

    def init(params):
        return Scaling(loss_scale.init(), jnp.int32(0), jnp.int32(0))

    def update(gradients, state, params=None):
        inverse = 1 / loss_scale.scale(state.scale)
        return jax.tree.map(lambda leaf: leaf * inverse, gradients), state

    return optax.GradientTransformation(init, update)


def scale_of(loss_scale: LossScale | None, opt: Tree):
    """What a step is scaled by that begins with this optimizer's state; the first scale of all where there is none."""
    if loss_scale is None:
        return None
    return loss_scale.scale(opt[0].scale if opt else loss_scale.init())


def unscaled(loss_scale: LossScale | None, gradients: Tree, opt: Tree) -> Tree:
    """Gradients as if the backward pass had begun with 1; `opt` as of `scale_of`."""
    if loss_scale is None:
        return gradients
    link = unscaling(loss_scale)
    return link.update(gradients, opt[0] if opt else link.init(None))[0]


def settled(loss_scale: LossScale | None, opt: Tree, loss, fine) -> tuple[Tree, dict]:
    """The optimizer's state after a step, with a scale that has moved, and what metrics tell of it.

    Args:
        loss_scale: None where nothing is scaled.
        opt: state after the update, or, if that was skipped, before it.
        loss: of the step.
        fine: whether loss and gradients were numbers.

    Returns:
        The state; and `loss_scale`, that of this step, with `lowered`: whether the step was skipped for gradients alone,
        and the scale, then above 1, fell for it. So the next one may well be finite.
    """
    if loss_scale is None:
        return opt, {}
    was, *rest = opt
    now = loss_scale.update(was.scale, fine)
    before, after = loss_scale.scale(was.scale), loss_scale.scale(now)
    new = Scaling(now, jnp.where(fine, 0, was.skipped + 1), was.total + ~fine)
    lowered = ~fine & jnp.isfinite(loss) & (before > 1) & (after < before)
    return (new, *rest), {"loss_scale": before, "lowered": lowered}
