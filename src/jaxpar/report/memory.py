"""What a step must hold on each device, from shapes alone: a plan that cannot fit is refused before it is compiled."""

import math
from collections.abc import Iterator

import jax

from jaxpar.core.plan import Plan
from jaxpar.core.refuse import Problem
from jaxpar.report import machine
from jaxpar.step.program import Program


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
    found = machine.memory()
    return found[1] // devices if found else None


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


def of_compiled(plan: Plan, program: Program, compiled: jax.stages.Compiled) -> Iterator[Problem]:
    """One problem if the compiled step, activations and all, asks for more than a device has."""
    said, devices = compiled.memory_analysis(), program.mesh.devices
    room = available(devices.flat[0], devices.size)
    if said is None or room is None:
        return
    total = said.argument_size_in_bytes + said.temp_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
    if total > room:
        rule = f"the compiled step asks for {total / 2**30:,.1f} GiB on each device, which has {room / 2**30:,.1f} GiB."
        legal = "a smaller batch or model.context; more microbatches; or a scheme that splits more"
        yield Problem("memory", plan, rule, legal)


def _bytes(tree) -> int:
    """Of one device's parts of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
