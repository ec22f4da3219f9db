"""What a step must hold on each device, found before it is compiled: from shapes alone, or from its trace."""

import math
from functools import partial

import jax

from jaxpar.core.types import State
from jaxpar.plan import layout, padding
from jaxpar.plan.layout import Layout, Placement
from jaxpar.report import account, hostlink, liveness, machine
from jaxpar.report.backends import CPU, RULES, Rules
from jaxpar.report.liveness import Peak
from jaxpar.step import master
from jaxpar.step.parts import Parts
from jaxpar.step.program import optimizer_places, traced
from jaxpar.step.update import updated

HOST = "host"  # the category of what rests there


def held(parts: Parts) -> dict[str, int]:
    """Bytes that one device holds during a step, by category; activations come on top. Needs no devices.

    What a plan offloads is in `host`, a category of its own, and not among the device's.

    Gradients are as large as parameters, or under ZeRO from stage 2 on as the part that a device owns; the state is
    donated, so it is there once.
    """
    placement, model = parts.settings.placement, parts.model

    def born():
        made = zip(model.dims, model.init(jax.random.key(0)), strict=True)
        params, extra = (padding.pad(placement, dims, tree) for dims, tree in made)
        return params, extra, parts.optimizer.init(params), parts.reducer.init(params)

    params, extra, opt, comm = jax.eval_shape(born)
    at_rest = jax.eval_shape(partial(master.resting, parts.master), params)
    own, gradients, moments = (_counts(placement, params, parts.settings.zero.layouts(since)) for since in (3, 2, 1))
    state = jax.tree.map(lambda words: _count(placement, layout.weight(placement, words)), model.dims[1])
    rows = layout.size(placement.scheme, layout.rows(placement, "batch", "-"))
    here = {
        "parameters": _split(own, at_rest, "parameters" in parts.offload),
        "optimizer": _split(
            optimizer_places(parts.optimizer, opt, params, moments, 1), opt, "optimizer" in parts.offload
        ),
    }
    return {
        "parameters": here["parameters"][0],
        "gradients": _bytes(gradients, params),
        "optimizer": here["optimizer"][0],
        "state": _bytes(state, extra) + sum(map(_size, jax.tree.leaves(comm))),
        "batch": sum(_size(a) // rows for a in (parts.inputs, parts.labels)),
        **({HOST: sum(there for _, there in here.values())} if parts.offload else {}),
    }


def on_device(bytes_held: dict[str, int]) -> int:
    """The sum of all categories but what rests on the host."""
    return sum(size for name, size in bytes_held.items() if name != HOST)


def predicted(parts: Parts, trace=None, backend: str = "cpu", near: int | None = None) -> dict[str, int]:
    """Bytes that one device needs for a step, by category, from the trace of the step alone. Needs no devices.

    What a compiler does with a trace is followed (`report.backends` has the rules, `report.fusion`, `report.rounding`
    and `report.liveness` apply them): XLA's for CPUs or for TPUs. That for GPUs fuses and orders otherwise, so there
    `activations`, `transient` and `total` are estimates.

    Args:
        parts: of the run.
        trace: `traced(parts)`, if it is at hand.
        backend: the platform that it is compiled for, as jax has it; one without rules gets those of `cpu`.
        near: bytes that its chip has beside the core, if that is known.

    Returns:
        parameters, gradients, optimizer, state, batch: as of `held`.
        activations: what is kept from forward to backward operations: of a pipeline, the pools of its timetable.
        transient: whatever else is there when most is there.
        host: what rests on the host; of activations, what one microbatch keeps there. Only where a plan offloads.
        total: all that must be there at once. Gradients come while activations go, so it may be less than the sum.
    """
    jaxpr = trace or traced(parts)
    rules = RULES.get(backend, CPU)
    peak, known = _peak(parts, jaxpr, rules if near is None else rules._replace(near=near)), held(parts)
    if parts.offload:
        known |= {HOST: known[HOST] + hostlink.lent(parts, jaxpr)}
    kept = min(peak.kept if parts.pipeline.plain else account.pool_bytes(parts, jaxpr), peak.bytes)
    return known | {
        "activations": kept,
        "transient": max(0, peak.bytes - kept - known["gradients"]),
        "total": on_device(known) - known["gradients"] + peak.bytes,
    }


def _peak(parts: Parts, jaxpr, rules: Rules) -> Peak:
    """Of a whole step, both halves with the shapes of one device; the new state is written to where the old one lies.

    Args:
        parts: of the run.
        jaxpr: of its loss and gradients, as `traced` gives it.
    """
    spread = next(one for one in jaxpr.eqns if one.primitive.name == "shard_map")
    inside = getattr(spread.params["jaxpr"], "jaxpr", spread.params["jaxpr"])
    made = jax.eval_shape(lambda: parts.model.init(jax.random.key(0)))
    like = 0.0, *made, jax.eval_shape(parts.reducer.init, made[0])
    found = jax.tree.unflatten(jax.tree.structure(like), [_plain(var) for var in inside.outvars])
    _, params, extra, comm = found
    at_rest = jax.eval_shape(partial(master.resting, parts.master), params)
    state = State(_plain(jaxpr.invars[-1]), at_rest, extra, jax.eval_shape(parts.optimizer.init, params), comm)
    then = jax.make_jaxpr(partial(updated, parts.optimizer, loss_scale=parts.loss_scale))(found, state).jaxpr

    results, (_, *counts) = len(inside.outvars), (len(jax.tree.leaves(one)) for one in state)
    given = iter(jaxpr.invars)
    trained, other = [next(given) for _ in range(sum(counts[:2]))], [next(given) for _ in range(counts[3])]
    old = [jaxpr.invars[-1], *trained, *[None] * counts[2], *other]
    place = {var: results + n for n, var in enumerate(spread.invars) if not hasattr(var, "val")}
    feeds = [*range(results), *(place.get(var) for var in old)]
    return liveness.peak(inside, then, feeds, [(results + n, n) for n in range(len(old))], rules)


def _plain(var) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def available(device: jax.Device, devices: int) -> int | None:
    """Bytes that one device has; simulated devices share the memory of this machine. None if nobody says."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    found = machine.memory()
    return found[1] // devices if found else None


def lost(stats, platform: str) -> int:
    """Bytes of a compiled step's `temp_size_in_bytes` that no device has to have.

    libtpu counts gaps between blocks there as well, for some twice. Its `peak_memory_in_bytes` does not, but counts
    blocks in the memory beside the core: each is enough, so the smaller one holds.

    Args:
        stats: `memory_analysis()` of the step.
        platform: what it is compiled for.
    """
    peak = getattr(stats, "peak_memory_in_bytes", None)
    if platform != "tpu" or not peak:
        return 0
    said = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return max(0, said + stats.temp_size_in_bytes - peak)


def _counts(placement: Placement, like, layouts):
    """Into how many parts the leaves of a tree are split, from a tree of layouts."""
    return jax.tree.map(lambda _, lies: _count(placement, lies), like, layouts)


def _count(placement: Placement, lies: Layout) -> int:
    return layout.size(placement.scheme, layout.axes_of(lies))


def _split(counts, tree, offloaded: bool) -> tuple[int, int]:
    """`_bytes` on the device and on the host: of what is offloaded, single numbers stay."""
    there = jax.tree.map(lambda leaf: bool(offloaded and leaf.ndim), tree)
    whole, rest = (
        _bytes(counts, tree),
        jax.tree.map(lambda away, leaf: leaf if not away else _nothing(leaf), there, tree),
    )
    here = _bytes(counts, rest)
    return here, whole - here


def _nothing(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((0,), leaf.dtype)


def _bytes(counts, tree) -> int:
    """Of one device's parts of a tree of shapes, each leaf in so many parts."""
    return sum(jax.tree.leaves(jax.tree.map(lambda count, leaf: _size(leaf) // count, counts, tree)))


def _size(leaf) -> int:
    return math.prod(leaf.shape) * jax.dtypes.canonicalize_dtype(leaf.dtype).itemsize
