"""Master weights: the format in which parameters rest between steps, and how updates are rounded onto it.

A step computes with float32 copies of them, so gradients and the optimizer's state are float32 whatever rests.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpar.core import formats
from jaxpar.core.formats import Format
from jaxpar.core.policy import Policy
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Problem, near_miss
from jaxpar.core.types import Tree
from jaxpar.plan import offload
from jaxpar.step.rounding import Origin, rounded

AUTO, NONE = "auto", "none"
ROUNDINGS = (AUTO, "nearest", "stochastic")
SIXTEEN = {"fp16": jnp.float16, "bf16": jnp.bfloat16}  # all others rest in float32, on their grid


class Master(NamedTuple):
    """How parameters rest.

    Attributes:
        fmt: on whose grid.
        dtype: of the arrays.
        stochastic: whether updates are rounded up or down at random, or to nearest.
    """

    fmt: Format
    dtype: Any
    stochastic: bool


def wrong(recipe: Recipe) -> Iterator[Problem]:
    """Texts of `master` and `rounding` that name nothing."""
    try:
        if recipe.master not in (AUTO, NONE):
            formats.named(recipe.master)
    except ValueError:
        legal = near_miss(recipe.master, [AUTO, NONE, *formats.FORMATS])
        yield Problem("master", recipe.master, "is no format that parameters could rest in.", f"{legal}, fixed:4.12")
    if recipe.rounding not in ROUNDINGS:
        yield Problem("rounding", recipe.rounding, "is not a choice.", near_miss(recipe.rounding, ROUNDINGS))
    elif recipe.master == "fp32":
        yield from _idle(recipe)


def chosen(recipe: Recipe, policy: Policy) -> Master | None:
    """What `Recipe.master` and `Recipe.rounding` say, `auto` being what the policy asks for; None for float32.

    Raises:
        Refused: for a format that there is not.
    """
    text = policy.master if recipe.master == AUTO else recipe.master
    fmt = formats.named(policy.dtype if text == NONE else text, "master")
    if fmt.name == "fp32":
        return None
    return Master(fmt, SIXTEEN.get(fmt.name, jnp.float32), recipe.rounding != "nearest")


def unused(recipe: Recipe, master: Master | None) -> Iterator[Problem]:
    """Choices that mean nothing for these parameters, or that cannot go with them."""
    if master is None:
        yield from _idle(recipe)
    narrow = master is not None and master.dtype != jnp.float32
    if narrow and "parameters" in offload.parse(recipe.plan.offload):
        rule = f"parameters rest as {master.fmt.name} (master={recipe.master}), and the host's cores would widen them."
        yield Problem("plan.offload", recipe.plan.offload, rule, "offload=optimizer; or master=fp32")


def _idle(recipe: Recipe) -> Iterator[Problem]:
    """A way of rounding where nothing is rounded."""
    if recipe.rounding != AUTO:
        rule = "says how updates are rounded onto fewer bits, and parameters rest in float32."
        yield Problem("rounding", recipe.rounding, rule, f"{AUTO}; or master=fp16")


def resting(master: Master | None, params: Tree) -> Tree:
    """Float32 parameters as they rest: rounded to nearest."""
    if master is None:
        return params
    return jax.tree.map(lambda leaf: formats.nearest(leaf, master.fmt).astype(master.dtype), params)


def wide(params: Tree) -> Tree:
    """Parameters as a step computes with them: float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def kept(
    master: Master | None, optimizer: optax.GradientTransformation, seed: int, origin: Origin
) -> optax.GradientTransformation:
    """An optimizer in float32 whose updates leave parameters on the grid that they rest on.

    Args:
        master: None for the optimizer as it is.
        optimizer: of float32 parameters.
        seed, origin: of the random bits, as of `rounded`.
    """
    if master is None:
        return optimizer
    inner = optax.chain(optimizer, rounded(master.fmt, master.stochastic, seed, origin))

    def update(gradients, state, params=None):
        return inner.update(gradients, state, wide(params))

    return optax.GradientTransformation(lambda params: inner.init(wide(params)), update)
