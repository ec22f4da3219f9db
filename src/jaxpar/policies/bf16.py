"""bfloat16 operands, float32 accumulation and parameters."""

import jax.numpy as jnp

from jaxpar.core.policy import Policy, accumulated, plain


def bf16() -> Policy:
    """Weights, activations and gradients of activations are rounded to bfloat16 before they travel.

    Products accumulate in float32, and results are rounded to bfloat16 once; so partial sums travel in bfloat16 too: an
    error that grows with the number of devices that share a contraction. Gradients of weights are summed in bfloat16
    over devices that a scheme places, and over those of `data` under ZeRO 3; else over those, and over microbatches, in
    float32. No loss scale is needed, since the exponents are those of float32.

    Source: Kalamkar et al. 2019, arXiv:1905.12322, section 3.
    """
    return Policy(
        cast=lambda a, role: a.astype(jnp.bfloat16),
        enter=plain,
        dot=accumulated(jnp.bfloat16),
        dtype=jnp.bfloat16,
        tolerance=5e-2,
    )
