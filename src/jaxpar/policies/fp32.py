"""Single precision throughout."""

import jax.numpy as jnp

from jaxpar.core.policy import Policy


def fp32() -> Policy:
    """Operands, accumulation and results in float32."""
    return Policy(cast=lambda a, role: a, dot=lambda product, x, w: product(x, w, jnp.float32))
