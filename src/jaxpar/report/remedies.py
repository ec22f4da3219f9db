"""What would make a step fit that does not: plans near its own, predicted by the same bill, the cheapest first."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxpar.core.cost import Cost
from jaxpar.core.plan import Plan, scheme_of
from jaxpar.core.refuse import Problem, Refused
from jaxpar.report import account, chips, flops, hostlink, memory
from jaxpar.report.chips import Chip
from jaxpar.report.columns import aligned
from jaxpar.step.parts import Parts
from jaxpar.step.program import traced

SHOWN = 3
FULL = "RESOURCE_EXHAUSTED"  # how such an error begins
ASSUMED = "v5e"  # whose rates weigh flops against bytes where the device is of no kind that is known
KEEPING = ("none", "dots", "block", "sqrt")  # policies of remat, each keeps less than the one before
FURTHER = ("one_d", "fsdp")  # schemes of one size, which may take devices from the data axis
Remake = Callable[[Plan], Parts]


def _nobody(words: str) -> None:
    """Tell nobody."""


class Remedy(NamedTuple):
    """Another plan for the same run, predicted.

    Attributes:
        change: the fields that differ, and what they would be.
        total: bytes that each device needs.
        saves: by how many that is less than now.
        slower: seconds that a step takes longer, at the rates of a chip; below 0 if it takes less.
        fits: whether `total` is at most what a device has.
    """

    change: dict[str, Any]
    total: int
    saves: int
    slower: float
    fits: bool


class Need(NamedTuple):
    """A run that may not fit, and the device that it is for.

    Attributes:
        plan: as of the recipe.
        parts: of the run.
        remake: `remake(plan)`: the parts under another plan; refuses one that cannot be.
        room: bytes that each device has; None if nobody says.
        backend: whose compiler: one of `backends.RULES`.
        chip: what the devices are; None if that is not known.
    """

    plan: Plan
    parts: Parts
    remake: Remake
    room: float | None
    backend: str
    chip: Chip | None


def need_of(plan: Plan, parts: Parts, remake: Remake, mesh: Mesh) -> Need:
    """The need of a run on devices that are here; the rest as of `Need`."""
    device = mesh.devices.flat[0]
    room = memory.available(device, mesh.devices.size)
    return Need(plan, parts, remake, room, device.platform, chips.chip_of(device.device_kind))


def problems(need: Need, tell: Callable[[str], None] = _nobody) -> Iterator[Problem]:
    """One problem if even without activations a step does not fit."""
    held = memory.held(need.parts)
    total = memory.on_device(held)
    if need.room is not None and total > need.room:
        large = ", ".join(
            f"{name} {_said(size)}" for name, size in held.items() if size > total / 1000 and name != memory.HOST
        )
        says = f"each device would hold {_said(total)} ({large}) besides activations, "
        yield message(need, f"{says}and has {_said(need.room)}.", tell)


def of_compiled(need: Need, step: jax.stages.Compiled, tell: Callable[[str], None] = _nobody) -> Iterator[Problem]:
    """One problem if the compiled step, activations and all, asks for more than a device has."""
    said = step.memory_analysis()
    if said is None or need.room is None:
        return
    total = said.argument_size_in_bytes + said.temp_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
    total -= memory.lost(said, need.backend)
    if total > need.room:
        rule = f"the compiled step asks for {_said(total)} on each device, which has {_said(need.room)}."
        yield message(need, rule, tell)


@contextmanager
def answered(need: Need, tell: Callable[[str], None] = _nobody, done: str = "nothing was started") -> Iterator[None]:
    """Turn what a compiler or a device says when its memory is full into `message`.

    Raises:
        Refused: for any such error; `done` says how far the run is.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if FULL not in str(error):
            raise
        said = str(error).splitlines()[0].removeprefix(f"{FULL}: ").rstrip(".")
        raise Refused([message(need, f"{said}.", tell)], done) from error


def message(need: Need, says: str, tell: Callable[[str], None] = _nobody) -> Problem:
    """The problem of `answer`."""
    return answer(need, says, tell)[1]


def answer(need: Need, says: str, tell: Callable[[str], None] = _nobody) -> tuple[list[Remedy], Problem]:
    """The cheapest remedies, and one problem: what does not fit, the bytes by category, and what each remedy saves.

    Args:
        need: the run.
        says: what was found, as a sentence.
        tell: is told how far the search is, which takes about a second for each plan.
    """
    tell("it does not fit; looking for what would help ...")
    trace = _trace(need.parts)
    now = _bytes(need, need.parts, trace)
    found = cheapest(need, (now, _seconds(need, need.parts, trace)), tell)
    rule = f"{says}\n{_held(now, need.room)}"
    if not found:
        further = "\n    Take a smaller model, batch or context; or more devices."
    else:
        chip = need.chip.name if need.chip else f"{ASSUMED}, as this device's rates are not known"
        none = "" if found[0].fits or need.room is None else "; none of them is enough alone"
        further = f"\n    The cheapest remedies, predicted (times at the rates of {chip}){none}:\n{_rows(found)}"
    return found, Problem("memory", need.plan, rule + further)


