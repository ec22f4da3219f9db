"""8-bit weights, activations, errors and gradients, float16 parameters: Mellempudi et al. 2019, emulated."""

import jax.numpy as jnp

from jaxpar.core.formats import FORMATS, nearest, stochastic
from jaxpar.core.policy import Operand, Policy, Site

NOTE = (
    "emulated: operands travel in 8 bits and are multiplied as bfloat16, which loses nothing; no GPU takes e5m2 twice"
)


def fp8_mixed() -> Policy:
    """Operands are rounded to e5m2, whose range is that of float16, and products accumulate in float32.

    Weights are rounded to nearest, activations and the gradients of results (the paper's errors) stochastically: so
    the noise of rounding has no mean. In evaluation nothing is drawn, and all is rounded to nearest. The first layer,
    which sees the data, and the last, into the vocabulary, have float16 operands. Parameters rest in float16, the
    optimizer works in float32, and the loss is scaled dynamically above a minimum that rises ("enhanced").

    What is too large: activations and weights saturate; gradients become infinities, so the step is skipped, by which
    the loss scale learns of it.

    Other than in the paper:
        gradients of weights are rounded to e5m2, to nearest, as they go to the optimizer: before, they are summed over
        devices and microbatches in float32;
        what is no product with a weight is float32, attention's products too; rows of the token table are as they rest;
        in a loop over time every step draws the same bits, so a recurrent model's noise is correlated over time;
        what is added to the parameters is rounded stochastically, unless `rounding=nearest`.

    Source: Mellempudi et al. 2019, arXiv:1905.12334, section 3.
    """
    return Policy(
        cast=lambda a, role: a,
        enter=_enter,
        dot=_dot,
        draws=True,
        gradient=_gradient,
        loss_scale="enhanced",
        master="fp16",
        dtype=jnp.float16,
        tolerance=2.5e-1,  # a sum near the middle between two numbers of e5m2 may be rounded to either
        note=NOTE,
    )


def _enter(a, site: Site) -> tuple[Operand, None]:
    fine = site.role != "gradient"
    if site.name.endswith(" vocab") or site.name.startswith("-"):
        return Operand(nearest(a, FORMATS["fp16"], saturate=fine).astype(jnp.float16)), None
    if site.role == "weight" or site.bits is None:
        rounded = nearest(a, FORMATS["e5m2"], saturate=fine)
    else:
        rounded = stochastic(a, FORMATS["e5m2"], site.bits(), saturate=fine)
    return Operand(rounded.astype(jnp.float8_e5m2)), None


def _gradient(a, dims: str):
    """Of weights, the first and the last in float16; other parameters are no factors of products."""
    words = dims.removeprefix("layers ").split()
    if len(words) < 2 or words[-2] == "context":
        return a
    return nearest(a, FORMATS["fp16" if words[-2] == "-" or "vocab" in words else "e5m2"], saturate=False)


def _dot(multiply, a: Operand, b: Operand):
    wide = (jnp.bfloat16 if one.array.dtype == jnp.float8_e5m2 else one.array.dtype for one in (a, b))
    return multiply(*(one.array.astype(dtype) for one, dtype in zip((a, b), wide, strict=True)), jnp.float32)
