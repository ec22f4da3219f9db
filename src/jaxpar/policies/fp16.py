"""float16 operands, float32 accumulation and parameters, with a dynamic loss scale."""

import jax.numpy as jnp

from jaxpar.core.policy import Policy, accumulated, plain


def fp16() -> Policy:
    """As `bf16`, in float16: three more bits of mantissa, but gradients below 6e-8 vanish, and 65504 is the largest.

    So the loss is scaled, by default dynamically. Norm statistics, softmax, loss and sums of embeddings are float32.

    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.
    """
    return Policy(
        cast=lambda a, role: a.astype(jnp.float16),
        enter=plain,
        dot=accumulated(jnp.float16),
        loss_scale="dynamic",
        dtype=jnp.float16,
        tolerance=2e-2,
    )
