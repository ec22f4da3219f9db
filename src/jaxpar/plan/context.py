"""The Context: everything a layer needs to know of devices, precision, randomness and mode."""

import zlib

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.core import compat
from jaxpar.core.scheme import Axes
from jaxpar.core.types import Context
from jaxpar.plan import layout, remat
from jaxpar.plan.bilinear import einsum
from jaxpar.plan.draws import counters, offset
from jaxpar.plan.offload import any_hosted, brought
from jaxpar.plan.product import Settings, conv_of, dot_of, hold_of, local_ids, lookup_of
from jaxpar.plan.statistics import columns_of, concat_of, mean_of, recurrence_of
from jaxpar.plan.zero import fetched, gathers


def context(settings: Settings) -> Context:
    """The Context of one device for one microbatch."""
    return Context(
        dot=dot_of(settings),
        einsum=einsum,
        conv=conv_of(settings),
        mean=mean_of(settings),
        recurrence=recurrence_of(settings),
        columns=columns_of(settings),
        concat=concat_of(settings),
        lookup=lookup_of(settings),
        cross_entropy=_cross_entropy(settings),
        correct=_correct(settings),
        start=_start(settings),
        extent=_extent(settings),
        dropout=_dropout(settings),
        block=_block(settings),
        hold=hold_of(settings),
        loop=_loop(settings),
        train=settings.train,
        scale=settings.scale,
        fresh=jnp.equal(settings.first_example, 0),
    )


def _cross_entropy(settings: Settings):
    wire, split = settings.wire, layout.features(settings.placement, "vocab")

    def cross_entropy(logits, labels):
        logits = logits.astype(jnp.float32)
        top = wire.largest(lax.stop_gradient(logits.max(-1)), split, "cross entropy")
        shifted = logits - top[..., None]
        count = logits.shape[-1]
        near, inside = local_ids(labels, offset(settings, split, count), count)
        picked = jnp.where(inside, jnp.take_along_axis(shifted, near[..., None], -1)[..., 0], 0)
        both = wire.total(jnp.stack([jnp.exp(shifted).sum(-1), picked]), split, "cross entropy")
        return jnp.where(labels >= 0, jnp.log(both[0]) - both[1], 0)

    return cross_entropy


def _correct(settings: Settings):
    wire, split = settings.wire, layout.features(settings.placement, "vocab")

    def correct(logits, labels):
        count, none = logits.shape[-1], jnp.iinfo(jnp.int32).max
        top = wire.largest(logits.max(-1), split, "accuracy")
        classes = offset(settings, split, count) + jnp.arange(count, dtype=jnp.int32)
        first = jnp.where(logits == top[..., None], classes, none).min(-1)
        return (-wire.largest(-first, split, "accuracy") == labels).astype(jnp.float32)

    return correct


def _start(settings: Settings):
    return lambda dim, count, beside="-": offset(settings, _lies(settings, dim, beside), count)


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
        high, low = counters(settings, x.shape, lies)
        threshold = min(int(rate * 2**32), 2**32 - 1)
        keep = compat.random_bits(key, high, low) >= jnp.uint32(threshold)
        return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)

    return dropout


def _loop(settings: Settings):
    def loop(body, carry, xs):
        carry = _settled(body, carry, xs)
        if settings.train and settings.remat.kind not in ("none", "budget"):  # a budget is one for whole blocks
            return remat.chain(settings.remat, body, carry, xs, regather=False)
        return settings.wire.scan(body, carry, xs)

    return loop


def _settled(body, carry, xs):
    """The carry typed as varying over the axes that a step makes it vary over: a state that all share stays one.

    Its gradient would be summed else, which the state of a norm's backward pass, a cotangent, must not be.
    """
    if not any(map(compat.varying_axes, jax.tree.leaves((carry, xs)))):
        return carry
    first, leaves, known = jax.tree.map(lambda leaf: leaf[0], xs), jax.tree.leaves(carry), None
    while known != (now := [compat.varying_axes(leaf) for leaf in leaves]):
        tree = jax.tree.unflatten(jax.tree.structure(carry), leaves)
        made = jax.make_jaxpr(lambda *args: body(*args)[0])(tree, first).out_avals
        known, leaves = (
            now,
            [compat.vary(leaf, compat.varying_axes(new)) for leaf, new in zip(leaves, made, strict=True)],
        )
    return jax.tree.unflatten(jax.tree.structure(carry), leaves)


UNROLL_UP_TO = 8  # blocks; each adds about as much to the time of compiling as a whole scan


def _unrolled(settings: Settings, count: int) -> bool:
    """Whether to run `count` blocks one by one; if left open: where no weight is split, so that none is gathered.

    On one CPU device 4 unrolled blocks took 0.75 to 0.9 of the time of their scan; but only inside a scan is a gather
    given up and repeated in the backward pass.
    """
    if settings.unroll is not None or count == 1:
        return settings.unroll or count == 1
    scheme = settings.placement.scheme
    return count <= UNROLL_UP_TO and not layout.axes_of(scheme.up, scheme.down)


def _block(settings: Settings):
    def block(apply):
        def run(params, extra, x, ctx):
            def body(x, xs):
                layer, params, extra = xs
                key = None if settings.key is None else jax.random.fold_in(settings.key, settings.first_layer + layer)
                return apply(fetched(settings, brought(params)), extra, x, context(settings._replace(key=key)))

            count = jax.tree.leaves(params)[0].shape[0]
            xs = (jnp.arange(count), params, extra)
            if settings.train and settings.remat.kind != "none":
                return remat.chain(settings.remat, body, x, xs, regather=settings.regather)
            again = gathers(params) or any_hosted(params)
            if not _unrolled(settings, count) or (count > 1 and not settings.unroll and again):
                return settings.wire.scan(settings.wire.regather(body) if settings.regather else body, x, xs)
            extras = []
            for layer in range(count):  # no regather here: outside a scan XLA merges the second gather with the first
                x, new = body(x, jax.tree.map(lambda leaf, layer=layer: leaf[layer], xs))
                extras.append(new)
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *extras)

        return run

    return block
