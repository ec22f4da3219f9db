"""How layers are made of others: named parts, chains, residual branches."""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpar.core.types import Layer, Part, Tree


def join(parts: dict[str, Layer]) -> tuple[Callable, tuple[Tree, Tree]]:
    """`init` and `dims` of a layer that holds `parts` under their names.

    A part's key depends on its name alone, so adding a part changes no other's parameters.
    """

    def init(key):
        pairs = {name: part.init(jax.random.fold_in(key, zlib.crc32(name.encode()))) for name, part in parts.items()}
        return tuple({name: pair[which] for name, pair in pairs.items()} for which in (0, 1))

    return init, tuple({name: part.dims[which] for name, part in parts.items()} for which in (0, 1))


def chain(parts: dict[str, Layer], reads: dict[str, str] | None = None) -> Layer:
    """One part after the other; the place where a chain may be cut is between its `parts`.

    Args:
        parts: layers by name, in order.
        reads: for a part without parameters of its own, the name of the part whose parameters it reads.
    """
    reads = reads or {}
    init, dims = _read(parts, reads)
    links = tuple(Part(name, part, reads.get(name, name)) for name, part in parts.items())

    def apply(params, extra, x, ctx):
        new = dict(extra)
        for name, layer, read in links:
            x, state = layer.apply(params[read], extra.get(name, {}), x, ctx)
            new |= {name: state} if name in extra else {}
        return x, new

    return Layer(init, apply, dims, parts=links)


def _read(parts: dict[str, Layer], reads: dict[str, str]) -> tuple[Callable, tuple[Tree, Tree]]:
    """`join` where some parts have at most state of their own."""
    own, (params_dims, extra_dims) = join({name: part for name, part in parts.items() if name not in reads})
    states, (_, more) = join({name: parts[name] for name in reads if parts[name].dims[1]})

    def init(key):
        params, extra = own(key)
        return params, extra | states(key)[1]

    return init, (params_dims, extra_dims | more)


def residual(parts: dict[str, Layer]) -> Layer:
    """x plus what the chain of `parts` makes of it."""
    body = chain(parts)

    def apply(params, extra, x, ctx):
        y, extra = body.apply(params, extra, x, ctx)
        return x + y.astype(x.dtype), extra

    return body._replace(apply=apply, parts=())


def parallel(parts: dict[str, Layer], merge: Callable) -> Layer:
    """Several layers that take the same x; `merge(ctx, *ys)` makes one of what they give, in order."""
    init, dims = join(parts)

    def apply(params, extra, x, ctx):
        ys, new = [], {}
        for name, part in parts.items():
            y, new[name] = part.apply(params[name], extra[name], x, ctx)
            ys.append(y)
        return merge(ctx, *ys), new

    return Layer(init, apply, dims)


def broadened(y, row):
    """y plus what is broadcast over its rows, such as a bias; rounded once, to the dtype of y.

    So the gradient of `row`, a sum over rows, is added up in the dtype of `row`, whatever the policy's.
    """
    return (y.astype(jnp.result_type(y, row)) + row).astype(y.dtype)


def function(apply: Callable) -> Layer:
    """A layer without parameters from `apply(x, ctx) -> y`."""

    def with_state(params, extra, x, ctx):
        return apply(x, ctx), extra

    return Layer(lambda key: ({}, {}), with_state, ({}, {}))


def normal(key, shape, deviation: float):
    """Normal draws in float32 with the given standard deviation."""
    return deviation * jax.random.normal(key, shape, jnp.float32)
