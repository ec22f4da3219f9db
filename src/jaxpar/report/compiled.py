"""What a compiled step says of itself: bytes, memory, flops, overlap and an estimated time. Nothing is run."""

import importlib.metadata
import math
import time
from typing import NamedTuple

import jax

from jaxpar.core.cost import Cost
from jaxpar.core.refuse import Problem, Refused
from jaxpar.plan import mesh as meshes
from jaxpar.report import estimate, flops, hlo, hlo_flops, hostlink, memory, topology
from jaxpar.report.estimate import Played, Rates, Reader
from jaxpar.report.hlo import How
from jaxpar.report.hlo_text import parse
from jaxpar.report.topology import Topology
from jaxpar.step import rehearsal
from jaxpar.step.parts import Parts
from jaxpar.step.program import Program, program

HOP = 1e-6  # seconds until the next chip has a first byte; assumed
FLOPS_RATIO = (1, 2)  # executed to model flops; full rematerialization makes 4/3
KEPT = 0.999  # share of the state that must be donated
MOVES = ("all_gather", "reduce_scatter", "all_reduce")  # kinds that XLA makes of each other
COMPILERS = {"tpu": ("libtpu",), "cuda": ("jax-cuda12-plugin", "jax-cuda13-plugin"), "cpu": ("jaxlib",)}


class DoesNotFit(Refused):
    """The compiler found no way to hold the step in the memory of a device."""


class Compiled(NamedTuple):
    """A step as the compiler made it; bytes, flops and seconds are those of one device and one step.

    Attributes:
        target: the topology's word; `cpu` for simulated devices.
        devices: how many.
        compiler: its package and version; schedules change with it.
        compile_seconds: of the compiler alone.
        sent: bytes by (mesh axes joined by `+`, collective); of a pipeline the device that sends most.
        messages: how many, by the same keys.
        flops: executed in matrix products and convolutions; of a pipeline the device that does most.
        model_flops: a device's part of the model's own.
        arguments, outputs, aliased, temporary, code: bytes, of XLA's `memory_analysis`; `aliased` are arguments that
            outputs are written over.
        host: bytes that rest on the host, or are there for a while; none of the device's.
        peak: bytes, as XLA states it; on a TPU the memory beside the core counts as well. None if it does not.
        lost: bytes of `temporary` that need not be there, see `memory.lost`.
        room: bytes that a device has.
        state: bytes of the state on the device, from shapes alone, all of which should be `aliased`.
        started: bytes that are sent while the device may go on.
        beside: bytes sent while it does: with products or cycles between start and end.
        sending: seconds that links are busy, one collective after the other; None if nobody says how fast they are.
        provisional: whether `beside` is of a schedule that no cost model made, as on a GPU that is not there.
        played: the estimate, in seconds by cause; None where the program states no cycles.
        mfu: estimated, in dense bfloat16 flops of the chip; attention is not discounted for causality.
        warnings: sentences.
    """

    target: str
    devices: int
    compiler: str
    compile_seconds: float
    sent: dict[tuple[str, str], float]
    messages: dict[tuple[str, str], float]
    flops: float
    model_flops: float
    arguments: int
    outputs: int
    aliased: int
    temporary: int
    code: int
    host: int
    peak: int | None
    lost: int
    room: float | None
    state: int
    started: float
    beside: float
    sending: float | None
    provisional: bool
    played: Played | None
    mfu: float | None
    warnings: tuple[str, ...]

    @property
    def held(self) -> int:
        """Bytes that a device holds at most: arguments, outputs that are none of them, temporaries and the program."""
        return self.arguments + self.outputs - self.aliased + self.temporary - self.lost + self.code

    @property
    def fits(self) -> bool | None:
        """Whether that is less than a device has; None if nobody says what it has."""
        return None if self.room is None else self.held <= self.room


