"""Pipeline work cell by cell: what each device does, one thing after the other, and whether that can be done at all."""

import statistics
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxpar.core.refuse import Problem

KINDS = ("F", "B", "W")  # in the order in which a device does them within a tick
FIELD = "plan.schedule"
SHOWN = 8  # problems of one sort: the first ones say enough


class Cell(NamedTuple):
    """One piece of pipeline work.

    Attributes:
        kind: `F` forward; `B` gradient of the input, and of the weights too if the order has no `W`; `W` gradient of
            the weights.
        stage: which part of the model, 0 first. A device may hold several.
        microbatch: which part of the batch, 0 first.
    """

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} of microbatch {self.microbatch} at stage {self.stage}"


class Order(NamedTuple):
    """Where stages lie and what each device does, one cell after the other: all that a schedule says.

    Attributes:
        place: the device of each stage, first stage first.
        work: the cells of each device, in order. When they are done follows from what they wait for.
    """

    place: tuple[int, ...]
    work: tuple[tuple[Cell, ...], ...]

    @property
    def devices(self) -> int:
        """Number of devices."""
        return len(self.work)

    @property
    def stages(self) -> int:
        """Number of stages, over all devices."""
        return len(self.place)

    @property
    def microbatches(self) -> int:
        """Number of microbatches: what most stages have of a kind, so that one wrong cell does not change it."""
        counts = Counter((cell.kind, cell.stage) for row in self.work for cell in row)
        return max(statistics.multimode(counts.values()), default=0)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of work there are: `("F",)` in an evaluation, `("F", "B")`, or `("F", "B", "W")`."""
        found = {cell.kind for row in self.work for cell in row}
        return tuple(kind for kind in KINDS if kind in found)


def needs(cell: Cell, stages: int) -> list[Cell]:
    """The cells that `cell` waits for: F(s-1) before F(s), F(s) and B(s+1) before B(s), B(s) before W(s)."""
    kind, stage, microbatch = cell
    if kind == "F":
        return [Cell("F", stage - 1, microbatch)] if stage else []
    if kind == "W":
        return [Cell("B", stage, microbatch)]
    later = [Cell("B", stage + 1, microbatch)] if stage + 1 < stages else []
    return [Cell("F", stage, microbatch), *later]


def position(device: int, index: int, cell: Any) -> str:
    """Where a cell stands, counted as people do: "device 2, 5th cell, B of microbatch 3 at stage 2"."""
    number = index + 1
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"device {device}, {number}{ending} cell, {cell}"


def wrong_cells(order: Order) -> list[Problem]:
    """What is wrong with an order: cells that cannot be, are there twice or missing, or wait for each other."""
    devices = range(order.devices)
    wrong = [
        Problem(FIELD, f"stage {stage} on device {device!r}", "there is no such device.", f"0 to {order.devices - 1}")
        for stage, device in enumerate(order.place)
        if not _whole(device) or device not in devices
    ]
    return wrong or _no_cells(order) or _of_cells(order) or _missing(order) or _stuck(order)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _no_cells(order: Order) -> list[Problem]:
    """What is no cell at all, in an order of a user's own."""
    legal = f"Cell(kind, stage, microbatch), of a kind {', '.join(KINDS)} and two whole numbers"
    wrong = [
        Problem(FIELD, position(device, index, cell), "is no cell.", legal)
        for device, row in enumerate(order.work)
        for index, cell in enumerate(row)
        if not (isinstance(cell, Cell) and cell.kind in KINDS and _whole(cell.stage) and _whole(cell.microbatch))
    ]
    if not wrong and "F" not in order.kinds:
        wrong = [Problem(FIELD, "order", "has no forward cell.", "an F for every stage and microbatch")]
    return wrong[:SHOWN]


def _of_cells(order: Order) -> list[Problem]:
    """Cells that cannot be where they are."""
    microbatches, seen, wrong = order.microbatches, {}, []
    counts = Counter(cell.kind for row in order.work for cell in row)
    for device, row in enumerate(order.work):
        for index, cell in enumerate(row):
            where = position(device, index, cell)
            found = _rule(order, device, cell, microbatches) or _stray(cell.kind, counts)
            if not found and cell in seen:
                found = f"stands twice: {seen[cell]} already.", "each cell once"
            seen.setdefault(cell, where)
            if found:
                wrong.append(Problem(FIELD, where, *found))
    return wrong[:SHOWN]


def _rule(order: Order, device: int, cell: Cell, microbatches: int) -> tuple[str, str] | None:
    """The rule that a cell breaks by itself, and what is legal."""
    if not 0 <= cell.stage < order.stages or order.place[cell.stage] != device:
        own = [f"stage {stage}" for stage, place in enumerate(order.place) if place == device]
        return "that stage does not lie on this device.", ", ".join(own) or "no cell: the device has no stage"
    if not 0 <= cell.microbatch < microbatches:
        return f"most stages have {microbatches} microbatches, so there is no such one.", f"0 to {microbatches - 1}"
    return None


def _stray(kind: str, counts: Counter) -> tuple[str, str] | None:
    """What is wrong with a kind of work that only a few cells have."""
    if 2 * counts[kind] >= counts["F"]:
        return None
    rule = f"there are {counts[kind]} cells of kind {kind}, but {counts['F']} of kind F."
    return rule, f"a {kind} for every F, or none"


def _missing(order: Order) -> list[Problem]:
    """Cells that are not there, of every kind that is, and what those need."""
    there = {cell for row in order.work for cell in row}
    last = max(map(KINDS.index, order.kinds))
    return [
        Problem(FIELD, f"device {order.place[cell.stage]}, {cell}", "is missing.", "each cell once")
        for cell in _all(order.stages, order.microbatches, KINDS[: last + 1])
        if cell not in there
    ][:SHOWN]


def _all(stages: int, microbatches: int, kinds: tuple[str, ...]) -> Iterator[Cell]:
    for kind in kinds:
        for stage in range(stages):
            yield from (Cell(kind, stage, microbatch) for microbatch in range(microbatches))


def _stuck(order: Order) -> list[Problem]:
    """Cells that wait for each other in a circle, if there are any."""
    index = {cell: number for row in order.work for number, cell in enumerate(row)}
    at, done, before = [0] * order.devices, set(), -1
    while before < len(done):
        before = len(done)
        for device, row in enumerate(order.work):
            while at[device] < len(row) and done.issuperset(needs(row[at[device]], order.stages)):
                done.add(row[at[device]])
                at[device] += 1
    held = [device for device, row in enumerate(order.work) if at[device] < len(row)]
    if not held:
        return []
    device, trail = held[0], {}
    while device not in trail:
        cell = order.work[device][at[device]]
        awaited = next(need for need in needs(cell, order.stages) if need not in done)
        trail[device] = cell, awaited
        device = order.place[awaited.stage]
    circle = [*trail.items()][[*trail].index(device) :]
    steps = []
    for device, (cell, awaited) in circle:
        other = order.place[awaited.stage]
        later = f"comes later on {'the same device' if other == device else f'device {other}'}"
        there = position(other, index[awaited], awaited)
        steps.append((position(device, at[device], cell), f"waits for {awaited}, which {later} ({there})"))
    rule = "; ".join([steps[0][1], *(f"there {where} {waits}" for where, waits in steps[1:])])
    legal = "F(s-1) before F(s), F(s) and B(s+1) before B(s), B(s) before W(s)"
    return [Problem(FIELD, steps[0][0], f"{rule}: nothing can go on.", legal)]
