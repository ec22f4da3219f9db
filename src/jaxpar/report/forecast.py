"""What is known of a run before anything is compiled, on devices that need not be there."""

import math
from typing import Any

import jax

from jaxpar.core.makespan import Times, makespan
from jaxpar.core.plan import Plan
from jaxpar.report import account, bill, memory
from jaxpar.report.columns import aligned
from jaxpar.step.parts import Parts

TIMES = Times()  # forward : gradient of inputs : gradient of weights, each as long as the others


def forecast(plan: Plan, parts: Parts) -> dict[str, Any]:
    """The figures of a plan for one model and batch, as plain values that JSON has.

    Args:
        plan: of the recipe.
        parts: what `prepare` made of it.

    Returns:
        plan: its text.
        devices: how many it takes.
        mesh: size of each axis, major axis first.
        params: numbers that are trained, over all devices and without padding.
        bubble: idle share of the pipeline where devices work as soon as they can, if forward takes 1 and backward 2.
        pipeline: see `_pipeline`.
        comm: `predicted`: bytes that a device sends in a step, by mesh axes and by collective; of a pipeline the device
            that sends most; None where XLA decides the collectives.
        memory: `predicted`: bytes that a device holds, by category; of activations only those that a timetable keeps.
        warnings: sentences.
    """
    shapes = jax.eval_shape(lambda: parts.model.init(jax.random.key(0))[0])
    axes = parts.settings.placement.scheme.axes or {"data": 1}  # as `mesh_of`
    sent = account.predicted(parts) if parts.partition == "manual" else None
    pipeline = _pipeline(plan, parts)
    return {
        "plan": str(plan),
        "devices": math.prod(axes.values()),
        "mesh": dict(axes),
        "params": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)),
        "bubble": pipeline.pop("bubble"),
        "pipeline": pipeline,
        "comm": {"predicted": bill.by_axis(sent) if sent else None},
        "memory": {"predicted": memory.held(parts) | {"kept by the timetable": account.pool_bytes(parts)}},
        "warnings": _warnings(plan, parts),
    }


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


def _warnings(plan: Plan, parts: Parts) -> list[str]:
    found, blocks = [], _blocks(parts)
    if plan.microbatches < plan.pipe:
        found.append(f"{plan.microbatches} microbatches never keep {plan.pipe} devices of a pipeline busy at once")
    if len(set(blocks)) > 1 and parts.pipeline.division.stack:
        found.append(f"stages have {', '.join(map(str, blocks))} blocks: all wait for the largest")
    if parts.partition == "auto":
        found.append("partition=auto: XLA decides the collectives, so what is sent is known only once compiled")
    return found


def text(found: dict[str, Any]) -> str:
    """A forecast as people read it."""
    pipeline, sent, held = found["pipeline"], found["comm"]["predicted"], found["memory"]["predicted"]
    rows = [
        ("plan", found["plan"]),
        ("devices", f"{found['devices']:,}: {' x '.join(f'{axis} {n}' for axis, n in found['mesh'].items())}"),
        ("parameters", f"{found['params']:,}"),
    ]
    if pipeline["stages"] > 1:
        idle = f"{found['bubble']:.1%} of each device's time, {pipeline['lockstep_bubble']:.1%} in lock-step"
        counts = f"{pipeline['stages']} stages, {pipeline['microbatches']} microbatches, {pipeline['ticks']} ticks"
        rows += [
            ("pipeline", f"{pipeline['schedule']}, {counts}"),
            ("idle", f"{idle}, if backward takes twice as long as forward"),
            ("blocks", f"{', '.join(map(str, pipeline['blocks']))}, by stage"),
            ("inputs held", f"{', '.join(map(str, pipeline['live']))} at most, by device"),
            ("messages", f"{pipeline['messages']:,} a step, over all devices"),
        ]
    lines = [aligned(("", ""), rows).strip("\n")]
    categories = [(name, f"{size:,}") for name, size in {**held, "all": sum(held.values())}.items()]
    lines.append(aligned(("held besides transients", "bytes per device"), categories, ("bytes per device",)))
    if sent is not None:
        lines.append(_sent(sent))
    return "\n\n".join([*lines, *(f"warning: {sentence}" for sentence in found["warnings"])])


def _sent(sent: dict[str, dict[str, float]]) -> str:
    rows = [
        (axes, kind, f"{size:,.0f}") for axes, kinds in sorted(sent.items()) for kind, size in sorted(kinds.items())
    ]
    total = sum(size for kinds in sent.values() for size in kinds.values())
    head = ("mesh axes", "collective", "bytes per device and step")
    return aligned(head, [*rows, ("all", "", f"{total:,.0f}")], head[2:])