def compile_for(parts: Parts, where: Topology) -> Compiled:
    """Compile the step for devices that need not be there, and read what came of it.

    Takes half a minute or more; nothing is put on any device.

    Raises:
        Refused: if the plan takes another number of devices, or the compiler is not installed.
        DoesNotFit: if the step asks for more memory than a device has.
    """
    axes = parts.settings.placement.scheme.axes
    if math.prod(axes.values()) != where.count:
        rule = f"has {where.count} devices, and the plan takes {math.prod(axes.values())}."
        raise Refused([Problem("topology", where.word, rule, "a topology and a plan for as many devices")])
    if where.platform == "tpu" and where.slices > 1 and not meshes.across_slices(axes, where.slices):
        rule = f"has {where.slices} slices, and no mesh axis of {dict(axes)} divides by that."
        raise Refused([Problem("topology", where.word, rule, f"data={where.slices}, or a multiple")])
    made = program(parts, topology.devices(where))
    lowered, began = made.step.lower(made.shapes, made.batch), time.perf_counter()
    try:
        step = lowered.compile(compiler_options=topology.compiler_options(where))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
        legal = "a smaller batch or model.context; more microbatches; or a scheme that splits more"
        raise DoesNotFit([Problem("topology", where.word, f"the step does not fit: {said}.", legal)]) from error
    return read(parts, made, step, time.perf_counter() - began, where)


def read(
    parts: Parts, made: Program, step: jax.stages.Compiled, seconds: float, where: Topology | None = None
) -> Compiled:
    """What a compiled step says.

    Args:
        parts: of the run.
        made: the program that the step is of.
        step: compiled from it.
        seconds: how long that took.
        where: the devices that it was compiled for; None: simulated ones of this machine.
    """
    text, stats = step.as_text(), step.memory_analysis()
    axes = parts.settings.placement.scheme.axes or {"data": 1}
    traffic, played = play(parts, text, where)
    timed = played.compute > 0
    count, peak = math.prod(axes.values()), where and where.chip.flops["bf16"] / where.chip.cores
    found = Compiled(
        target=where.word if where else "cpu",
        devices=count,
        compiler=_compiler(where),
        compile_seconds=seconds,
        sent=traffic.sent,
        messages=traffic.messages,
        flops=played.flops,
        model_flops=flops.of_model(parts) / count,
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporary=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        host=hostlink.stated(stats),
        peak=getattr(stats, "peak_memory_in_bytes", None),
        lost=memory.lost(stats, where.platform if where else "cpu"),
        room=where.memory if where else None,
        state=sum(_size(leaf) for leaf in jax.tree.leaves(made.shapes)) - stats.host_alias_size_in_bytes,
        started=played.started,
        beside=played.beside,
        sending=played.sending if where else None,
        provisional=not timed,
        played=played if timed else None,
        mfu=flops.of_model(parts) / count / played.seconds / peak if timed else None,
        warnings=tuple(dict.fromkeys((*traffic.unknown, *played.unknown))),
    )
    return found._replace(warnings=(*found.warnings, *doubts(found, parts.pipeline.table.devices)))


