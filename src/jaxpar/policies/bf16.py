"""bfloat16 operands, float32 accumulation and parameters."""

import jax.numpy as jnp

from jaxpar.core.policy import Policy


def bf16() -> Policy:
    """Weights and activations are rounded to bfloat16 before they travel; products accumulate in float32.

    Results are rounded to bfloat16 once, so partial sums travel in bfloat16 too: an error that grows with the number of
    devices that share a contraction. No loss scale is needed, since the exponents are those of float32.

    Source: Kalamkar et al. 2019, arXiv:1905.12322, section 3.
    """
    return Policy(
        cast=lambda a, role: a.astype(jnp.bfloat16),
        dot=lambda product, x, w: product(x, w, jnp.float32).astype(jnp.bfloat16),
    )
