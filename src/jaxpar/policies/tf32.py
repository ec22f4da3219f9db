"""TensorFloat-32: float32 whose products see ten bits of mantissa."""

from jax import lax

from jaxpar.core.policy import Operand, Policy, accumulated

NOTE = "NVIDIA's tensor cores multiply so, from Ampere on; elsewhere operands are rounded alike, products are float32"


def tf32() -> Policy:
    """Operands of products are rounded to (8,10) bits, nearest even; accumulation and all else is float32.

    Operands are rounded here, before they travel, so that every backend multiplies the same numbers. `Precision.HIGH`
    then is the one pass of the tensor cores that have it; it loses nothing on a CPU, nor on a TPU, which takes three
    passes of bfloat16. What travels and is kept has 32 bits.

    Source: NVIDIA A100 whitepaper 2020, "TensorFloat-32"; Ootomo and Yokota 2022, arXiv:2203.03341, section 2.
    """
    return Policy(
        cast=lambda a, role: a,
        enter=lambda a, site: (Operand(lax.reduce_precision(a, exponent_bits=8, mantissa_bits=10)), None),
        dot=accumulated("float32", lax.Precision.HIGH),
        tolerance=2e-3,
        note=NOTE,
    )
