"""A classifier whose layers keep state of both passes that depends on the order of all microbatches before.

`tests/test_backward_state.py` runs it as a user's own model: `tests/controlled.py:controlled`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxpar.core.parts import chain, function, residual
from jaxpar.core.types import Layer
from jaxpar.layers import dense
from jaxpar.layers.embedding import head
from jaxpar.layers.stack import stack


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def steered(mean, x, gain, drift, count):
    """x times gain; both gradients are bent by `drift`, the running sum of past gradients, each in its own way.

    The cotangents of `drift` and `count` are their next values.

    Args:
        mean: `mean(dy) -> [width]` over all rows.
        x, gain: `[rows, width]`.
        drift: `[width]`.
        count: scalar; how often this went backward.
    """
    return x * gain


def _forth(mean, x, gain, drift, count):
    return x * gain, (x, gain, drift, count)


def _back(mean, kept, dy):
    x, gain, drift, count = kept
    return (dy - drift) * gain, dy * x * (1 + drift), 0.9 * drift + mean(dy), count + 1


steered.defvjp(_forth, _back)


def control(width: int) -> Layer:
    """Shift rows by their running mean before this microbatch, times a gain, with gradients that are steered."""

    def init(key):
        state = {"forward": {"mean": jnp.zeros(width)}, "backward": {"drift": jnp.zeros(width), "count": jnp.zeros(())}}
        return {"gain": jnp.ones(width)}, state

    def apply(params, extra, x, ctx):
        def mean(rows):
            return jax.lax.stop_gradient(ctx.mean(rows, "embed", "batch")).reshape(-1)

        before, backward = extra["forward"]["mean"], extra["backward"]
        # jax sums the gradient of the gain over rows; in a step of its own where the weights wait
        gain = jnp.broadcast_to(params["gain"], x.shape) + 0 * jax.lax.stop_gradient(x)
        y = steered(mean, x - before, gain, backward["drift"], backward["count"])
        return y, extra | {"forward": {"mean": 0.9 * before + 0.1 * mean(x)}}

    dims = {"forward": {"mean": "embed"}, "backward": {"drift": "embed", "count": ""}}
    return Layer(init, apply, dims=({"gain": "embed"}, dims))


def controlled(*, example: tuple[int, ...], vocab: int, layers: int = 4, width: int = 16) -> Layer:
    """From `x[batch, *example]` to `logits[batch, vocab]`, with such a layer before, in and after the blocks."""
    branch = {"mlp": dense.mlp(width, 2 * width, "gelu_tanh"), "control": control(width)}
    return chain(
        {
            "flatten": function(lambda x, ctx: x.reshape(x.shape[0], -1)),
            "stem": dense.dense(math.prod(example), width, "- embed"),
            "enter": control(width),
            "blocks": stack(residual(branch), layers),
            "leave": control(width),
            "head": head(width, vocab),
        }
    )
