"""The collectives, as one record of functions: the real ones of a device, or ones that only write the bill.

The Context is built on a Wire and nothing else, so the predicted bill is the same walk through the same layers.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.core import compat
from jaxpar.core.cost import Cost, wire_bytes
from jaxpar.core.scheme import Axes

# Primitives whose results are not kept: gathers, what comes from the host, and what would keep one under another shape.
GATHERED = ("all_gather", "all_gather_invariant", "all_gather_reduced", "device_put", "reshape", "broadcast_in_dim")


class Wire(NamedTuple):
    """What a device can do with others; `a` is its local array, `site` names the place for the bill.

    Attributes:
        gather: `gather(a, dim, axis, site, trained, fixed)`: the parts of `dim` on all devices of `axis`, joined;
            `trained` says whether a gradient will flow back, `fixed` whether `a` is the same in every microbatch.
        scatter: `scatter(a, dim, axis, site)`: own part of `dim` of the sum over `axis`.
        total: `total(a, axes, site)`: the sum over `axes`.
        mean: `mean(a, axes, site)`: the mean; its cotangent is summed likewise, since what meets it varies.
        largest: `largest(a, axes, site)`: the elementwise maximum, without gradient.
        vary: `vary(a, axes, site, trained)`: mark as differing over `axes`, so that its gradient is summed over them.
        index: `index(axis)`: own place along `axis`, int32.
        scan: `scan(body, carry, xs)`: `jax.lax.scan`.
        regather: `regather(body)`: gather again in the backward pass what `body` gathers, rather than keep it.
    """

    gather: Callable
    scatter: Callable
    total: Callable
    mean: Callable
    largest: Callable
    vary: Callable
    index: Callable
    scan: Callable
    regather: Callable


def device_wire() -> Wire:
    """The collectives of `jax.lax`, for use inside `jax.shard_map`."""

    def gather(a, dim, axis, site, trained=True, fixed=False):
        return lax.all_gather(a, axis, axis=dim, tiled=True)

    def scatter(a, dim, axis, site):
        return lax.psum_scatter(a, axis, scatter_dimension=dim, tiled=True)

    def total(a, axes, site):
        return lax.psum(a, axes) if axes else a

    def mean(a, axes, site):
        return lax.pmean(a, axes) if axes else a

    def largest(a, axes, site):
        a = lax.stop_gradient(a)
        return lax.pmax(a, axes) if axes else a

    def vary(a, axes, site, trained=True):
        return compat.vary(a, axes)

    def regather(body):
        return jax.checkpoint(
            body, policy=lambda primitive, *_, **__: primitive.name not in GATHERED, prevent_cse=False
        )

    return Wire(gather, scatter, total, mean, largest, vary, lax.axis_index, lax.scan, regather)


class Line(NamedTuple):
    """One line of the bill: a collective that runs `times` times per step, each device putting in `operand` bytes."""

    site: str
    phase: str
    kind: str
    axes: Axes
    group: int
    operand: int
    times: int

    @property
    def bytes(self) -> float:
        """Bytes this device sends for it in a step."""
        return self.times * wire_bytes(self.kind, self.operand, self.group)


def cost_of(lines) -> Cost:
    """The bytes of all lines, by axes and kind."""
    sent = {}
    for line in lines:
        key = ("+".join(line.axes), line.kind)
        sent[key] = sent.get(key, 0.0) + line.bytes
    return Cost({key: value for key, value in sent.items() if value})


class Ledger(NamedTuple):
    """A Wire that only writes down what it was asked for, and `lines`, what it has written.

    `entry(site, phase, kind, a, axes)` writes one line by hand; within `repeated(n)` every line counts n times. The
    outermost `repeated` is the loop over microbatches, from which XLA moves gathers of what is `fixed`.
    """

    wire: Wire
    lines: list[Line]
    entry: Callable
    repeated: Callable


def ledger(sizes: Mapping[str, int]) -> Ledger:
    """A wire for `jax.eval_shape`: shapes as on a device, nothing computed, forward and backward bytes written down.

    Args:
        sizes: mesh axes and their sizes, major first.
    """
    lines: list[Line] = []
    times, regathered = [1], [False]

    def entry(site, phase, kind, a, axes, fixed=False):
        without = phase != "forward" and not jnp.issubdtype(a.dtype, jnp.floating)  # ids have no gradient
        if without or not axes or (phase == "regather" and not regathered[-1]):
            return
        axes = tuple(axis for axis in sizes if axis in axes)
        group = math.prod(sizes[axis] for axis in axes)
        count = 1 if fixed and len(times) == 2 else times[-1]
        lines.append(Line(site, phase, kind, axes, group, a.size * a.dtype.itemsize, count))

    @contextmanager
    def repeated(count: int) -> Iterator[None]:
        times.append(times[-1] * count)
        yield
        times.pop()

    def scan(body, carry, xs):
        count = jax.tree.leaves(xs)[0].shape[0]
        with repeated(count):
            carry, y = body(carry, jax.tree.map(lambda leaf: leaf[0], xs))
        return carry, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), y)

    def regather(body):
        def counted(*args):
            regathered.append(True)
            result = body(*args)
            regathered.pop()
            return result

        return counted

    moves = _counted_moves(sizes, entry)
    return Ledger(Wire(*moves, index=lambda axis: jnp.int32(0), scan=scan, regather=regather), lines, entry, repeated)


def _counted_moves(sizes: Mapping[str, int], entry: Callable):
    """gather, scatter, total, mean, largest and vary of a ledger: what each sends forward, and its transpose back."""

    def gather(a, dim, axis, site, trained=True, fixed=False):
        whole = jnp.concatenate([a] * sizes[axis], dim)
        entry(site, "forward", "all_gather", a, (axis,), fixed)
        entry(site, "regather", "all_gather", a, (axis,))
        if trained:
            entry(site, "backward", "reduce_scatter", whole, (axis,))
        return whole

    def scatter(a, dim, axis, site):
        part = lax.slice_in_dim(a, 0, a.shape[dim] // sizes[axis], axis=dim)
        entry(site, "forward", "reduce_scatter", a, (axis,))
        entry(site, "backward", "all_gather", part, (axis,))
        return part

    def total(a, axes, site):
        entry(site, "forward", "all_reduce", a, axes)
        return a

    def mean(a, axes, site):
        entry(site, "backward", "all_reduce", a, axes)
        return total(a, axes, site)

    def vary(a, axes, site, trained=True):
        if trained:
            entry(site, "backward", "all_reduce", a, axes)
        return a

    return gather, scatter, total, mean, total, vary
