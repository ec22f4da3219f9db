"""What a step must hold on each device, from shapes alone: a plan that cannot fit is refused before it is compiled."""

import math
from collections.abc import Iterator
from functools import partial

import jax

from jaxpar.core.plan import Plan
from jaxpar.core.refuse import Problem
from jaxpar.plan import layout, padding
from jaxpar.plan.layout import Placement
from jaxpar.core.types import State
from jaxpar.report import liveness, machine
from jaxpar.step.parts import Parts
from jaxpar.step.program import Program, optimizer_places, traced, updated


def held(parts: Parts) -> dict[str, int]:
    """Bytes that one device holds during a step, by category; activations come on top. Needs no devices.

    Gradients are as large as parameters; the state is donated, so it is there once.
    """
    placement, model = parts.settings.placement, parts.model

    def born():
        made = zip(model.dims, model.init(jax.random.key(0)), strict=True)
        params, extra = (padding.pad(placement, dims, tree) for dims, tree in made)
        return params, extra, parts.optimizer.init(params), parts.reducer.init(params)

    params, extra, opt, comm = jax.eval_shape(born)
    words = optimizer_places(parts.optimizer, opt, params, model.dims[0], "")
    rows = layout.size(placement.scheme, layout.rows(placement, "batch", "-"))
    parameters = _bytes(placement, model.dims[0], params)
    return {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer": _bytes(placement, words, opt),
        "other state": _bytes(placement, model.dims[1], extra) + sum(map(_size, jax.tree.leaves(comm))),
        "batch": sum(_size(a) // rows for a in (parts.inputs, parts.labels)),
    }


def predicted(parts: Parts) -> dict:
    jaxpr = traced(parts)
    spread = next(one for one in jaxpr.eqns if one.primitive.name == "shard_map")
    inside = spread.params["jaxpr"]
    inside = getattr(inside, "jaxpr", inside)
    like = jax.eval_shape(lambda: parts.model.init(jax.random.key(0)))
    like = (0.0, *like, jax.eval_shape(parts.reducer.init, like[0]))
    found = jax.tree.unflatten(jax.tree.structure(like), [_plain(var) for var in inside.outvars])
    state = State(_plain(jaxpr.invars[-1]), *found[1:3], jax.eval_shape(parts.optimizer.init, found[1]), found[3])
    then = jax.make_jaxpr(partial(updated, parts.optimizer))(found, state).jaxpr
    results, old = len(inside.outvars), [*jaxpr.invars]
    leaves = [len(jax.tree.leaves(one)) for one in state]
    place = {var: results + n for n, var in enumerate(spread.invars) if not hasattr(var, "val")}
    own = [jaxpr.invars[-1], *jaxpr.invars[: sum(leaves[1:3])], *[None] * leaves[3], *jaxpr.invars[sum(leaves[1:3]):][:leaves[4]]]
    feeds = [*range(results), *(place.get(var) for var in own)]
    aliases = [(results + n, n) for n in range(sum(leaves))]
    peak = liveness.peak(inside, then, feeds, aliases)
    known = held(parts)
    rest = {"parameters": known["parameters"], "gradients": known["gradients"], "optimizer": known["optimizer"], "state": known["other state"], "batch": known["batch"]}
    total = sum(rest.values()) - known["gradients"] + peak.bytes
    return {**rest, "activations": peak.kept, "transient": peak.bytes - peak.kept, "total": total, "live": peak.live}


def _plain(var):
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def available(device: jax.Device, devices: int) -> int | None:
    """Bytes that one device has; simulated devices share the memory of this machine. None if nobody says."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    found = machine.memory()
    return found[1] // devices if found else None


def problems(plan: Plan, parts: Parts, program: Program) -> Iterator[Problem]:
    """One problem if even without activations a step does not fit."""
    needs, devices = held(parts), program.mesh.devices
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


def _bytes(placement: Placement, words, tree) -> int:
    """Of one device's parts of a tree of shapes, whose dims `words` names; a leaf without words is whole."""
    parts = jax.tree.map(
        lambda own: layout.size(placement.scheme, layout.axes_of(layout.weight(placement, own))), words
    )
    return sum(jax.tree.leaves(jax.tree.map(lambda count, leaf: _size(leaf) // count, parts, tree)))


def _size(leaf) -> int:
    return math.prod(leaf.shape) * jax.dtypes.canonicalize_dtype(leaf.dtype).itemsize
