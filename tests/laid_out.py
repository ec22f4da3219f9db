"""One layer on its own, laid out by a plan: global arrays in, global arrays out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxpar.core.plan import Plan, scheme_of
from jaxpar.core.types import Layer
from jaxpar.plan import layout, mesh
from jaxpar.plan.context import Settings, context
from jaxpar.plan.wire import device_wire
from jaxpar.policies.fp32 import fp32
from jaxpar.step.pieces import halves, merged


class Pulled(NamedTuple):
    """What a layer gave, the gradients of `(y * dy).sum()` by params and by x, and the new extra, both its halves."""

    y: Any
    gradients: tuple[Any, Any]
    extra: Any


def laid_out(layer: Layer, plan: str, sizes: dict[str, int], dims: tuple[str, str], **mode) -> Callable:
    """`apply(params, extra, x) -> (y, extra)` on the devices of `plan`.

    Args:
        layer: what to run.
        plan: as in a recipe; only its mesh and scheme count here.
        sizes: entries of `batch`, and of `context` and `kv_heads` where the layer has them.
        dims: all dim words of x, and of y.
        mode: fields of `Settings`, such as `train`, or a `policy` other than fp32.
    """
    plan = Plan.parse(plan)
    placement = layout.place(scheme_of(plan.tensor), plan.data, sizes)
    settings = Settings(**{"placement": placement, "policy": fp32(), "wire": device_wire()} | mode)
    params, extra = (mesh.parameter_specs(placement, tree) for tree in layer.dims)
    x, y = (mesh.spec(layout.activation(placement, words, len(words.split()))) for words in dims)
    return jax.shard_map(
        lambda *local: layer.apply(*local, context(settings)),
        mesh=mesh.mesh_of(placement.scheme.axes),
        in_specs=(params, extra, x),
        out_specs=(y, extra),
    )


def pull(apply: Callable, params, extra, x, dy) -> Pulled:
    """Run `apply(params, extra, x) -> (y, extra)` forward and back; new state of the way back is a cotangent."""
    forward, backward = halves(extra)

    def run(params, x, backward):
        y, new = apply(params, merged(forward, backward), x)
        return y, halves(new)[0]

    y, back, forward = jax.vjp(run, params, x, backward, has_aux=True)
    by_params, by_x, backward = back(dy)
    return Pulled(y, (by_params, by_x), merged(forward, backward))
