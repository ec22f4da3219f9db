"""What a layer may ask of entries that lie on other devices: means, streams of states, sums of weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.core.recurrence import prefix
from jaxpar.core.scheme import Axes
from jaxpar.plan import layout
from jaxpar.plan.contraction import Recorded
from jaxpar.plan.draws import offset


def words_of(dims: str, rank: int) -> list[str]:
    """A word for each dim of an activation, of which only the last may have been given."""
    return dims.split() if " " in dims or rank == 1 else [*layout.ROWS_OF_RANK[rank], dims]


def mean_of(settings) -> Callable:
    """`Context.mean`; args: `Settings`."""

    def mean(x, dims, over=None, parts=None, trained=True):
        words, parts = words_of(dims, x.ndim), parts or {}
        x = x if trained else lax.stop_gradient(x)
        lies = layout.activation(settings.placement, " ".join(words), x.ndim)
        chosen = (over or words[-1]).split()
        if missing := [word for word in {*chosen, *parts} if word not in words]:
            raise ValueError(f"mean over {missing}, but x has the dims {words}.")
        where = tuple(words.index(word) for word in chosen if parts.get(word, 1) == 1)
        if where:
            axes = layout.axes_of(tuple(lies[dim] for dim in where))
            x = _mean_of_devices(settings, x.mean(where, keepdims=True), axes, f"mean over {' '.join(chosen)}", trained)
        for word, count in parts.items():
            if count > 1:
                x = _mean_of_parts(settings, x, words.index(word), lies[words.index(word)], (word, count, trained))
        return x

    return mean


def _mean_of_devices(settings, x, axes: Axes, site: str, trained: bool):
    """The mean of what the devices along `axes` hold; the bill has a way back for what is trained."""
    if trained:
        return settings.wire.mean(x, axes, site)
    return settings.wire.total(x, axes, site) / layout.size(settings.placement.scheme, axes)


def _mean_of_parts(settings, x, dim: int, axes: Axes, how: tuple[str, int, bool]):
    """Each entry of a dim replaced by the mean of the part of the whole dim that it lies in.

    Where devices hold whole parts nothing is sent; else the sums of all parts are.

    Args:
        settings: `Settings`.
        x: entries.
        dim: the dim that is cut.
        axes: over which it lies.
        how: its word, into how many parts it is cut, and whether a gradient goes back.
    """
    word, count, trained = how
    here, devices = x.shape[dim], layout.size(settings.placement.scheme, axes)
    if here * devices % count:
        raise ValueError(f"{word} has {here * devices} entries, which {count} equal parts do not divide.")
    long = here * devices // count
    if here % long == 0:
        cut = x.reshape(*x.shape[:dim], here // long, long, *x.shape[dim + 1 :])
        return jnp.broadcast_to(cut.mean(dim + 1, keepdims=True), cut.shape).reshape(x.shape)
    place = (offset(settings, axes, here) + jnp.arange(here)) // long
    chosen = jax.nn.one_hot(place, count, dtype=x.dtype)  # [entry, part]
    # the mean over devices, times their number, is the sum; its cotangent is summed likewise
    sums = jnp.moveaxis(jnp.tensordot(x, chosen, [[dim], [0]], precision=lax.Precision.HIGHEST), -1, dim)
    means = _mean_of_devices(settings, sums * (devices / long), axes, f"mean over parts of {word}", trained)
    return jnp.take(means, place, axis=dim)


def recurrence_of(settings) -> Callable:
    """`Context.recurrence`; args: `Settings`.

    Each device combines its own entries to one affine map of the state; the maps of all devices are gathered, and those
    before its own give the state that its first entry meets.

    Source: Blelloch 1990, CMU-CS-90-190, section 1.4.1, for states as a prefix sum of affine maps.
    """

    def recurrence(decay, inputs, start, dims="batch embed"):
        axes = layout.activation(settings.placement, dims, inputs.ndim)[0]
        inputs, starts = map(lax.stop_gradient, (inputs, start))
        starts = starts if start.ndim == inputs.ndim else starts[None]
        here, devices, parts = len(inputs), layout.size(settings.placement.scheme, axes), len(starts)
        if here * devices % parts:
            raise ValueError(f"{here * devices} examples are no {parts} equal parts.")
        long = here * devices // parts
        index = offset(settings, axes, here) + jnp.arange(here)
        begins = (index % long == 0).reshape(-1, *[1] * (inputs.ndim - 1))
        own = jnp.take(starts, index // long, axis=0)  # the start of the part that each entry lies in
        if parts > 1 or not isinstance(decay, float):
            decay = jnp.broadcast_to(lax.stop_gradient(jnp.asarray(decay, inputs.dtype)), inputs.shape)
            decay, inputs = jnp.where(begins, 0, decay), jnp.where(begins, decay * own, 0) + inputs
        products, states = prefix(decay, inputs)
        begin = not axes or here % long == 0  # no device goes on with what another began
        met = own[:1] if begin else _met(settings, products[-1:], states[-1:], starts[:1], axes)
        states = states + products * met
        before = jnp.where(begins, own, jnp.concatenate([met, states[:-1]]))
        if not axes:
            return before, states[long - 1 :: long].reshape(start.shape)
        ends = jax.nn.one_hot(jnp.where(index % long == long - 1, index // long, parts), parts, dtype=inputs.dtype)
        last = jnp.tensordot(ends, states, [[0], [0]], precision=lax.Precision.HIGHEST)
        return before, settings.wire.total(last, axes, "end of a recurrence").reshape(start.shape)

    return recurrence


def _met(settings, products, states, start, axes: Axes):
    """The state that this device's first entry meets: `[1, width]`; any number where a later part of it begins."""
    maps = jnp.stack([products, states], 1)
    for axis in reversed(axes):
        maps = settings.wire.gather(maps, 0, axis, "a recurrence", trained=False)
    products, states = prefix(maps[:, 0], maps[:, 1])
    place = offset(settings, axes, 1)
    after = lax.dynamic_slice_in_dim(states + products * start, jnp.maximum(place - 1, 0), 1, axis=0)
    return jnp.where(place == 0, start, after)