def cheapest(need: Need, now: tuple[dict[str, int], float], tell: Callable[[str], None]) -> list[Remedy]:
    """The three plans that fit and add least to a step; after them, if there are fewer, those that save most.

    If no change is enough alone, the best are tried together.

    Args:
        need: the run.
        now: its bytes by category, and an estimate of its step in seconds.
        tell: is told how far it is.
    """
    here = need.backend == "cpu"  # whose host memory is that of the device
    tried = [change for change in _changes(need.plan) if not (here and "offload" in change)]
    found = []
    for number, change in enumerate(tried):
        tell(f"looking for what would help: {number + 1} of {len(tried)}, {_written(change)}")
        found += _tried(need, change, now)
    best = _different(found)
    for count in range(2, len(best) + 1):
        if not any(one.fits for one in found):
            tell(f"looking for what would help: the best {count} together")
            found += _tried(need, dict(item for one in best[count - 1 :: -1] for item in one.change.items()), now)
    return _different(found)


def _tried(need: Need, change: dict[str, Any], now: tuple[dict[str, int], float]) -> list[Remedy]:
    """One remedy, if the plan can be and needs less."""
    held, seconds = now
    try:
        parts = need.remake(dataclasses.replace(need.plan, **change))
        trace = _trace(parts)  # refuses a budget of bytes that is too small for the other plan
    except Refused:
        return []
    total = _bytes(need, parts, trace)["total"]
    fits = need.room is not None and total <= need.room
    found = Remedy(change, total, held["total"] - total, _seconds(need, parts, trace) - seconds, fits)
    return [found] if found.saves > 0 else []


def _different(found: list[Remedy]) -> list[Remedy]:
    """The best three that change different fields."""
    ordered = sorted(found, key=lambda one: (not one.fits, one.slower if one.fits else 0.0, -one.saves))
    first = {tuple(one.change): one for one in reversed(ordered)}
    return [one for one in ordered if one in first.values()][:SHOWN]


def _changes(plan: Plan) -> Iterator[dict[str, Any]]:
    """Fields to change, most of them one at a time; a plan that cannot be is refused later."""
    if plan.data > 1 or scheme_of(plan.tensor).axes.get("depth"):
        yield from ({"zero": stage} for stage in range(plan.zero + 1, 4))
    if plan.remat in KEEPING:
        yield from ({"remat": policy} for policy in KEEPING[KEEPING.index(plan.remat) + 1 :])
    if plan.storage == "residual":
        yield {"storage": "recompute"}
    yield from ({"microbatches": plan.microbatches * more} for more in (2, 4))
    if plan.offload == "none":
        yield {"offload": "optimizer"}
    yield from _schemes(plan)


def _schemes(plan: Plan) -> Iterator[dict[str, Any]]:
    """The data axis given up to a tensor scheme; to one that is there, half of it."""
    name, _, size = plan.tensor.partition(":")
    whole = {field: 0 for field in ("zero", "zero_group") if getattr(plan, field)}  # there is no data axis then
    if name == "single":
        for scheme in FURTHER:
            if plan.data > 1:
                yield {"data": 1, "tensor": f"{scheme}:{plan.data}"} | whole
    elif name in FURTHER and plan.data % 2 == 0:
        yield {"data": plan.data // 2, "tensor": f"{name}:{int(size) * 2}"}


def _trace(parts: Parts):
    return traced(parts) if parts.partition == "manual" else None


def _bytes(need: Need, parts: Parts, trace) -> dict[str, int]:
    """By category, and `total`; where XLA decides the collectives without activations."""
    if trace is not None:
        return memory.predicted(parts, trace, need.backend, need.chip and need.chip.near)
    held = memory.held(parts)
    return held | {"total": memory.on_device(held)}


def _seconds(need: Need, parts: Parts, trace) -> float:
    """A step's products, what it sends, and to the host and back, one after the other: to compare two plans by."""
    chip = need.chip or chips.named(ASSUMED)
    if trace is None:
        return 0.0
    work = flops.executed(parts, trace) / (chip.flops["bf16"] / chip.cores)
    sent: Cost = account.predicted(parts, trace)
    there = hostlink.moved(parts, memory.held(parts).get(memory.HOST, 0), trace)
    host = hostlink.seconds(there, chip.host or chips.named(ASSUMED).host)
    return work + sent.total_sent / (chip.link or chip.memory_rate) + host


def _held(now: dict[str, int], room: float | None) -> str:
    """What each device holds by category, and what there is."""
    rows = [(name, f"{size:,}", _said(size)) for name, size in now.items() if size or name == "total"]
    if room is not None:
        rows.append(("there is", f"{room:,.0f}", _said(room)))
    return _indented(aligned(("predicted, per device", "bytes", ""), rows, ("bytes", "")))


def _rows(found: list[Remedy]) -> str:
    rows = [
        (
            _written(one.change),
            f"{one.saves:,}",
            f"{one.total:,}",
            f"{one.slower * 1e3:+,.3g}",
            "yes" if one.fits else "no",
        )
        for one in found
    ]
    head = ("change", "bytes saved", "bytes then", "ms a step", "fits")
    return _indented(aligned(head, rows, head[1:4]))


def _said(size: float) -> str:
    """Bytes in a unit that leaves a few digits."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**29 else f"{size / 2**20:,.1f} MiB"


def _indented(text: str) -> str:
    return "\n".join(f"      {line}" for line in text.splitlines())


def _written(change: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in change.items())