def play(parts: Parts, text: str, where: Topology | None) -> tuple[hlo.Traffic, Played]:
    """What is sent, and the step played; of a pipeline by the device that sends most, and by the one that does most."""
    pipeline, axes = parts.pipeline, parts.settings.placement.scheme.axes or {"data": 1}
    slices = where.slices if where and where.platform == "tpu" else 1
    across = meshes.across_slices(axes, slices)
    inner = axes | ({across: axes[across] // slices} if across else {})  # the text is that of one slice
    parsed, rates = parse(text), rates_of(axes, where) if where else None
    inside = hlo_flops.inside(parsed)
    cut = pipeline.table, pipeline.division.stages, pipeline.storage
    together, traffic, played = rehearsal.branches(*cut), [], []
    for device in range(pipeline.table.devices):
        own = rehearsal.shares(*cut, device)
        traffic.append(hlo.count(text, inner, own, slices))
        played.append(estimate.play(Reader(parsed, How(inner, own, slices), rates, inside, together), parsed.entry))
    most = max(played, key=lambda one: (one.seconds, one.flops))
    return max(traffic, key=lambda one: sum(one.sent.values())), most._replace(flops=max(one.flops for one in played))


def rates_of(axes: dict[str, int], where: Topology) -> Rates:
    """What a device of a topology does in a second, for a mesh with these axes, major first.

    A ring of TPUs sends both ways at once, a line does not; axes are taken to lie along one dim of the torus, unless
    the program says otherwise. GPUs of a host share a switch, hosts a network with a part for each GPU.
    """
    chip, strides, stride = where.chip, {}, 1
    for name, size in reversed(axes.items()):
        strides[name], stride = (stride, size), stride * size

    def torus(label: str, kind: str) -> float:
        closed = all(dim % chip.ring == 0 for dim in where.shape)
        return chip.network if label == hlo.SLICES else chip.link * (2 if closed and kind != "permute" else 1)

    def switch(label: str, kind: str) -> float:
        size = where.shape[-1]
        digits = [strides[name] for name in label.split("+") if name in strides]
        if all(stride * count <= size for stride, count in digits):
            return chip.link * chip.links
        members = math.prod(min(count, max(1, size // stride)) for stride, count in digits)
        return chip.network * (1 if kind == "permute" else members)

    return Rates(chip.clock or math.inf, chip.memory_rate, torus if chip.torus else switch, HOP)


def differences(predicted: Cost, found: Compiled) -> list[str]:
    """One sentence for each mesh axis and collective whose compiled bytes are not those predicted, with a likely cause.

    Slices of TPUs send in a hierarchy of their own; their sums are compared by collective, over all axes.
    """
    before, after = predicted.sent, found.sent
    if any(axes == hlo.SLICES for axes, _ in after):
        before, after = (_over_all(sent) for sent in (before, after))
    said = []
    for axes, kind in sorted({**before, **after}):
        old, new = before.get((axes, kind), 0.0), after.get((axes, kind), 0.0)
        if abs(old - new) > 0.5:
            cause = _cause(
                kind, old, new, {one: after.get((axes, one), 0) - before.get((axes, one), 0) for one in MOVES}
            )
            said.append(f"{kind} over {axes}: predicted {old:,.0f} bytes, compiled {new:,.0f}{cause}")
    return said


def _cause(kind: str, old: float, new: float, grown: dict[str, float]) -> str:
    """What XLA is known to do, if the figures are as it would make them; `grown` is by how much each kind has."""
    lost = -min(grown["all_gather"], 0.0) - min(grown["reduce_scatter"], 0.0)
    if kind in MOVES and lost and grown["all_reduce"] > 1.5 * lost and (kind == "all_reduce" or new < old):
        return ": gathers or scatters became all-reduces of whole buffers, which send twice as much"
    if 0.45 * old < new < 0.56 * old:
        return ": in bfloat16, to which the program rounds it anyway"
    if kind == "all_reduce" and abs(old - new) < 1000:
        return ": sums of single numbers were merged or split"
    return ""


def _over_all(sent: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    total: dict[tuple[str, str], float] = {}
    for (_, kind), size in sent.items():
        total["all axes", kind] = total.get(("all axes", kind), 0.0) + size
    return total


def doubts(found: Compiled, stages: int = 1) -> list[str]:
    """What cannot be true, or should not be: a sentence each. One of `stages` devices may have all of the work."""
    ratio, said = found.flops / found.model_flops if found.model_flops else 1.0, []
    if not FLOPS_RATIO[0] * 0.999 <= ratio <= FLOPS_RATIO[1] * stages:
        said.append(f"executed flops are {ratio:.3f} times the model's; expected between 1 and {2 * stages}")
    if found.mfu is not None and not 0 < found.mfu < 1:
        said.append(f"the estimated MFU is {found.mfu:.2f}: the estimate is wrong")
    if found.aliased < KEPT * found.state:
        said.append(f"only {found.aliased:,} of {found.state:,} bytes of state are updated in place")
    if found.fits is False:
        said.append(f"the step holds {found.held / 2**30:,.1f} GiB, and a device has {found.room / 2**30:,.1f} GiB")
    return said


def _compiler(where: Topology | None) -> str:
    known = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    names = COMPILERS[where.platform if where else "cpu"]
    return next((f"{name} {known[name]}" for name in names if name in known), names[0])


def _size(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of a leaf on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
