"""8-bit operands, sums in (1,6,9) by chunks of 64, (1,6,9) parameters: Wang et al. 2018, emulated."""

import jax.numpy as jnp

from jaxpar.core import chunked
from jaxpar.core.formats import FORMATS, nearest
from jaxpar.core.policy import Operand, Policy, Site

CHUNK = 64
NOTE = "emulated everywhere: no hardware adds in (1,6,9), so products are taken one by one along each contraction"


def fp8_chunked() -> Policy:
    """Operands of the three products of a layer are rounded to (1,5,2), to nearest, and travel in 8 bits.

    Each product is summed in (1,6,9): in order within chunks of 64, then over the chunks. Two kinds of operands are
    rounded to (1,6,9) instead, as in the paper: the data that the first layer sees, and all of the last layer, the one
    into the vocabulary. Convolutions are products of matrices made of patches, as the paper has them. Parameters rest
    in (1,6,9), and what is added to them is rounded stochastically; the loss is scaled by 1000.

    So layouts that split rows alone agree within a few units of (1,6,9)'s last bit. Where devices share a contraction,
    results differ in that bit, and the (1,5,2) operands made of them, now and then, by a quarter: hence the tolerance.

    What is too large: activations and weights saturate; gradients and sums become infinities, so the step is skipped.

    Other than in the paper:
        only the weight, and not momentum nor the term of the weight decay, is rounded after an update: the optimizer's
        own state is float32;
        what is no product with a weight (attention's products, norms, softmax, residual sums, biases) is float32;
        sums over devices and microbatches are float32, so where devices share a contraction, each has chunks of its
        own; bits between products (what travels as float32 of a (1,6,9) operand) are 32;
        rows of the token table are as they rest, and so (1,6,9);
        (1,5,2) and (1,6,9) have infinities and subnormals as IEEE 754 has them, of which the paper says nothing.

    Source: Wang et al. 2018, arXiv:1812.08011, sections 2 and 3.
    """
    return Policy(
        cast=lambda a, role: a,
        enter=_enter,
        dot=lambda multiply, a, b: chunked.matmul(a.array, b.array, CHUNK, FORMATS["fp169"]),
        matrices=True,
        loss_scale="static:1000",
        master="fp169",
        dtype="fp169",
        tolerance=3e-1,
        note=NOTE,
    )


def _enter(a, site: Site) -> tuple[Operand, None]:
    last, data = site.name.endswith(" vocab"), site.name.startswith("-") and site.role == "activation"
    fine = site.role != "gradient"
    if last or data:
        return Operand(nearest(a, FORMATS["fp169"], saturate=fine)), None
    return Operand(nearest(a, FORMATS["fp152"], saturate=fine).astype(jnp.float8_e5m2)), None
