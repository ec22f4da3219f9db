"""The devices of a plan, and where global arrays lie on them."""

import math
import os
from collections.abc import Mapping

import jax
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


def mesh_of(axes: Mapping[str, int]) -> Mesh:
    """The mesh with these axes, major first; one device is the axis `data` of size 1."""
    axes = axes or {"data": 1}
    count = 1
    for size in axes.values():
        count *= size
    return compat.make_mesh(tuple(axes.values()), tuple(axes), devices(count))


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


def shardings(mesh: Mesh, specs):
    """Specs bound to a mesh."""
    return jax.tree.map(lambda one: NamedSharding(mesh, one), specs, is_leaf=lambda one: isinstance(one, PartitionSpec))
