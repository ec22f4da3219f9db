"""How long an order takes, how much of it devices stand idle, what lives meanwhile, and what they send."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxpar.core.cells import Cell, Order, needs


class Times(NamedTuple):
    """How long the work of one microbatch takes a whole device, in any one unit; each of its V stages takes 1/V of it.

    Attributes:
        forward: F.
        backward: the gradient of the inputs.
        weight: the gradient of the weights. Where an order has no W, B does both and takes `backward + weight`.
        latency: from the end of a cell until another device has what it made.
    """

    forward: float = 1.0
    backward: float = 1.0
    weight: float = 1.0
    latency: float = 0.0


class Makespan(NamedTuple):
    """What an order comes to.

    Attributes:
        span: from the first start to the last end, where a device starts a cell as soon as it can.
        bubble: share of `devices * span` in which devices are idle: 1 - busy / span, 0 to 1. Papers often say
            idle / busy instead, which is bubble / (1 - bubble).
        gap: the longest that any device is idle between its own first and last cell: the bubble that is left if devices
            need not wait for each other between two steps (Qi et al. 2023).
        lockstep_span: the same where every tick of a timetable lasts as long as its busiest device, and `latency` more.
        lockstep_bubble: idle share of it.
        peak: the most inputs of stages that a device holds at once, from the start of F to the end of W (else B).
        sends: messages that a device sends to others.
    """

    span: float
    bubble: float
    gap: float
    lockstep_span: float
    lockstep_bubble: float
    peak: tuple[int, ...]
    sends: tuple[int, ...]

    @property
    def messages(self) -> int:
        """Messages between devices, all together."""
        return sum(self.sends)


def makespan(order: Order, at: Mapping[Cell, int], times: Times) -> Makespan:
    """The figures of an order that `timetable` took, and of its ticks.

    Args:
        order: such as `table.order`.
        at: tick of each cell: `table.at`.
        times: of one microbatch.
    """
    began, ended = spans(order, times)
    lasting = durations(order, times)
    span, locked = max(ended.values()), lockstep(order, at, times)
    busy = [sum(lasting[cell.kind, cell.stage] for cell in row) for row in order.work]
    gaps = [ended[row[-1]] - began[row[0]] - work for row, work in zip(order.work, busy, strict=True) if row]
    mean = sum(busy) / order.devices
    peak = tuple(max(count for _, count in curve) for curve in live(order, began, ended))
    return Makespan(span, _idle(mean, span), max(gaps), locked, _idle(mean, locked), peak, sends(order))


def _idle(busy: float, span: float) -> float:
    return 1 - busy / span if span else 0.0


def durations(order: Order, times: Times) -> dict[tuple[str, int], float]:
    """How long a (kind, stage) takes: the time of its device over the stages that this holds."""
    both = times.backward + (0 if "W" in order.kinds else times.weight)
    whole = {"F": times.forward, "B": both, "W": times.weight}
    return {
        (kind, stage): whole[kind] / order.place.count(device)
        for kind in order.kinds
        for stage, device in enumerate(order.place)
    }


def spans(order: Order, times: Times) -> tuple[dict[Cell, float], dict[Cell, float]]:
    """When each cell starts and ends if devices start as soon as they can: the order, and what comes from others."""
    lasting, began, ended = durations(order, times), {}, {}
    following, free = [0] * order.devices, [0.0] * order.devices
    left = sum(map(len, order.work))
    while len(ended) < left:
        before = len(ended)
        for device, row in enumerate(order.work):
            for cell in row[following[device] :]:
                wanted = needs(cell, order.stages)
                if any(need not in ended for need in wanted):
                    break
                arrivals = [ended[need] + times.latency * (order.place[need.stage] != device) for need in wanted]
                began[cell] = max([free[device], *arrivals])
                ended[cell] = free[device] = began[cell] + lasting[cell.kind, cell.stage]
                following[device] += 1
        if len(ended) == before:
            raise ValueError("cells wait for each other: only an order that `timetable` takes can be timed.")
    return began, ended


def lockstep(order: Order, at: Mapping[Cell, int], times: Times) -> float:
    """Time of all ticks where each lasts as long as its busiest device, and `latency` more."""
    lasting, work = durations(order, times), defaultdict(float)
    for device, row in enumerate(order.work):
        for cell in row:
            work[at[cell], device] += lasting[cell.kind, cell.stage]
    longest = defaultdict(float)
    for (tick, _), busy in work.items():
        longest[tick] = max(longest[tick], busy)
    return sum(longest.values()) + times.latency * (max(at.values()) + 1)


def live(
    order: Order, began: Mapping[Cell, float], ended: Mapping[Cell, float], stages: Iterable[int] | None = None
) -> list[list[tuple[float, int]]]:
    """For each device, (time, count) wherever the number of inputs of stages that it holds changes.

    An input is held from the start of its F to the end of its last cell: W if there is one, else B, else F.

    Args:
        order: what is done.
        began: when each cell starts, from `spans`; or the tick it is in.
        ended: when each ends; or the tick after it.
        stages: those that count; all of them if None.
    """
    last, counted = order.kinds[-1], set(range(order.stages) if stages is None else stages)
    curves = []
    for row in order.work:
        changes = defaultdict(int)
        changes[0.0] += 0
        for cell in row:
            if cell.stage in counted:
                changes[began[cell]] += cell.kind == "F"
                changes[ended[cell]] -= cell.kind == last
        count, curve = 0, []
        for time in sorted(changes):
            count += changes[time]
            if changes[time] or not curve:
                curve.append((time, count))
        curves.append(curve)
    return curves


def sends(order: Order) -> tuple[int, ...]:
    """Messages that each device sends to others: outputs of F to the next stage, of B to the one before."""
    counts = [0] * order.devices
    for device, row in enumerate(order.work):
        for kind, stage, _ in row:
            other = stage + {"F": 1, "B": -1, "W": 0}[kind]
            counts[device] += 0 <= other < order.stages and order.place[other] != device
    return tuple(counts)
