"""The devices of a plan, and where global arrays lie on them."""

import math
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpar.core import compat
from jaxpar.core.plan import Plan, scheme_of
from jaxpar.core.refuse import Collector, Problem, Refused
from jaxpar.plan import layout
from jaxpar.plan.layout import Placement

MOST_SIMULATED = 512  # each is a thread or more


def needed(plan: Plan) -> int:
    """How many devices a plan takes; 0 for one that will be refused."""
    scheme = Collector([]).attempt(scheme_of, plan.tensor)
    return max(0, plan.data * plan.pipe * math.prod(scheme.axes.values())) if scheme else 0


def simulate(count: int) -> None:
    """Ask jax for `count` CPU devices or more, simulated by threads; does nothing once jax has made its devices.

    Each device holds a thread while it waits for others in a collective, and two steps may be under way at a time. XLA
    makes as many threads as cores or devices; on a busy machine with few cores the last device was then left without
    one, and the step stood still (seen three times, the last with two threads per device). So XLA is told of four cores
    per device, which costs no time.
    """
    if count > MOST_SIMULATED:  # `devices` will say so
        return
    if count > 1:
        os.environ.setdefault("NPROC", str(4 * count))
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", max(count, jax.config.jax_num_cpu_devices))
    except RuntimeError:  # jax has already made its devices: `devices` will say so if they are too few
        return


def devices(count: int) -> list[jax.Device]:
    """`count` devices: accelerators if there are enough, else CPU devices, simulated if need be.

    Several CPU devices end the use of jax's compile cache, which breaks their programs.

    Raises:
        Refused: if jax has fewer; the message says how to get them.
    """
    simulate(count)
    found = jax.devices()
    if len(found) < count and found[0].platform != "cpu":
        found = jax.devices("cpu")
    if len(found) < count and count > MOST_SIMULATED:
        rule = f"needs {count} devices; there are {len(found)}, and at most {MOST_SIMULATED} can be simulated."
        raise Refused([Problem("plan", "the mesh", rule, f"a plan for {MOST_SIMULATED} devices or fewer")])
    if len(found) < count:
        rule = f"needs {count} devices, but jax has already made {len(found)} ({found[0].platform})."
        legal = (
            f"restart Python (in a notebook: Runtime > Restart) and call jaxpar.simulate({count}) before anything "
            f"else; or take a plan for {len(found)}, such as data={len(found)}"
        )
        raise Refused([Problem("plan", "the mesh", rule, legal)])
    if count > 1 and found[0].platform == "cpu":
        compat.no_compile_cache()
    return found[:count]


def mesh_of(axes: Mapping[str, int], given: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with these axes, major first; one device is the axis `data` of size 1.

    Args:
        axes: sizes by name.
        given: as many devices, in any order, such as those of a topology that is only compiled for; None: those here.
    """
    axes = axes or {"data": 1}
    held = list(given) if given is not None else devices(math.prod(axes.values()))
    return compat.make_mesh(tuple(axes.values()), tuple(axes), in_order(axes, held))


def in_order(axes: Mapping[str, int], held: Sequence[jax.Device]) -> np.ndarray:
    """Devices by place in the mesh: of TPUs, neighbours along an axis are neighbours in the torus, if that is known.

    Slices, which only reach each other over the network of the data centre, are told apart along one axis alone:
    `data` if their number divides it, else `pipe`, else the first axis that it does divide.
    """
    sizes = tuple(axes.values())
    if held[0].platform != "tpu" or len(held) == 1:
        return np.asarray(held).reshape(sizes)
    slices = len({getattr(device, "slice_index", None) for device in held})
    across = across_slices(axes, slices)
    try:
        if across is None:
            return mesh_utils.create_device_mesh(sizes, held, allow_split_physical_axes=True)
        outer = tuple(slices if axis == across else 1 for axis in axes)
        inner = tuple(size // parts for size, parts in zip(sizes, outer, strict=True))
        return mesh_utils.create_hybrid_device_mesh(inner, outer, held, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):  # part of a machine, or a torus it has no rule for
        return np.asarray(held).reshape(sizes)


def across_slices(axes: Mapping[str, int], slices: int) -> str | None:
    """The mesh axis along which slices of TPUs are told apart; None for one slice, or if no axis divides by them."""
    wished = ("data", layout.PIPE, *axes)
    return next((axis for axis in wished if slices > 1 and axes.get(axis, 1) % slices == 0), None)


def idle(mesh: Mesh) -> str:
    """Empty, or what to know of accelerators that are there and not in the mesh: jax itself does not mention them."""
    one, count = mesh.devices.flat[0], len(jax.devices())
    if one.platform == "cpu" or count <= mesh.size:
        return ""
    return f"note: this plan uses {mesh.size} of {count} devices ({one.device_kind})"


def spec(lies: layout.Layout) -> PartitionSpec:
    """A layout as jax writes it."""
    return PartitionSpec(*(axes or None for axes in lies))


def parameter_specs(placement: Placement, dims) -> PartitionSpec:
    """The specs of a tree of dim strings."""
    return jax.tree.map(lambda words: spec(layout.weight(placement, words)), dims)


def specs(dims, layouts):
    """The specs of a tree of layouts, in the form of a tree of dim strings."""
    return jax.tree.map(lambda words, lies: spec(lies), dims, layouts)


def shardings(mesh: Mesh, specs):
    """Specs bound to a mesh."""
    return jax.tree.map(lambda one: NamedSharding(mesh, one), specs, is_leaf=lambda one: isinstance(one, PartitionSpec))
