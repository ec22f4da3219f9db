"""What a step must hold on each device, from shapes alone: a plan that cannot fit is refused before it is compiled."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import jax

from jaxpar.core.plan import Plan
from jaxpar.core.refuse import Problem
from jaxpar.step.program import Program

CGROUP = Path("/sys/fs/cgroup/memory.max")  # the limit of a container


def held(program: Program) -> dict[str, int]:
    """Bytes that one device holds during a step, by category; activations come on top.

    Gradients are as large as parameters; the state is donated, so it is there once.
    """
    state = program.shapes
    return {
        "parameters": _bytes(state.params),
        "gradients": _bytes(state.params),
        "optimizer": _bytes(state.opt),
        "other state": _bytes((state.extra, state.comm)),
        "batch": _bytes(program.batch),
    }


def available(device: jax.Device, devices: int) -> int | None:
    """Bytes that one device has; simulated devices share the memory of this machine. None if nobody says."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    found = host()
    return found // devices if found else None


def host() -> int | None:
    """Bytes of memory that this process may use; None if the system does not say."""
    limits = []
    with suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):
        limits.append(int(CGROUP.read_text()))
    return min(limits, default=None)


def problems(plan: Plan, program: Program) -> Iterator[Problem]:
    """One problem if even without activations a step does not fit."""
    needs, devices = held(program), program.mesh.devices
    room = available(devices.flat[0], devices.size)
    total = sum(needs.values())
    if room is not None and total > room:
        parts = ", ".join(f"{name} {size / 2**30:,.1f}" for name, size in needs.items() if size > total / 1000)
        rule = (
            f"each device would hold {total / 2**30:,.1f} GiB ({parts}) besides activations, and has "
            f"{room / 2**30:,.1f} GiB."
        )
        yield Problem("memory", plan, rule, "a smaller model, or a scheme that splits weights further, as fsdp:N does")


def _bytes(tree) -> int:
    """Of one device's parts of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
