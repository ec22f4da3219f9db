"""Local products: matrices and convolutions, each with the two products of its backward pass.

A product is three: y = x w, dx = dy wᵀ, dw = xᵀ dy; each is one `dot` of two operands (`core/policy.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.core import compat
from jaxpar.core.policy import Operand


class Bilinear(NamedTuple):
    """One kind of product.

    Attributes:
        forward: `forward(dot, x, w)` is y.
        by_x: `by_x(dot, dy, w, like)` is dx, in the shape of `like`.
        by_w: `by_w(dot, x, dy, like)` is dw.
    """

    forward: Callable
    by_x: Callable
    by_w: Callable


def _matmul(a, b, dtype, precision=None):
    return jnp.matmul(a, b, preferred_element_type=dtype, precision=precision)


def _forward(dot, x: Operand, w: Operand):
    # as one matrix: XLA on CPU is slower on gradients of a batch of them
    return dot(_matmul, x.flat, w).reshape(*x.array.shape[:-1], w.array.shape[-1])


matmul = Bilinear(
    forward=_forward,
    by_x=lambda dot, dy, w, like: dot(_matmul, dy.flat, w.T).reshape(like.shape),
    by_w=lambda dot, x, dy, like: dot(_matmul, x.flat.T, dy.flat),
)


def _space(rank: int) -> tuple[str, str, str]:
    """Order of the dims of x, w and y of a convolution: of images, or of volumes."""
    space = "HW" if rank == 4 else "DHW"
    return f"N{space}C", f"{space}IO", f"N{space}C"


def _window(rank: int, strides: int, padding: str | int) -> tuple:
    """Strides and padding of each dim of space."""
    sides = padding if isinstance(padding, str) else [(padding, padding)] * (rank - 2)
    return (strides,) * (rank - 2), sides


def conv(strides: int, padding: str | int = "SAME") -> Bilinear:
    """Convolution of x[batch, height, width, in] with w[height, width, in, out], or of both with a depth before height.

    Args:
        strides: between entries of y, along each dim of space.
        padding: `"SAME"`: zeros that keep size / strides; `"VALID"`: none; or how many on each side.
    """

    def apply(x, w, dtype=None, precision=None):
        return lax.conv_general_dilated(
            x,
            w,
            *_window(x.ndim, strides, padding),
            dimension_numbers=_space(x.ndim),
            preferred_element_type=dtype,
            precision=precision,
        )

    def by_x(dot, dy, w, like):
        def multiply(dy, w, dtype, precision=None):  # jax transposes convolutions of one dtype only
            return _transposed(lambda x: apply(x, w, None, precision), like, dy).astype(dtype)

        return dot(multiply, dy, w)

    def by_w(dot, x, dy, like):
        def multiply(x, dy, dtype, precision=None):
            return _transposed(lambda w: apply(x, w, None, precision), like, dy).astype(dtype)

        return dot(multiply, x, dy)

    return Bilinear(lambda dot, x, w: dot(apply, x, w), by_x, by_w)


def patched(strides: int, padding: str | int = "SAME") -> Bilinear:
    """The same convolution as a product of matrices: a row holds the patch of x that one entry of y sees.

    For operands without a scale.
    """

    def patches(w_shape):
        return lambda x: lax.conv_general_dilated_patches(
            x, w_shape[:-2], *_window(x.ndim, strides, padding), dimension_numbers=_space(x.ndim)
        )  # features: in, then space

    def matrix(w):
        return Operand(jnp.moveaxis(w.array, -2, 0).reshape(-1, w.array.shape[-1]))

    def forward(dot, x, w):
        seen = patches(w.array.shape)(x.array)
        return dot(_matmul, Operand(seen).flat, matrix(w)).reshape(*seen.shape[:-1], -1)

    def by_x(dot, dy, w, like):
        found = dot(_matmul, dy.flat, matrix(w).T).reshape(*dy.array.shape[:-1], -1)
        return _transposed(patches(w.array.shape), like, found)

    def by_w(dot, x, dy, like):
        found = dot(_matmul, Operand(patches(like.shape)(x.array)).flat.T, dy.flat)
        *space, into, out = like.shape
        return jnp.moveaxis(found.reshape(into, *space, out), 0, -2)

    return Bilinear(forward, by_x, by_w)


def einsum(dims: str, a, b):
    """`Context.einsum`: products of activations accumulate in float32; their gradients are rounded as they are.

    So on the way back as on the way forward both operands have the dtype of activations.

    Args:
        dims: as of `jnp.einsum`, with two operands.
        a, b: of one dtype.
    """

    def multiply(a, b, dtype=None):
        return jnp.einsum(dims, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)

    @jax.custom_vjp
    def product(a, b):
        return multiply(a, b, jnp.float32)

    def backward(kept, gradient):
        a, b = kept
        gradient = gradient.astype(a.dtype)
        return (
            _transposed(lambda a: multiply(a, b), jax.typeof(a), gradient),
            _transposed(lambda b: multiply(a, b), jax.typeof(b), gradient),
        )

    product.defvjp(lambda a, b: (product(a, b), (a, b)), backward)
    return product(a, b)


def _transposed(linear: Callable, like, cotangent):
    """The cotangent of what `linear` takes, an array like `like` in the dtype of the cotangent of what it gives."""
    axes = compat.varying_axes(cotangent)
    pull = jax.linear_transpose(lambda a: compat.vary(linear(a), axes), like.update(dtype=cotangent.dtype))
    made = jax.eval_shape(linear, like.update(dtype=cotangent.dtype))
    return pull(compat.vary(cotangent, compat.varying_axes(made)))[0]
