"""Number formats, and rounding float32 onto their grids: to nearest or stochastically.

A rounded number stays in float32, so every format takes part in ordinary arithmetic. XLA for CPU takes float32 numbers
below 2^-126 for zeros, in sums, products and comparisons (not in casts): so here magnitudes are rounded as integers,
and bfloat16 and tf32, which have numbers as small, keep them. Subnormals of all other formats are normal float32.
"""

import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.core.refuse import Problem, Refused, near_miss

SIGN, INFINITE = np.uint32(1 << 31), np.uint32(0xFF << 23)  # of a float32's bits


class Format(NamedTuple):
    """A grid of numbers, each exact in float32.

    Attributes:
        name: as in `named`.
        exponent: bits of the exponent; 0 for fixed point.
        mantissa: bits behind the leading one; of fixed point those of the fraction.
        bias: of the exponent: numbers of magnitude 2^(1 - bias) and more are normal. Unused in fixed point.
        largest: the largest finite number.
        infinite: whether there are infinities; where there are none, what is too large becomes NaN unless it saturates.
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    largest: float
    infinite: bool = True

    @property
    def quantum(self) -> float:
        """The distance of neighbours around zero: the smallest subnormal, or the fraction's last bit."""
        return 2.0 ** ((1 - self.bias if self.exponent else 0) - self.mantissa)

    @property
    def least(self) -> float:
        """The most negative finite number: two's complement has one more than positive ones."""
        return -self.largest if self.exponent else -self.largest - self.quantum


def ieee(name: str, exponent: int, mantissa: int) -> Format:
    """A format whose highest exponent stands for infinities and NaN, as in IEEE 754."""
    bias = 2 ** (exponent - 1) - 1
    return Format(name, exponent, mantissa, bias, 2.0**bias * (2 - 2.0**-mantissa))


def fixed(whole: int, fraction: int) -> Format:
    """Fixed point: multiples of 2^-fraction from -2^(whole - 1) on, in two's complement; so `whole` counts the sign.

    Source: Gupta et al. 2015, arXiv:1502.02551, section 3.
    """
    return Format(f"fixed:{whole}.{fraction}", 0, fraction, 0, 2.0 ** (whole - 1) - 2.0**-fraction, False)


FORMATS = {
    one.name: one
    for one in (
        ieee("fp32", 8, 23),
        ieee("tf32", 8, 10),
        ieee("bf16", 8, 7),
        ieee("fp16", 5, 10),
        ieee("fp169", 6, 9),  # Wang et al. 2018, arXiv:1812.08011, who do not say which codes are no numbers
        ieee("fp152", 5, 2),  # the same; it is e5m2
        ieee("e5m2", 5, 2),  # Micikevicius et al. 2022, arXiv:2209.05433, table 1
        Format("e4m3", 4, 3, 7, 448.0, infinite=False),  # the same; float8_e4m3fn
    )
}
DTYPES = {
    "fp32": jnp.float32,
    "bf16": jnp.bfloat16,
    "fp16": jnp.float16,
    "e5m2": jnp.float8_e5m2,
    "e4m3": jnp.float8_e4m3fn,
}
MOST_BITS = 24  # of fixed point, so that sums of two numbers are exact in float32


def named(name: str | jnp.dtype, field: str = "format") -> Format:
    """The format of a name (`fp169`, `fixed:4.12`) or of a dtype that has one.

    Args:
        field: where the name was given, for the message.

    Raises:
        Refused: if there is none.
    """
    if not isinstance(name, str):
        found = [known for known, dtype in DTYPES.items() if jnp.dtype(dtype) == jnp.dtype(name)]
        name = found[0] if found else jnp.dtype(name).name
    if point := re.fullmatch(r"fixed:(\d{1,2})\.(\d{1,2})", name):
        whole, fraction = map(int, point.groups())
        if whole and whole + fraction <= MOST_BITS:
            return fixed(whole, fraction)
        rule = f"has {whole} bits with the sign and {fraction} behind the point: 1 or more, and {MOST_BITS} in all."
        raise Refused([Problem(field, name, rule, "fixed:4.12")])
    if name not in FORMATS:
        rule = f"is no format; there are {', '.join(FORMATS)}, and fixed:I.F with I and F bits around the point."
        raise Refused([Problem(field, name, rule, near_miss(name, list(FORMATS)))])
    return FORMATS[name]


