"""8-bit operands, scaled by what each array holds now; float32 accumulation and parameters."""

import jax.numpy as jnp

from jaxpar.core import amax
from jaxpar.core.policy import Policy, narrowed


def fp8_current() -> Policy:
    """Weights and activations in E4M3, gradients in E5M2, each with one scale from its largest magnitude.

    The scale is shared by all devices that hold parts of the array, so that layouts agree; operands are gathered in 8
    bits. Products accumulate in float32, results are bfloat16, as is all that lies between products. Convolutions
    multiply the same 8-bit numbers in bfloat16.

    Source: Micikevicius et al. 2022, arXiv:2209.05433; `recipe.Float8CurrentScaling` of NVIDIA Transformer Engine.
    """
    return Policy(
        cast=narrowed(jnp.bfloat16),
        enter=lambda a, site: (amax.live(a, site), None),
        dot=amax.product,
        dtype=jnp.bfloat16,
        tolerance=3e-1,
        note="8-bit products on GPUs from Hopper on and on TPU7x; elsewhere the same numbers in a wider dtype",
    )
