"""The learning rate as a function of the updates done: a warm-up, then what `Recipe.schedule` says."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Problem, Refused, near_miss

SHAPES = {"cosine": 0.1, "linear": 0.1, "constant": None, "steps": None}  # and the share that is left at the end
EXAMPLES = "cosine, linear:0, constant or steps:0.4=0.1+0.6=0.01"


class Schedule(NamedTuple):
    """What `Recipe.schedule` says.

    Attributes:
        shape: one of `SHAPES`.
        end: share of the largest rate at the end, of `cosine` and `linear`.
        steps: of `steps`, (share of all steps, share of the largest rate from there on), in rising order.
    """

    shape: str
    end: float
    steps: tuple[tuple[float, float], ...]


def schedule_of(text: str) -> Schedule:
    """Read `Recipe.schedule`.

    Raises:
        Refused: if it is none of `EXAMPLES`' kinds, with one problem.
    """
    shape, colon, values = text.partition(":")
    if shape not in SHAPES:
        raise _refusal(text, "there is no such shape.", near_miss(shape, SHAPES))
    if shape == "steps":
        pairs = tuple(_share(text, *item.partition("=")[::2]) for item in values.split("+"))
        if [at for at, _ in pairs] != sorted({at for at, _ in pairs}):
            raise _refusal(text, "must name shares of the run in rising order.")
        return Schedule(shape, 0.0, pairs)
    if colon and SHAPES[shape] is None:
        raise _refusal(text, f"{shape} takes nothing.", shape)
    return Schedule(shape, _number(text, values) if colon else SHAPES[shape] or 0.0, ())


def learning_rate(recipe: Recipe) -> optax.Schedule:
    """From the number of updates done to the rate.

    Over `warmup` steps it rises from 0 in a straight line; `cosine` and `linear` then fall to their end at the last
    step. `steps` are of the whole run, the warm-up included, as torch.optim.lr_scheduler.MultiStepLR counts epochs.
    """
    warmup = min(recipe.steps // 10, 100) if recipe.warmup is None else recipe.warmup
    schedule, peak, last = schedule_of(recipe.schedule), recipe.learning_rate, max(recipe.steps, warmup + 1)
    if schedule.shape == "cosine":
        start, end = 0.0 if warmup else peak, peak * schedule.end
        return optax.warmup_cosine_decay_schedule(start, peak, warmup, last, end_value=end)
    if schedule.shape == "linear":
        after = optax.linear_schedule(peak, peak * schedule.end, last - warmup)
    else:
        after = _stepwise(peak, [(round(at * recipe.steps) - warmup, share) for at, share in schedule.steps])
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])


def _stepwise(peak: float, steps: list[tuple[int, float]]) -> optax.Schedule:
    """`peak`, times a share from each of `steps` on, which may lie before 0."""
    starts = np.array([at for at, _ in steps], np.int32)  # of numpy: arrays of jax would make its devices
    rates = np.array([peak, *(peak * share for _, share in steps)], np.float32)
    return lambda count: jnp.asarray(rates)[jnp.sum(jnp.asarray(count)[..., None] >= starts, -1)]


def _share(text: str, at: str, share: str) -> tuple[float, float]:
    found = _number(text, at), _number(text, share)
    if not 0 < found[0] < 1:
        raise _refusal(text, f"{at} must be a share of the run, above 0 and below 1.")
    return found


def _number(text: str, word: str) -> float:
    """A share of the largest rate.

    Raises:
        Refused: if it is no number from 0 to 1.
    """
    try:
        value = float(word)
    except ValueError:
        raise _refusal(text, f"`{word}` is no number.") from None
    if not (np.isfinite(value) and 0 <= value <= 1):
        raise _refusal(text, f"{word} must lie in 0 to 1.")
    return value


def _refusal(text: str, rule: str, legal: str = EXAMPLES) -> Refused:
    return Refused([Problem("schedule", text, rule, legal)])
