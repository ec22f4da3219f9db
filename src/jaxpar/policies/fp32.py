"""Single precision throughout."""

from jax.lax import Precision

from jaxpar.core.policy import Policy, accumulated, plain


def fp32() -> Policy:
    """Operands, accumulation and results in float32, also where the hardware's default is less: TPUs, tensor cores."""
    return Policy(
        cast=lambda a, role: a,
        enter=plain,
        dot=accumulated("float32", Precision.HIGHEST),
    )
