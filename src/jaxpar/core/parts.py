"""How layers are made of others: named parts, chains, residual branches."""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpar.core.types import Context, Layer, Tree


def join(parts: dict[str, Layer]) -> tuple[Callable, tuple[Tree, Tree]]:
    """`init` and `dims` of a layer that holds `parts` under their names.

    A part's key depends on its name alone, so adding a part changes no other's parameters.
    """

    def init(key):
        pairs = {name: part.init(jax.random.fold_in(key, zlib.crc32(name.encode()))) for name, part in parts.items()}
        return tuple({name: pair[which] for name, pair in pairs.items()} for which in (0, 1))

    return init, tuple({name: part.dims[which] for name, part in parts.items()} for which in (0, 1))


def runner(parts: dict[str, Layer], params: Tree, extra: Tree, ctx: Context) -> tuple[Callable, Tree]:
    """`run(name, x) -> y`, and the new extra, into which each `run` writes what its part returns."""
    new = dict(extra)

    def run(name, x):
        y, new[name] = parts[name].apply(params[name], new[name], x, ctx)
        return y

    return run, new


def chain(parts: dict[str, Layer]) -> Layer:
    """One part after the other; the place where a chain may be cut is between its `parts`."""
    init, dims = join(parts)

    def apply(params, extra, x, ctx):
        run, new = runner(parts, params, extra, ctx)
        for name in parts:
            x = run(name, x)
        return x, new

    return Layer(init, apply, dims, parts=tuple(parts.values()))


def residual(parts: dict[str, Layer]) -> Layer:
    """x plus what the chain of `parts` makes of it."""
    body = chain(parts)

    def apply(params, extra, x, ctx):
        y, extra = body.apply(params, extra, x, ctx)
        return x + y.astype(x.dtype), extra

    return body._replace(apply=apply, parts=())


def function(apply: Callable) -> Layer:
    """A layer without parameters from `apply(x, ctx) -> y`."""

    def with_state(params, extra, x, ctx):
        return apply(x, ctx), extra

    return Layer(lambda key: ({}, {}), with_state, ({}, {}))


def normal(key, shape, deviation: float):
    """Normal draws in float32 with the given standard deviation."""
    return deviation * jax.random.normal(key, shape, jnp.float32)
