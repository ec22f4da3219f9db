"""Loss scales: the text that names one, and those that find their own size."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxpar.core import family
from jaxpar.core.refuse import Problem, Refused, near_miss
from jaxpar.core.spec import JOINED
from jaxpar.core.types import LossScale

FIELD = "loss_scale"
MOST = 2**31 - 1  # steps are counted in 32 bits
LARGEST = 2.0**126  # its inverse is the smallest float32 that no backend flushes to zero


class Adaptive(NamedTuple):
    """State of a scale that finds its own size.

    Attributes:
        scale: of the next step, float32.
        finite: steps in a row that were finite since it last changed, int32.
        steps: all steps so far, int32.
    """

    scale: Any
    finite: Any
    steps: Any


def loss_scale_of(text: str) -> LossScale:
    """The loss scale that a recipe names: `none`, `static:1000`, `dynamic:65536+interval=500`, `enhanced:100=8192`.

    After the name stand numbers, joined by `+`: NAME=NUMBER for an argument of the member, a bare number for its first
    one, and STEP=NUMBER for a floor.

    Raises:
        Refused: with one problem, for an unknown name (with the likeliest) or numbers that the member does not take.
    """
    path, python, rest = text.rpartition(".py:")
    name, colon, numbers = rest.partition(":")
    member = family.pick("loss_scales", path + python + name, FIELD)
    wanted, defaults = family.parameters(member), family.defaults(member)
    fields, floors = {}, {}
    for item in JOINED.split(numbers) if colon else ():
        key, equals, number = item.rpartition("=")
        if not equals and wanted[:1] in ([], ["floors"]):
            rule = "a bare number means nothing here." if wanted else f"{name} takes no numbers."
            raise _refused(text, rule, f"{name}:40000=8192" if wanted else name)
        key = key if equals else wanted[0]
        step = key.isdecimal() and "floors" in wanted
        if not step and (key not in wanted or key == "floors"):
            raise _refused(text, f"{name} has no `{key}`.", near_miss(key, set(wanted) - {"floors"}))
        held = floors if step else fields
        if step and int(key) > MOST:
            raise _refused(text, f"`{key}` is a step beyond {MOST}.", f"{name}:40000=8192")
        if (key := int(key) if step else key) in held:
            raise _refused(text, f"says `{key}` twice.", name)
        held[key] = _number(text, number, whole=isinstance(defaults.get(key), int))
    if missing := [one for one in wanted if one not in fields and one not in defaults]:
        raise _refused(text, f"{name} needs its {missing[0]}.", f"{name}:1024")
    return member(**fields, **({"floors": tuple(floors.items())} if floors else {}))


def _number(text: str, word: str, whole: bool) -> float:
    """A number above 0 that float32 has, and its inverse."""
    try:
        found = int(word) if whole else float(word)
    except ValueError:
        found = math.nan
    if not 1 / LARGEST <= found <= (MOST if whole else LARGEST):
        raise _refused(text, f"`{word}` must be a {'whole' if whole else 'finite'} number above 0.", "1024")
    return found


def _refused(value: Any, rule: str, legal: str) -> Refused:
    return Refused([Problem(FIELD, value, rule, legal)])


def adaptive(
    start: float, interval: int, growth: float, backoff: float, floors: tuple[tuple[int, float], ...] = ()
) -> LossScale:
    """A scale that grows after `interval` finite steps and falls after each that is not, never below its floor.

    Args:
        start: the first scale.
        interval: finite steps before it grows.
        growth, backoff: what it is then multiplied by.
        floors: (step, smallest scale from there on), steps rising.

    Raises:
        Refused: for a growth below 1 or a backoff of 1 or more.
    """
    if not growth >= 1:
        raise _refused(f"growth={growth}", "must be at least 1.", "growth=2")
    if not 0 < backoff < 1:
        raise _refused(f"backoff={backoff}", "must lie between 0 and 1.", "backoff=0.5")
    floored = _floored(floors)

    def init() -> Adaptive:
        return Adaptive(floored(jnp.float32(start), 0), jnp.int32(0), jnp.int32(0))

    def update(state: Adaptive, fine) -> Adaptive:
        finite, steps = jnp.where(fine, state.finite + 1, 0), state.steps + 1
        grows, larger = finite >= interval, state.scale * growth
        grown = jnp.where(grows & (larger <= LARGEST), larger, state.scale)
        scale = jnp.where(fine, grown, jnp.maximum(state.scale * backoff, 1 / LARGEST))
        return Adaptive(floored(scale, steps), jnp.where(grows, 0, finite), steps)

    return LossScale(init, lambda state: state.scale, update)


def _floored(floors: tuple[tuple[int, float], ...]) -> Callable:
    """`floored(scale, steps)`: at least the floor that holds after so many steps."""

    def floored(scale, steps):
        for step, floor in floors:
            scale = jnp.where(steps >= step, jnp.maximum(scale, floor), scale)
        return scale

    return floored
