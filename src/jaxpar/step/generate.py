"""Text from a trained language model, on one device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.core.types import Layer, Tree
from jaxpar.plan.context import context
from jaxpar.plan.layout import SINGLE
from jaxpar.plan.product import Settings
from jaxpar.step.master import wide


class Trained(NamedTuple):
    """A model with its unpadded parameters and state, and the settings it was trained under (for their precision)."""

    model: Layer
    settings: Settings
    params: Tree
    extra: Tree


def generate(
    trained: Trained,
    prompt,
    *,
    count: int,
    window: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Continue a prompt token by token, each drawn from the model's distribution.

    Args:
        trained: a language model, from `ids[batch, context]` to logits.
        prompt: ids, at least one.
        count: tokens to add.
        window: how many of the last tokens the model sees.
        temperature: what logits are divided by, above 0.
        top_k: draw from that many of the likeliest tokens; None, or more than there are, for all.
        seed: of the draws.

    Returns:
        Prompt and continuation, int32 `[len(prompt) + count]`.
    """
    ctx = context(trained.settings._replace(placement=SINGLE, train=False))
    params, prompt = wide(trained.params), np.asarray(prompt, np.int32)
    start = prompt[-window:]

    def one(carry, key):
        seen, length = carry  # the last tokens, from the left; what stands to the right of them is not looked at
        logits, _ = trained.model.apply(params, trained.extra, seen[None], ctx)
        token = jax.random.categorical(key, _likeliest(logits[0, length - 1], top_k) / temperature).astype(jnp.int32)
        full = length == window
        seen = jnp.where(full, jnp.roll(seen, -1), seen).at[jnp.where(full, window - 1, length)].set(token)
        return (seen, jnp.minimum(length + 1, window)), token

    carry = (jnp.asarray(np.pad(start, (0, window - len(start)))), jnp.int32(len(start)))
    keys = jax.random.split(jax.random.key(seed), count)
    _, tokens = jax.jit(lambda carry, keys: lax.scan(one, carry, keys))(carry, keys)
    return np.concatenate([prompt, np.asarray(tokens)])


def _likeliest(logits, count: int | None):
    """Logits of all but the `count` largest are -inf; of equal ones the first stay."""
    if count is None or count >= logits.size:
        return logits
    values, at = lax.top_k(logits, count)
    return jnp.full_like(logits, -jnp.inf).at[at].set(values)
