"""What is known of a run before anything is compiled, and beside it what a compiled step says."""

import math
from collections.abc import Iterable
from typing import Any

import jax

from jaxpar.core.cost import Cost
from jaxpar.core.makespan import Times, makespan
from jaxpar.core.plan import Plan
from jaxpar.report import account, bill, compiled, flops, hostlink, memory
from jaxpar.report.backends import RULES
from jaxpar.report.columns import aligned
from jaxpar.report.compiled import Compiled
from jaxpar.report.topology import Topology
from jaxpar.step.parts import Parts
from jaxpar.step.program import traced

TIMES = Times()  # forward : gradient of inputs : gradient of weights, each as long as the others

OFF = 0.05  # by how much the predicted total may be wrong
CERTAIN = ("parameters", "gradients", "optimizer", "state", "batch")  # of what is held, under any compiler
FOLLOWED = "activations, transients and the total that are predicted are those of XLA's CPU compiler: GPUs' fuses more"


def forecast(plan: Plan, parts: Parts, where: Topology | None = None, trace=None) -> dict[str, Any]:
    """The figures of a plan for one model and batch, as plain values that JSON has.

    Args:
        plan: of the recipe.
        parts: what `prepare` made of it.
        where: devices that it is meant for, if said.
        trace: `traced(parts)`, if it is at hand.

    Returns:
        plan: its text.
        devices: how many it takes.
        topology: the devices that it is meant for; None: none in particular. room: bytes that each has.
        mesh: size of each axis, major axis first.
        params: numbers that are trained, over all devices and without padding.
        flops: of one device and step: `model`, its part of the model's own; `executed`, of the products that it carries
            out, of a pipeline the device that does most; `compiled`, read from the program.
        bubble: idle share of the pipeline where devices work as soon as they can, if forward takes 1 and backward 2.
        pipeline: see `_pipeline`.
        comm: bytes that a device sends in a step, by mesh axes and by collective; of a pipeline the device that sends
            most. `predicted` is None where XLA decides the collectives.
        memory: bytes that a device holds, by category and in `total`, see `memory.predicted`. Where XLA decides the
            collectives, without activations.
        host: None if nothing is offloaded; else what goes over the link to the host, see `hostlink.as_json`; `seconds`
            where `where` has chips whose maker states how fast it is.
        fits: False if a device of `where` has too little memory for what is certain; else None until compiled.
        compiled: see `with_compiled`.
        warnings: sentences.

    What is `compiled` is None until `with_compiled`.
    """
    shapes = jax.eval_shape(lambda: parts.model.init(jax.random.key(0))[0])
    axes = parts.settings.placement.scheme.axes or {"data": 1}  # as `mesh_of`
    count, manual = math.prod(axes.values()), parts.partition == "manual"
    trace = trace or (traced(parts) if manual else None)
    held = {"total": None} | (_predicted(parts, where, trace) if manual else memory.held(parts))
    pipeline = _pipeline(plan, parts)
    return {
        "plan": str(plan),
        "devices": count,
        "topology": where and where.word,
        "room": where and where.memory,
        "mesh": dict(axes),
        "params": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)),
        "flops": {
            "model": flops.of_model(parts) / count,
            "executed": flops.executed(parts, trace) if manual else None,
            "compiled": None,
        },
        "bubble": pipeline.pop("bubble"),
        "pipeline": pipeline,
        "comm": {"predicted": bill.by_axis(account.predicted(parts, trace)) if manual else None, "compiled": None},
        "memory": {"predicted": held, "compiled": None},
        "host": _over_the_link(parts, held, where, trace) if parts.offload else None,
        "fits": False if where and _least(held, where) > where.memory else None,
        "compiled": None,
        "warnings": _warnings(plan, parts, where),
    }


def _predicted(parts: Parts, where: Topology | None, trace) -> dict[str, int]:
    return memory.predicted(parts, trace, *((where.platform, where.chip.near) if where else ()))


def _least(held: dict[str, Any], where: Topology) -> float:
    """Bytes that a device must have at least: where the compiler is followed, the total less what that may be off."""
    certain = sum(held[name] for name in CERTAIN if name in held)
    return max(certain, (held["total"] or 0) * (1 - OFF)) if where.platform in RULES else certain


def _over_the_link(parts: Parts, held: dict, where: Topology | None, trace) -> dict[str, Any]:
    resting = memory.held(parts)[memory.HOST]
    return hostlink.as_json(hostlink.moved(parts, resting, trace), where and where.chip.host)


