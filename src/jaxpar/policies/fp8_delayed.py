"""8-bit operands, scaled by what each array held in the last 1024 uses; float32 accumulation and parameters."""

import jax.numpy as jnp

from jaxpar.core import amax
from jaxpar.core.amax import LENGTH
from jaxpar.core.policy import Policy, narrowed


def fp8_delayed(*, margin: int = 0, length: int = LENGTH, recent: bool = False) -> Policy:
    """As `fp8_current`, but the scale is known before the array is: the largest magnitude of those of earlier uses.

    An array that has grown since is clipped, once; a scale of 1 comes first. Each operand of each product has its own
    history, which a microbatch moves on by one. Products in a loop over time, and what else has no history, are scaled
    by the live array.

    Args:
        margin: powers of two left free above the largest magnitude.
        length: of the history, in uses.
        recent: whether the last use alone decides.

    Source: `recipe.DelayedScaling` of NVIDIA Transformer Engine; Micikevicius et al. 2022, arXiv:2209.05433, section 3.
    """

    def enter(a, site):
        if site.history is None:
            return amax.live(a, site), None
        dtype, largest = amax.dtype_of(site.role), amax.largest(a, site)
        scale = amax.foreseen(site.history, dtype, margin, recent=recent)
        spread = scale.reshape([1] * a.ndim)
        return amax.operand(a, largest, spread, dtype), {"scale": scale, "amax": largest.reshape(())}

    return Policy(
        cast=narrowed(jnp.bfloat16),
        enter=enter,
        dot=amax.product,
        history=lambda: amax.start(length),
        remember=amax.remembered,
        dtype=jnp.bfloat16,
        tolerance=3e-1,
        note="8-bit products on GPUs from Hopper on and on TPU7x; elsewhere the same numbers in a wider dtype",
    )
