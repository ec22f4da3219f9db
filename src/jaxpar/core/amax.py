"""Scales of 8-bit floating point: from the largest magnitude of an array, as it is or as it was in the last steps.

The formulas are those of `flax.linen.fp8_ops` (`compute_scale`, `quantize`, `compute_amax_history`), and
`tests/test_amax.py` holds them to be the same. They are not called: core/ does without flax, and of its functions the
largest magnitude is that of one device's part, the update of a state knows no margin and no `most_recent`, the scale of
what is below 1e-36 is 0 (and 0 / 0 NaN), and the products have a rule of differentiation of their own, without gathers.
`jax.nn.scaled_matmul` is for scales of 32 entries of a contraction each, which Blackwell multiplies; elsewhere it makes
float32 of its operands. qwix scales by the live array alone, and takes hold of the products of flax's models.
"""

import jax.numpy as jnp

from jaxpar.core.formats import cast
from jaxpar.core.policy import Operand, Site, bits

LENGTH = 1024  # steps
FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2


def limit(dtype) -> float:
    """The largest finite number of a format."""
    return float(jnp.finfo(dtype).max)


def dtype_of(role: str):
    """E4M3 for what is known on the way forward, E5M2 for gradients: they need range more than digits.

    Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3.
    """
    return BACKWARD if role == "gradient" else FORWARD


def scale_of(amax, dtype, old, margin: int = 0):
    """What an array divided by uses all of a format, but for `margin` bits; stored is the factor back.

    Args:
        amax: largest magnitude, float32.
        dtype: the format.
        old: what is kept where `amax` is 0, not finite, or so small that the scale would be 0.
        margin: powers of two left free above `amax`.

    Source: NVIDIA Transformer Engine, `recipe.DelayedScaling`; its scale is the reciprocal.
    """
    found = 1.0 / ((limit(dtype) / amax) / 2.0**margin)
    return jnp.where((amax > 0) & jnp.isfinite(amax) & (found > 0), found, old)


def quantized(a, scale, dtype):
    """`a / scale` in the format: what lies beyond its largest number becomes that, since a cast makes NaN of it."""
    return cast(a.astype(jnp.float32) / scale, dtype)


def largest(a, site: Site):
    """Largest magnitude of the whole array, over all devices that hold a part of it: float32, dims of size 1."""
    return site.largest(jnp.max(jnp.abs(a), keepdims=True).astype(jnp.float32))


def operand(a, amax, scale, dtype) -> Operand:
    """The array in 8 bits.

    Infinities would be clipped as well; so that they are seen where a step is judged, the scale of an array that has
    one is NaN.
    """
    return bits(quantized(a, scale, dtype), jnp.where(jnp.isfinite(amax), scale, jnp.nan))


def live(a, site: Site) -> Operand:
    """The array in 8 bits by the scale that it has now (current scaling): it is read twice."""
    amax, dtype = largest(a, site), dtype_of(site.role)
    return operand(a, amax, scale_of(amax, dtype, 1.0), dtype)


def product(multiply, a: Operand, b: Operand):
    """The product of two arrays in 8 bits with one scale each, accumulated in float32, in bfloat16.

    Matrices go to the product as they are, so that the hardware's product of 8 bits is reached where there is one.
    jax's convolutions take one dtype alone and no hardware has one of these two: their operands become bfloat16, which
    has all their numbers.
    """
    scale = a.scale * b.scale
    a, b = (one.values if one.array.ndim == 2 else one.values.astype(jnp.bfloat16) for one in (a, b))
    return (multiply(a, b, jnp.float32) * scale).astype(jnp.bfloat16)


def start(length: int = LENGTH) -> dict:
    """What is kept of one operand: the last scale, and the largest magnitudes of the last `length` uses, latest first.

    The ring rolls, so that after the latest comes the oldest.
    """
    return {"scale": jnp.ones((), jnp.float32), "amax": jnp.zeros(length, jnp.float32)}


def foreseen(history: dict, dtype, margin: int = 0, *, recent: bool = False):
    """The scale for the next use, from those before alone.

    Args:
        history: as of `start`.
        dtype, margin: as of `scale_of`.
        recent: whether the last use counts alone (`most_recent`), rather than the largest of all.
    """
    amax = history["amax"][0] if recent else history["amax"].max()
    return scale_of(amax, dtype, history["scale"], margin)


def remembered(history: dict, seen: dict) -> dict:
    """The history after a use with the scale and of an array with the largest magnitude in `seen`."""
    return {"scale": seen["scale"], "amax": jnp.roll(history["amax"], -1).at[0].set(seen["amax"])}
