"""One layer on its own, laid out by a plan: global arrays in, global arrays out."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxpar.core.plan import Plan, scheme_of
from jaxpar.core.types import Layer
from jaxpar.plan import layout, mesh
from jaxpar.plan.context import Settings, context
from jaxpar.plan.wire import device_wire
from jaxpar.policies.fp32 import fp32


class Pulled(NamedTuple):
    """What a layer gave, the gradients of `(y * dy).sum()` by params and x, and the new extra."""

    y: Any
    gradients: tuple[Any, Any]
    extra: Any


def laid_out(layer: Layer, plan: str, shape: tuple[int, ...], dims: tuple[str, str], **mode) -> Callable:
    """`apply(params, extra, x) -> (y, extra)` on the devices of `plan`.

    Args:
        layer: what to run.
        plan: as in a recipe; only mesh and scheme count here.
        shape: of x.
        dims: all dim words of x, and of y.
        mode: fields of `Settings`, such as `train`.
    """
    scheme, words = scheme_of(Plan.parse(plan).tensor), [side.split() for side in dims]
    sizes = {word: size for word, size in zip(words[0], shape, strict=True) if word in ("batch", "context")}
    placement = layout.place(scheme, Plan.parse(plan).data, sizes)
    settings = Settings(placement, fp32(), device_wire(), **mode)
    params, extra = (mesh.parameter_specs(placement, tree) for tree in layer.dims)
    x, y = (mesh.spec(layout.activation(placement, side, len(one))) for side, one in zip(dims, words, strict=True))
    return jax.shard_map(
        lambda *local: layer.apply(*local, context(settings)),
        mesh=mesh.mesh_of(placement.scheme.axes),
        in_specs=(params, extra, x),
        out_specs=(y, extra),
    )


def pulled(apply: Callable) -> Callable:
    """Jitted `pull(params, extra, x, dy) -> Pulled`."""
    return jax.jit(partial(_pull, apply))


def _pull(apply, params, extra, x, dy):
    y, back, extra = jax.vjp(lambda params, x: apply(params, extra, x), params, x, has_aux=True)
    return Pulled(y, back(dy), extra)
