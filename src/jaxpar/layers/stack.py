"""A stack of equal blocks: one leaf per parameter, with a leading `layers` dim."""

import jax

from jaxpar.core.types import Layer, Part


def stack(body: Layer, layers: int) -> Layer:
    """`layers` copies of `body`, one after the other, each with parameters of its own.

    The Context decides how they run: in one scan, or unrolled.
    """

    def init(key):
        return jax.vmap(body.init)(jax.random.split(key, layers))

    def apply(params, extra, x, ctx):
        return ctx.block(body.apply)(params, extra, x, ctx)

    dims = jax.tree.map(lambda words: f"layers {words}", body.dims)
    return Layer(init, apply, dims, parts=(Part("block", body, "block"),), blocks=layers)
