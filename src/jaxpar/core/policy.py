"""Precision: how the operands of products are rounded before they travel, and how products accumulate."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.tree_util.register_dataclass, data_fields=["array", "scale"], meta_fields=["along", "format"])
@dataclasses.dataclass(frozen=True)
class Operand:
    """One factor of a product, as it travels between devices.

    Attributes:
        array: in the dtype in which it travels and is multiplied.
        scale: float32, what the array is to be multiplied by to be itself again: as many dims as `array`, each 1 or the
            number of its entries or blocks; None for 1.
        along: dims, counted from the last (-1, -2, ...), along which `scale` has more than one entry over all devices:
            it is gathered along them as the array is.
        format: of 8 bits, of which `array` holds the bits as uint8; None if it holds numbers. So it travels and is kept
            for the backward pass as it is: `jax.checkpoint` rounds floats that it keeps as if each format had
            infinities, which makes NaN of the numbers of E4M3 from 248 on (jax 0.10.2 and 0.12), and XLA for CPUs sends
            float8 as float16.
    """

    array: Any
    scale: Any = None
    along: tuple[int, ...] = ()
    format: Any = None

    @property
    def values(self):
        """The array as numbers."""
        return self.array if self.format is None else lax.bitcast_convert_type(self.array, self.format)

    @property
    def T(self) -> "Operand":
        """The operand with its two dims swapped."""
        scale = None if self.scale is None else self.scale.T
        along = tuple(-3 - dim for dim in self.along)
        return dataclasses.replace(self, array=self.array.T, scale=scale, along=along)

    @property
    def flat(self) -> "Operand":
        """The operand with all its rows in one dim."""
        rows = tuple({max(dim, -2) for dim in self.along})
        scale = None if self.scale is None else self.scale.reshape(-1, self.scale.shape[-1])
        array = self.array.reshape(-1, self.array.shape[-1])
        return dataclasses.replace(self, array=array, scale=scale, along=rows)


class Site(NamedTuple):
    """What a policy may ask about the array that it rounds: one operand of one product, on one device.

    Attributes:
        name: the product, such as `"embed mlp"`.
        role: `"activation"`, `"weight"`, or `"gradient"` (of the product's result).
        parts: for each dim of the local array, into how many parts it lies over devices.
        largest: `largest(a, dims)`: elementwise maximum of `a` over the devices that hold other parts of those dims,
            counted from the last; by default of all. It has no gradient.
        bits: `bits()`: uint32 random bits, like the array: a function of (seed, step, layer, product, role, global
            index) alone; None in evaluation, and unless the policy `draws`.
        history: what delayed scaling kept of this operand, or None.
    """

    name: str
    role: str
    parts: tuple[int, ...]
    largest: Callable
    bits: Callable | None
    history: Any


class Policy(NamedTuple):
    """Stands before every gather and around every product, forward and back, and nowhere else.

    Of y = x w, x and w are rounded on the way forward and the gradient dy of y on the way back, each once; then
    dx = dy wᵀ and dw = xᵀ dy are products like the first one.

    Attributes:
        cast: `cast(a, role)`, role `"weight"` or `"activation"`: the dtype in which an array comes to `enter`, and in
            which it travels where it is no operand: ZeRO's gathers, tables that are looked up.
        enter: `enter(a, site) -> (Operand, seen)`: round an operand, before it is gathered; `a` is an activation
            [rows.., k], a weight [k, n] (of a convolution [h, w, k, n]) or a gradient [rows.., n]. What was seen of it
            is None where `site.history` is.
        dot: `dot(multiply, a, b)`: the product of two operands in the dtype of results, by
            `multiply(a.values, b.values, dtype, precision)`, which accumulates in `dtype`. Operands are matrices, but
            those of convolutions.
        draws: whether `enter` rounds stochastically, by `Site.bits`.
        matrices: whether convolutions are to be products of matrices as well, made of patches.
        gradient: `gradient(a, dims)`: the gradient of a parameter as the optimizer gets it, once it is summed over
            devices and microbatches; `dims` are the words of the parameter. None for what the sums are, float32.
        history: `history() -> tree`: what delayed scaling begins with, for one operand; None if nothing is kept.
        remember: `remember(history, seen) -> history`: the next one. It is asked for on the way back, where each
            microbatch finds what the one before it left: of several in a pipeline the way forward may come before that.
        loss_scale: what `loss_scale=auto` means: text of the recipe's field.
        master: what `master=auto` means: in which format the parameters rest between steps.
        dtype: what they rest in under `master=none`.
        tolerance: how far, over all layouts, losses and gradients may lie from those of one device, relative to the
            largest entry of a leaf.
        block: how many features in a row share a scale, where some do: what a device holds must be whole blocks.
        note: what is emulated, or which hardware has it; empty if nothing is to be said.
    """

    cast: Callable
    enter: Callable
    dot: Callable
    draws: bool = False
    matrices: bool = False
    gradient: Callable | None = None
    history: Callable | None = None
    remember: Callable | None = None
    loss_scale: str = "none"
    master: str = "fp32"
    dtype: Any = jnp.float32
    tolerance: float = 5e-6
    block: int = 1
    note: str = ""


def bits(array, scale, along: tuple[int, ...] = ()) -> Operand:
    """An operand of an array in a format of 8 bits."""
    return Operand(lax.bitcast_convert_type(array, jnp.uint8), scale, along, array.dtype)


def narrowed(dtype) -> Callable:
    """`Policy.cast` to a dtype of 16 bits that is rounded to indeed.

    Where XLA computes what comes before and after in float32 it may leave a cast to 16 bits and back out
    (`xla_allow_excess_precision`): where an array is gathered it does not, where it stays it does. Then a scale from
    the largest magnitude is another one, and with it every number of 8 bits.
    """
    bits = jnp.finfo(dtype)

    def cast(a, role):
        a = lax.reduce_precision(a, bits.nexp, bits.nmant) if a.dtype == jnp.float32 else a
        return a.astype(dtype)

    return cast


def plain(a, site: Site) -> tuple[Operand, None]:
    """An operand as it comes: `Policy.enter` of a policy whose `cast` says it all."""
    return Operand(a), None


def accumulated(dtype, precision=None) -> Callable:
    """`Policy.dot` that accumulates in float32 and rounds the result once.

    Args:
        dtype: of results.
        precision: a `jax.lax.Precision`: of products of float32, on hardware that has several.
    """
    return lambda multiply, a, b: multiply(a.values, b.values, jnp.float32, precision).astype(dtype)