def with_compiled(found: dict[str, Any], made: Compiled) -> dict[str, Any]:
    """A forecast with what the compiled step says, under `compiled` of each figure, and its own:

    target: the topology, or `cpu` for simulated devices; compiler: its package and version; compile_seconds.
    estimate: None where the compiler counts no cycles; else seconds of a step, by cause, never run: see `Played`; and
        `mfu`, in dense bfloat16 flops of the chip. Good to compare two plans on the same chip.
    started, beside: bytes that are sent while the device may go on, and while it does.
    """
    sent = bill.by_axis(Cost(made.sent))
    held = {name: getattr(made, name) for name in ("arguments", "outputs", "aliased", "temporary", "lost", "code")}
    held |= {memory.HOST: made.host} if made.host else {}
    causes = ("seconds", "compute", "kernels", "exposed", "fetching", "idle")
    played = made.played and {name: getattr(made.played, name) for name in causes} | {"mfu": made.mfu}
    own = {"target": made.target, "compiler": made.compiler, "compile_seconds": made.compile_seconds}
    own |= {"estimate": played, "sending": made.sending, "started": made.started, "beside": made.beside}
    found = found | {
        "flops": found["flops"] | {"compiled": made.flops},
        "comm": found["comm"] | {"compiled": sent},
        "memory": found["memory"] | {"compiled": held | {"total": made.held}},
        "fits": found["fits"] if made.fits is None else made.fits,
        "compiled": own,
    }
    return found | {"warnings": [*found["warnings"], *made.warnings, *_differences(found, made)]}


def _differences(found: dict[str, Any], made: Compiled) -> list[str]:
    """One sentence for each figure that is predicted to be one number, and compiled to be another."""
    said, predicted, executed = [], found["comm"]["predicted"], found["flops"]["executed"]
    if predicted is not None:
        sent = {(axes, kind): size for axes, kinds in predicted.items() for kind, size in kinds.items()}
        said += compiled.differences(Cost(sent), made)
    if executed and abs(executed - made.flops) > 1e-3 * executed:
        said.append(f"flops: predicted {executed:,.0f}, compiled {made.flops:,.0f}")
    return said


def without_room(found: dict[str, Any], error: compiled.DoesNotFit) -> dict[str, Any]:
    """A forecast of a step that the compiler found no room for."""
    return found | {"fits": False, "warnings": [*found["warnings"], error.problems[0].rule]}


def _pipeline(plan: Plan, parts: Parts) -> dict[str, Any]:
    """The timetable in figures.

    `span` and `bubble` are of devices that work as soon as they can; `lockstep_*` where every tick lasts as long as its
    busiest device, as in the compiled program. `live` is the most inputs of stages that each device holds, `messages`
    what all devices send to others, `sends` what each sends, `blocks` how many each stage has. All devices have room
    for as much as the one that holds most: they run one program.
    """
    table = parts.pipeline.table
    found = makespan(table.order, table.at, TIMES)
    return {
        "schedule": plan.schedule,
        "stages": table.stages,
        "microbatches": table.microbatches,
        "ticks": table.ticks,
        "span": found.span,
        "bubble": found.bubble,
        "gap": found.gap,
        "lockstep_span": found.lockstep_span,
        "lockstep_bubble": found.lockstep_bubble,
        "live": [*found.peak],
        "messages": found.messages,
        "sends": [*found.sends],
        "blocks": _blocks(parts),
    }


def _blocks(parts: Parts) -> list[int]:
    """Blocks of stacks in each stage; what stands around them is not counted."""
    return [sum(piece.count for piece in stage) for stage in parts.pipeline.division.stages]


def _warnings(plan: Plan, parts: Parts, where: Topology | None) -> list[str]:
    found, blocks = [], _blocks(parts)
    if plan.microbatches < plan.pipe:
        found.append(f"{plan.microbatches} microbatches never keep {plan.pipe} devices of a pipeline busy at once")
    if len(set(blocks)) > 1 and parts.pipeline.division.stack:
        found.append(f"stages have {', '.join(map(str, blocks))} blocks: all wait for the largest")
    if "parameters" in parts.offload and plan.pipe > 1 and plan.remat == "none":
        found.append(
            "parameters on the host in a pipeline: the compiler for TPUs then copies what blocks keep, which took more "
            "than it gave; remat=block keeps little"
        )
    if parts.partition == "auto":
        found.append("partition=auto: XLA decides the collectives, so what is sent is known only once compiled")
    elif where and where.platform not in RULES:
        found.append(FOLLOWED)
    if parts.settings.policy.note:
        found.append(f"precision={plan.precision}: {parts.settings.policy.note}")
    return found


