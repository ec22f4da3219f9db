"""8-bit operands with a scale for each 128 features, or 128 x 128 weights; float32 accumulation and parameters."""

import jax.numpy as jnp

from jaxpar.core import blocks
from jaxpar.core.policy import Operand, Policy, bits, narrowed

FORMAT = jnp.float8_e4m3fn


def fp8_block() -> Policy:
    """E4M3 everywhere: activations and gradients in blocks of 1 x 128 features, weights of 128 x 128.

    For the gradient of a weight, whose contraction is over tokens, activation and gradient are laid out anew in blocks
    of 128 tokens of this device: from their 8 bits, as the paper does with activations. All scales are powers of two,
    where the paper has them so for some layers only: then nothing is rounded twice but what is below the least number
    of its new block. Results are bfloat16.

    The product with `vocab`, the head, is one of bfloat16, as in the paper; so are convolutions, of 8-bit operands. A
    dim that several devices share out must be whole blocks on each, or one block in all, whose scale they share.

    Source: DeepSeek-AI 2024 (DeepSeek-V3), arXiv:2412.19437, section 3.3.
    """
    return Policy(
        cast=narrowed(jnp.bfloat16),
        enter=_enter,
        dot=_dot,
        dtype=jnp.bfloat16,
        tolerance=2e-1,
        note="blocks are multiplied one by one and added in float32, which takes a kernel of its own to be fast",
        block=blocks.BLOCK,
    )


def _enter(a, site):
    if site.name.endswith("vocab"):
        return Operand(a), None
    features = 2 if site.role == "weight" else 1
    first = a.ndim - features
    sizes = [1] * first + [
        blocks.size_of(count, parts) for count, parts in zip(a.shape[first:], site.parts[first:], strict=True)
    ]
    counts = [count * parts for count, parts in zip(a.shape, site.parts, strict=True)]
    shared = tuple(d - a.ndim for d in range(first, a.ndim) if site.parts[d] > 1 and counts[d] <= blocks.BLOCK)

    def largest(amax):
        return site.largest(amax, shared) if shared else amax

    array, scale = blocks.blocked(a, tuple(sizes), FORMAT, largest)
    along = tuple(d for d in range(-a.ndim, 0) if d not in shared and (scale.shape[d] > 1 or site.parts[d] > 1))
    return bits(array, scale, along), None


def _dot(multiply, a, b):
    if a.scale is not None and a.array.ndim == 2:
        return blocks.product(multiply, a, b).astype(jnp.bfloat16)
    return multiply(blocks.whole(a, jnp.bfloat16), blocks.whole(b, jnp.bfloat16), jnp.float32).astype(jnp.bfloat16)
