"""Who decides the collectives of a step: jaxpar (`manual`), or XLA's own partitioner (`auto`)."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from jaxpar.plan import layout
from jaxpar.plan import mesh as meshes
from jaxpar.plan.layout import SINGLE, Placement
from jaxpar.plan.product import Settings
from jaxpar.plan.zero import NONE


class Partition(NamedTuple):
    """How a function of the layers becomes one of global arrays.

    Attributes:
        settings: what the Context of that function is made of.
        spread: `spread(function, in_specs=..., out_specs=...)`, as `jax.shard_map`: the function on global arrays.
    """

    settings: Settings
    spread: Callable


def partition(name: str, settings: Settings, mesh: Mesh) -> Partition:
    """The partition called `name`, `manual` or `auto`; parameters, state and batches lie alike under both.

    Args:
        name: `plan.partition`.
        settings: of one device of the mesh.
        mesh: all devices.

    Source: Xu et al. 2021 (GSPMD), arXiv:2105.04663, for `auto`.
    """
    return {"manual": _manual, "auto": _auto}[name](settings, mesh)


def _manual(settings: Settings, mesh: Mesh) -> Partition:
    """Each device runs the layers on its own parts, and talks to others as the layouts say."""
    return Partition(settings, partial(jax.shard_map, mesh=mesh))


def _auto(settings: Settings, mesh: Mesh) -> Partition:
    """The layers run on whole arrays, as on one device, and every operand of a product is held to its layout."""
    scheme = settings.placement.scheme
    # the rule of `plan/context.py`, which would see no split weights here: both partitions run their blocks alike
    unroll = False if settings.unroll is None and layout.axes_of(scheme.up, scheme.down) else settings.unroll
    whole = settings._replace(
        placement=SINGLE,
        constrain=_constrain(settings.placement, mesh),
        unroll=unroll,
        zero=NONE,  # how arrays lie between steps says it all
        regather=False,  # nothing is gathered that could be given up
    )

    def spread(function, in_specs, out_specs):
        def held(*arguments):
            return _held(mesh, function(*_held(mesh, arguments, in_specs)), out_specs)

        return held

    return Partition(whole, spread)


def _constrain(placement: Placement, mesh: Mesh) -> Callable:
    """Layouts as constraints, for `Settings.constrain`.

    A weight is also held to where it takes part in the product: without the axes that no feature dim of the two
    activations has, since rows may lie over them. Left to itself the partitioner (jaxlib 0.10.2) may get such a product
    wrong without a word: rows over (data, row), x[rows, column] times w[column, row] came out in another order.
    """

    def constrain(a, dims, role):
        if role == "weight":
            stored = (*((),) * (a.ndim - 2), *layout.weight(placement, dims))  # a kernel has two more dims in front
            words = (*["-"] * (a.ndim - 2), *dims.split())
            features = (layout.features(placement, word) for word in words)
            used = (tuple(axis for axis in axes if axis in own) for axes, own in zip(stored, features, strict=True))
            return held(held(a, stored), used)  # the gradient goes straight to where the weight is stored
        if role == "rows":  # else the partitioner ends in an error where features lie over the axis of the ids' rows
            return held(a, layout.activation(placement, dims, a.ndim + 1)[:-1])
        return held(a, layout.activation(placement, dims, a.ndim))

    def held(a, lies):
        return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, meshes.spec(lies)))

    return constrain


def _held(mesh: Mesh, tree, specs):
    return jax.lax.with_sharding_constraint(tree, meshes.shardings(mesh, specs))