def nearest(x, fmt: Format, saturate: bool = True):
    """`x` rounded to the nearest number of the format, ties to the even one.

    Args:
        x: float32.
        saturate: whether finite numbers beyond the largest become that; else they become infinities, or NaN where
            there are none, as casts do. NaN stays NaN, and infinities stay where the format has them: they tell of
            something that went wrong before. Where it has none they are numbers beyond the largest.

    Returns:
        float32, on the grid.
    """

    def halves(bits, drop):
        return bits + ((np.uint32(1 << drop >> 1) - 1) + ((bits >> drop) & 1))

    return _rounded(x, fmt, saturate, halves, jnp.round)


def stochastic(x, fmt: Format, bits, saturate: bool = True):
    """`x` rounded up or down at random, so that its mean is x: up with the probability (x - below) / (above - below).

    The carry into the next binade is one of the integer. With uniform bits the mean is exact for normal numbers, and to
    2^-32 of a step for smaller ones. Beyond the largest number, and there alone, saturating is biased.

    Args:
        x, saturate: as of `nearest`.
        bits: uint32, as many as x: random.

    Returns:
        float32, on the grid.

    Source: Gupta et al. 2015, arXiv:1502.02551, section 3; Wang et al. 2018, arXiv:1812.08011, eq. 1.
    """

    def carried(magnitude, drop):
        return magnitude + (bits >> (32 - drop))

    def up(steps):
        below = jnp.floor(steps)
        return below + (~bits < ((steps - below) * 2.0**32).astype(jnp.uint32))

    return _rounded(x, fmt, saturate, carried, up)


def _rounded(x, fmt: Format, saturate: bool, normal, coarse):
    """Rounded magnitudes, with the sign of `x` and what is too large as declared.

    Args:
        normal: `normal(bits, drop)`: a float32's magnitude as an integer, with what is added before `drop` bits go.
        coarse: `coarse(steps)`: a count of quanta, rounded.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign, magnitude = bits & SIGN, bits & ~SIGN
    drop, kept = 23 - fmt.mantissa, magnitude
    if fmt.exponent and drop:
        kept = normal(magnitude, drop) >> drop << drop
    if fmt.bias < 127:  # else exponents are those of float32, whose subnormals lie as evenly as these
        steps = lax.bitcast_convert_type(magnitude, jnp.float32) * np.float32(1 / fmt.quantum)
        few = lax.bitcast_convert_type(coarse(steps) * np.float32(fmt.quantum), jnp.uint32)
        kept = jnp.where(magnitude < _bits(2.0 ** (1 - fmt.bias)), few, kept) if fmt.exponent else few
    limit = _bits(fmt.largest) if fmt.exponent else jnp.where(sign > 0, _bits(-fmt.least), _bits(fmt.largest))
    beyond = limit if saturate else INFINITE + np.uint32(0 if fmt.infinite else 1 << 22)
    kept = jnp.where(kept > limit, beyond, kept)
    kept = jnp.where(magnitude >= INFINITE + np.uint32(not fmt.infinite), magnitude, kept)
    if not fmt.exponent:  # there is one zero
        sign = jnp.where(kept == 0, np.uint32(0), sign)
    return lax.bitcast_convert_type(sign | kept, jnp.float32)


def _bits(magnitude: float) -> np.uint32:
    return np.float32(magnitude).view(np.uint32)


def cast(x, dtype):
    """`x` in a dtype of 8 bits: clipped first, since casts beyond the largest number are not alike everywhere.

    torch's give the largest there, those of jax NaN or an infinity. NaN stays NaN; infinities become the largest.
    """
    largest = jnp.finfo(dtype).max.astype(x.dtype)
    return jnp.clip(x, -largest, largest).astype(dtype)
