"""The Context: everything a layer needs to know of devices, precision, randomness and mode."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.core import compat
from jaxpar.core.policy import Policy
from jaxpar.core.scheme import Axes
from jaxpar.core.types import Context
from jaxpar.plan import layout
from jaxpar.plan.layout import Layout, Placement
from jaxpar.plan.matmul import derive
from jaxpar.plan.wire import Wire


class Held(NamedTuple):
    """A weight fetched ahead of a loop (`Context.hold`); `dot` takes it in place of the stored one."""

    array: Any


class Settings(NamedTuple):
    """What a Context is made of.

    Attributes:
        placement: the scheme, set down on the model.
        policy: precision.
        wire: collectives, real or counted.
        train: training or evaluation.
        key: random key of this step and layer; None if nothing is drawn.
        first_example: global index of the first example of this microbatch.
        scan_blocks: run a stack as one scan, rather than unrolled.
        regather: inside that scan, gather again in the backward pass.
    """

    placement: Placement
    policy: Policy
    wire: Wire
    train: bool = True
    key: Any = None
    first_example: Any = 0
    scan_blocks: bool = True
    regather: bool = True


def context(settings: Settings) -> Context:
    """The Context of one device for one microbatch."""
    return Context(
        dot=_dot(settings),
        conv=_conv(settings),
        mean=_mean(settings),
        lookup=_lookup(settings),
        cross_entropy=_cross_entropy(settings),
        start=_start(settings),
        extent=_extent(settings),
        dropout=_dropout(settings),
        block=_block(settings),
        hold=_hold(settings),
        loop=_loop(settings),
        train=settings.train,
    )


def _product(settings: Settings, multiply: Callable, x, weights, names):
    """The derived product of one x with each of the weights; x is cast and gathered once for all that want it alike."""
    placement, policy, wire, _, *_ = settings
    routes = []
    for dims in names:
        into, out = dims.split()
        x_layout = layout.activation(placement, into, x.ndim)
        y_layout = layout.activation(placement, out, x.ndim)
        routes.append((x_layout, layout.weight(placement, dims), y_layout))
    site, shared = ", ".join(names), layout.axes_of(*(at for route in routes for at in route))
    x_layout = routes[0][0]
    trained = not site.startswith("-")  # whole features are data: nothing upstream of them is trained
    x = policy.cast(x if trained else lax.stop_gradient(x), "activation")
    x = wire.vary(x, _but(shared, layout.axes_of(x_layout)), site, trained)
    gathered = {}

    def gather_x(moves):
        key = (moves.gather_x, moves.keep_x)
        if key not in gathered:
            part = x
            for dim, axis in moves.gather_x:
                part = wire.gather(part, dim, axis, f"x of {site}", trained)
            for dim, axis in moves.keep_x:
                part = _keep(wire, placement, part, dim, axis)
            gathered[key] = part
        return gathered[key]

    results = []
    for w, dims, (_, w_layout, y_layout) in zip(weights, names, routes, strict=True):
        moves = derive(x_layout, w_layout, y_layout)
        if isinstance(w, Held):
            w = w.array
        else:
            w = _fetch(settings, w, dims, w_layout, moves, shared)
        y = policy.dot(multiply, gather_x(moves), w)
        for dim, axis in moves.scatter:
            y = wire.scatter(y, dim, axis, f"y of {dims}")
        results.append(wire.total(y, moves.total, f"y of {dims}"))
    return results


def _but(axes: Axes, *others: Axes) -> Axes:
    return tuple(axis for axis in axes if not any(axis in other for other in others))


def _keep(wire: Wire, placement: Placement, a, dim: int, axis: str):
    count = a.shape[dim] // placement.scheme.axes[axis]
    return lax.dynamic_slice_in_dim(a, wire.index(axis) * count, count, axis=dim)


def _fetch(settings: Settings, w, dims: str, w_layout: Layout, moves, shared: Axes):
    """Cast, mark as varying, then gather: in this order fewer bytes travel, and gradients are scattered, then summed."""
    placement, policy, wire, *_ = settings
    first = w.ndim - 2
    w = policy.cast(w, "weight")
    own = layout.axes_of(w_layout)
    w = wire.vary(w, _but(shared, own, layout.replicas(placement)), f"w of {dims}")
    for dim, axis in moves.gather_w:
        w = wire.gather(w, first + dim, axis, f"w of {dims}")
    for dim, axis in moves.keep_w:
        w = _keep(wire, placement, w, first + dim, axis)
    return w


def _dot(settings: Settings):
    def multiply(x, w, dtype):  # one matrix of all rows: XLA on CPU runs it faster than a batch of them
        y = jnp.matmul(x.reshape(-1, x.shape[-1]), w, preferred_element_type=dtype)
        return y.reshape(*x.shape[:-1], w.shape[-1])

    def dot(x, w, dims):
        if isinstance(dims, str):
            return _product(settings, multiply, x, (w,), (dims,))[0]
        return _product(settings, multiply, x, w, dims)

    return dot


def _conv(settings: Settings):
    def conv(x, w, dims, strides=1):
        def multiply(x, w, dtype):
            return lax.conv_general_dilated(
                x, w, (strides, strides), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), preferred_element_type=dtype
            )

        return _product(settings, multiply, x, (w,), (dims,))[0]

    return conv


def _hold(settings: Settings):
    def hold(w, dims):
        words = dims.split()
        rank = 2  # inside the loop, an activation is x[batch, features]
        y_layout = layout.activation(settings.placement, words[-1], rank)
        if len(words) == 1:
            own = y_layout[-1:]
            missing = _but(layout.axes_of(y_layout), layout.axes_of(own), layout.replicas(settings.placement))
            return settings.wire.vary(w, missing, f"w of {dims}")
        x_layout = layout.activation(settings.placement, words[0], rank)
        w_layout = layout.weight(settings.placement, dims)
        shared = layout.axes_of(x_layout, w_layout, y_layout)
        return Held(_fetch(settings, w, dims, w_layout, derive(x_layout, w_layout, y_layout), shared))

    return hold


def _lookup(settings: Settings):
    placement, policy, wire, *_ = settings

    def lookup(table, ids):
        """As a product with one-hot rows, which every device can make for any part of the vocabulary."""
        in_rows = layout.activation(placement, "vocab", ids.ndim + 1)[:-1]
        w_layout, y_layout = layout.weight(placement, "vocab embed"), layout.activation(placement, "embed", ids.ndim + 1)
        shared = tuple(axis for axis in w_layout[0] if axis not in layout.axes_of(in_rows))
        moves = derive((*in_rows, shared), w_layout, y_layout)
        table = _fetch(settings, table, "vocab embed", w_layout, moves, moves.vary)
        for dim, axis in moves.gather_x:
            ids = wire.gather(ids, dim, axis, "ids")
        for dim, axis in moves.keep_x:
            ids = _keep(wire, placement, ids, dim, axis)
        local, inside = _local(ids, _offset(settings, shared, table.shape[0]), table.shape[0])
        y = jnp.where(inside[..., None], jnp.take(table, local, axis=0), 0)
        for dim, axis in moves.scatter:
            y = wire.scatter(y, dim, axis, "y of vocab embed")
        return wire.total(y, moves.total, "y of vocab embed")

    return lookup


def _local(ids, first, count: int):
    """Ids relative to the local part of the vocabulary, clipped into it, and which of them lie inside."""
    local = ids - first
    return jnp.clip(local, 0, count - 1), (local >= 0) & (local < count)


def _offset(settings: Settings, axes: Axes, local: int):
    """Global index of the first of `local` entries, of a dim that lies over `axes`, major first."""
    offset = 0
    for axis in axes:
        offset = offset * settings.placement.scheme.axes[axis] + settings.wire.index(axis)
    return offset * local


def _cross_entropy(settings: Settings):
    wire, split = settings.wire, layout.features(settings.placement, "vocab")

    def cross_entropy(logits, labels):
        logits = logits.astype(jnp.float32)
        top = wire.largest(lax.stop_gradient(logits.max(-1)), split, "cross entropy")
        shifted = logits - top[..., None]
        count = logits.shape[-1]
        local, inside = _local(labels, _offset(settings, split, count), count)
        picked = jnp.where(inside, jnp.take_along_axis(shifted, local[..., None], -1)[..., 0], 0)
        both = wire.total(jnp.stack([jnp.exp(shifted).sum(-1), picked]), split, "cross entropy")
        return jnp.where(labels >= 0, jnp.log(both[0]) - both[1], 0)

    return cross_entropy


def _mean(settings: Settings):
    def mean(x, dims, over=None):
        words = dims.split() if " " in dims or x.ndim == 1 else [*layout.ROWS_OF_RANK[x.ndim], dims]
        lies = layout.activation(settings.placement, " ".join(words), x.ndim)
        chosen = (over or words[-1]).split()
        if missing := [word for word in chosen if word not in words]:
            raise ValueError(f"mean over {missing}, but x has the dims {words}.")
        where = tuple(words.index(word) for word in chosen)
        axes = layout.axes_of(tuple(lies[dim] for dim in where))
        return settings.wire.mean(x.mean(where, keepdims=True), axes, f"mean over {' '.join(chosen)}")

    return mean


def _start(settings: Settings):
    return lambda dim, count, beside="-": _offset(settings, _lies(settings, dim, beside), count)


def _extent(settings: Settings):
    scheme = settings.placement.scheme
    return lambda dim, count, beside="-": count * layout.size(scheme, _lies(settings, dim, beside))


def _lies(settings: Settings, dim: str, beside: str) -> Axes:
    layout.check_words((dim, beside))
    placement = settings.placement
    return layout.rows(placement, dim, beside) if dim in layout.ROWS else layout.features(placement, dim)


def _dropout(settings: Settings):
    def dropout(x, rate, site, dims="embed"):
        if not (settings.train and rate):
            return x
        if settings.key is None:
            raise ValueError(f"dropout at {site!r} needs a random key; pass one to the step.")
        lies = layout.activation(settings.placement, dims, x.ndim)
        key = jax.random.fold_in(settings.key, zlib.crc32(site.encode()))
        high, low = _counters(settings, x.shape, lies)
        threshold = min(int(rate * 2**32), 2**32 - 1)
        keep = compat.random_bits(key, high, low) >= jnp.uint32(threshold)
        return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)

    return dropout


def _counters(settings: Settings, shape, lies: Layout):
    """Two 32-bit counters per entry, from its global index: the first two dims, then the others.

    Two words rather than one product, which 2^32 entries of a large batch would overflow.
    """
    words = [jnp.uint32(0), jnp.uint32(0)]
    for dim, (count, axes) in enumerate(zip(shape, lies, strict=True)):
        index = _offset(settings, axes, count) + jnp.arange(count)
        if dim == 0:
            index = index + settings.first_example
        index = index.astype(jnp.uint32).reshape([-1 if d == dim else 1 for d in range(len(shape))])
        word = int(dim > 1) if len(shape) > 2 else dim
        total = count * layout.size(settings.placement.scheme, axes)
        words[word] = words[word] * jnp.uint32(total) + index
    return [jnp.broadcast_to(word, shape) for word in words]


def _loop(settings: Settings):
    def loop(body, carry, xs):
        axes = {axis for leaf in jax.tree.leaves(xs) for axis in compat.varying_axes(leaf)}
        return settings.wire.scan(body, jax.tree.map(lambda leaf: compat.vary(leaf, sorted(axes)), carry), xs)

    return loop


def _block(settings: Settings):
    def block(apply):
        def run(params, extra, x, ctx):
            def body(x, xs):
                layer, params, extra = xs
                key = None if settings.key is None else jax.random.fold_in(settings.key, layer)
                return apply(params, extra, x, context(settings._replace(key=key)))

            count = jax.tree.leaves(params)[0].shape[0]
            xs = (jnp.arange(count), params, extra)
            if settings.scan_blocks and count > 1:
                return settings.wire.scan(settings.wire.regather(body) if settings.regather else body, x, xs)
            extras = []
            for layer in range(count):  # no regather here: outside a scan XLA merges the second gather with the first
                x, new = body(x, jax.tree.map(lambda leaf, layer=layer: leaf[layer], xs))
                extras.append(new)
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *extras)

        return run

    return block