def text(found: dict[str, Any]) -> str:
    """A forecast as people read it."""
    pipeline = found["pipeline"]
    rows = [
        ("plan", found["plan"]),
        ("devices", f"{found['devices']:,}: {' x '.join(f'{axis} {n}' for axis, n in found['mesh'].items())}"),
        *([("topology", found["topology"])] if found["topology"] else []),
        ("parameters", f"{found['params']:,}"),
    ]
    if pipeline["stages"] > 1:
        idle = f"{pipeline['lockstep_bubble']:.1%} of the time, as all wait for the slowest in each tick"
        idle = f"{idle}; {found['bubble']:.1%} if none had to"
        counts = f"{pipeline['stages']} stages, {pipeline['microbatches']} microbatches, {pipeline['ticks']} ticks"
        rows += [
            ("pipeline", f"{pipeline['schedule']}, {counts}"),
            ("idle", f"{idle} (backward twice as long as forward, equal stages)"),
            ("blocks", f"{', '.join(map(str, pipeline['blocks']))}, by stage"),
            ("inputs held", f"{', '.join(map(str, pipeline['live']))} of stages at most, by device"),
            ("messages", f"{pipeline['messages']:,} a step that carry something; each device sends in every tick"),
        ]
    lines = [aligned(("", ""), rows).strip("\n"), _figures(found), *_own(found)]
    return "\n\n".join([*lines, *(f"warning: {sentence}" for sentence in found["warnings"])])


def _figures(found: dict[str, Any]) -> str:
    """Predicted beside compiled, and the difference."""
    both = found["compiled"] is not None
    rows: list[tuple] = [("flops", "model", found["flops"]["model"], None)]
    rows.append(("flops", "executed", found["flops"]["executed"], found["flops"]["compiled"]))
    rows += _sent(*(found["comm"][name] for name in ("predicted", "compiled")))
    held, said = (found["memory"][name] for name in ("predicted", "compiled"))
    both_say = ("total", memory.HOST)
    rows += [("bytes held", name, size, None) for name, size in held.items() if name not in both_say]
    rows += [("bytes held", name, None, size) for name, size in (said or {}).items() if name not in both_say]
    rows.append(("bytes held", "total", held["total"], said and said["total"]))
    if found["host"]:
        rows.append(("bytes on the host", "", held[memory.HOST], said and said.get(memory.HOST)))
    head = ("per device and step", "", "predicted", *(("compiled", "compiled / predicted") if both else ()))
    cells = []
    for *named, before, after in rows:
        if both or before is not None:
            cells.append((*named, _number(before), *((_number(after), _ratio(before, after)) if both else ())))
    return aligned(head, cells, head[2:])


def _sent(predicted: dict | None, after: dict | None) -> Iterable[tuple]:
    known = {**(predicted or {}), **(after or {})}
    total: list[float | None] = []
    for one in (predicted, after):
        total.append(None if one is None else sum(sum(kinds.values()) for kinds in one.values()))
    for axes in sorted(known):
        kinds = sorted({*(predicted or {}).get(axes, {}), *(after or {}).get(axes, {})})
        for kind in kinds:
            pair = (None if one is None else one.get(axes, {}).get(kind, 0.0) for one in (predicted, after))
            yield (f"bytes sent over {axes}", kind, *pair)
    yield ("bytes sent", "total", *total)


def _number(value: float | None) -> str:
    """In full, and above a million also to three digits."""
    if value is None:
        return ""
    for size, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value:,.0f} ({value / size:.3g} {name})"
    return f"{value:,.0f}"


def _ratio(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    return "equal" if abs(before - after) < 0.5 else f"{after / before:.3f}" if before else "none predicted"


def _own(found: dict[str, Any]) -> Iterable[str]:
    """What goes to the host and back, what only the compiled program says, and whether it all fits."""
    if found["host"]:
        yield aligned(("", ""), hostlink.text(found["host"])).strip("\n")
    if made := found["compiled"]:
        done = "simulated devices" if made["target"] == "cpu" else f"{made['target']}, not run"
        rows = [("compiled for", f"{done}, by {made['compiler']} in {made['compile_seconds']:.1f} s")]
        if played := made["estimate"]:
            parts = ", ".join(f"{name} {played[name]:.3g}" for name in played if name not in ("seconds", "mfu"))
            rows.append(("estimated step", f"{played['seconds']:.3g} s by the compiler's own cycle counts ({parts})"))
            rows.append(("estimated MFU", f"{played['mfu']:.3f} of dense bfloat16; to compare plans on this chip"))
        if made["started"]:
            rows.append(("sent meanwhile", f"{made['beside']:,.0f} of {made['started']:,.0f} asynchronous bytes"))
        yield aligned(("", ""), rows).strip("\n")
    if found["room"] and found["fits"] is None:
        held, room = found["memory"]["predicted"], f"{found['room'] / 2**30:,.1f} GiB"
        if held["total"] and FOLLOWED not in found["warnings"]:
            yield f"Each device would hold {held['total'] / 2**30:,.2f} of its {room}, as predicted for its compiler."
        else:
            certain = sum(held.get(name, 0) for name in CERTAIN)
            rest = "whether the rest fits, the compiled step says."
            yield f"Without activations each device holds {certain / 2**30:,.2f} of its {room}; {rest}"
    if found["fits"] is not None:
        yield f"It {'fits' if found['fits'] else 'does not fit'} into the memory of a device."