def columns_of(settings) -> Callable:
    """`Context.columns`; args: `Settings`."""

    def columns(a, dims):
        a = a.array if isinstance(a, Recorded) else a
        into, out = layout.weight(settings.placement, dims)
        wanted = layout.features(settings.placement, dims.split()[1])
        sums = settings.wire.total(a.sum(tuple(range(a.ndim - 1))), into, f"columns of {dims}")
        if out != wanted:
            for axis in reversed(out):
                sums = settings.wire.gather(sums, 0, axis, f"columns of {dims}")
            sums = own_part(settings, sums, 0, wanted)
        met = layout.axes_of(getattr(settings.placement.scheme, layout.side(dims.split()[1])))
        own = (*wanted, *layout.replicas(settings.placement))  # as a bias, it meets activations that vary over more
        return settings.wire.vary(sums, tuple(axis for axis in met if axis not in own), f"columns of {dims}")

    return columns


def concat_of(settings) -> Callable:
    """`Context.concat`; args: `Settings`."""

    def concat(xs, dims):
        axes = layout.activation(settings.placement, words_of(dims, xs[0].ndim)[-1], xs[0].ndim)[-1]
        joined = jnp.concatenate(xs, -1)
        if not axes:
            return joined
        for axis in reversed(axes):
            joined = settings.wire.gather(joined, joined.ndim - 1, axis, f"concat of {dims}")
        whole = joined.reshape(*joined.shape[:-1], -1, sum(x.shape[-1] for x in xs))  # [.., device, features]
        ends = [sum(x.shape[-1] for x in xs[: n + 1]) for n in range(len(xs) - 1)]
        each = [part.reshape(*joined.shape[:-1], -1) for part in jnp.split(whole, ends, -1)]
        return own_part(settings, jnp.concatenate(each, -1), joined.ndim - 1, axes)

    return concat


def own_part(settings, a, dim: int, axes: Axes):
    """A device's own part of a dim that is whole here and that `axes` split."""
    count = a.shape[dim] // layout.size(settings.placement.scheme, axes)
    return lax.dynamic_slice_in_dim(a, offset(settings, axes, count), count, axis=dim) if axes else a
