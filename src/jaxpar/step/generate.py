"""Text from a trained language model, on one device."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.core.scheme import Scheme
from jaxpar.core.types import Layer
from jaxpar.plan.context import context
from jaxpar.plan.layout import Placement
from jaxpar.plan.product import Settings


def generate(model: Layer, settings: Settings, params, extra, prompt, *, count: int, window: int, seed: int, heat: float):
    """Continue a prompt token by token.

    Args:
        model: from `ids[batch, context]` to logits.
        settings: of the run, for its precision; the layout is that of one device.
        params: unpadded parameters.
        extra: the model's state without gradient.
        prompt: ids, at least one.
        count: tokens to add.
        window: how many tokens the model sees at most.
        seed: of the draws.
        heat: temperature, above 0; the lower, the likelier the tokens.

    Returns:
        Prompt and continuation, int32 `[len(prompt) + count]`.
    """
    single = Placement(Scheme({}, ((), ()), ((), ()), ((), ()), ((), ())))
    ctx = context(settings._replace(placement=single, train=False))
    prompt = np.asarray(prompt, np.int32)
    size = max(window, 1)

    def one(carry, key):
        recent, length = carry  # the last tokens, left-aligned
        logits, _ = model.apply(params, extra, recent[None], ctx)
        token = jax.random.categorical(key, logits[0, length - 1] / heat).astype(jnp.int32)
        full = length == size
        recent = jnp.where(full, jnp.roll(recent, -1), recent)
        recent = recent.at[jnp.where(full, size - 1, length)].set(token)
        return (recent, jnp.minimum(length + 1, size)), token

    @jax.jit
    def run(recent, length, keys):
        return lax.scan(one, (recent, length), keys)[1]

    start = prompt[-size:]
    recent = np.pad(start, (0, size - len(start)))
    tokens = run(recent, jnp.int32(len(start)), jax.random.split(jax.random.key(seed), count))
    return np.concatenate([prompt, np.asarray(tokens)])
