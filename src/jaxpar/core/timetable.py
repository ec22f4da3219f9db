"""A timetable: a pipeline's order compiled to ticks, to places in memory, and to channels between devices.

One program plays every timetable: in a tick each device does what its row says, and at its end values travel.
"""

import heapq
from collections import defaultdict
from typing import NamedTuple

from jaxpar.core.cells import KINDS, Cell, Order, needs, wrong_cells
from jaxpar.core.makespan import Times, lockstep
from jaxpar.core.refuse import refuse


class Slots(NamedTuple):
    """Places in a pool that each device has.

    Attributes:
        of: the slot of a (stage, microbatch), on the device of that stage.
        count: slots of the pool: the most that any device needs.
    """

    of: dict[tuple[int, int], int]
    count: int


class Timetable(NamedTuple):
    """When everything happens and where it lies.

    In a tick a device does at most one F, one B and one W, in that order. What comes from another stage, even one on
    the same device, can be read from the next tick on; what F keeps, B of the same tick may read, and W what B keeps.

    Attributes:
        order: what was compiled.
        ticks: number of ticks.
        at: tick of each cell.
        activations: the input of a stage that came from the one before: written at the end of that one's tick, read
            until its last cell (W if there is one, else B, else F).
        cotangents: the gradient of a stage's output that came from the one after: written at the end of that one's
            tick, read until its last cell (W, else B).
        kept: what F keeps for B and W: written during the tick, after F and before B; read until W, else B.
        between: what B keeps for W: written during the tick, after B and before W; read until W.
        channels: (kind, shift) that are used: the output of an F or a B goes from device d to (d + shift) modulo the
            devices; 0 stays where it is.
    """

    order: Order
    ticks: int
    at: dict[Cell, int]
    activations: Slots
    cotangents: Slots
    kept: Slots
    between: Slots
    channels: tuple[tuple[str, int], ...]

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.order.devices

    @property
    def stages(self) -> int:
        """Number of stages, over all devices."""
        return self.order.stages

    @property
    def microbatches(self) -> int:
        """Number of microbatches."""
        return self.order.microbatches

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of work there are."""
        return self.order.kinds

    @property
    def in_order(self) -> bool:
        """Whether every stage does its Fs, and its Bs, in rising order of microbatches."""
        last = {}
        for row in self.order.work:
            for kind, stage, microbatch in row:
                if kind != "W" and last.get((kind, stage), -1) > microbatch:
                    return False
                last[kind, stage] = microbatch
        return True

    def chunk_of(self, stage: int) -> int:
        """How many earlier stages lie on the device of `stage`."""
        place = self.order.place
        return place[:stage].count(place[stage])


def timetable(order: Order) -> Timetable:
    """Compile an order: ticks, slots and channels.

    Ticks are packed twice, with one cell each and with up to an F, a B and a W. Kept is what takes less time where
    every tick lasts as long as its busiest device (F, B and W one unit each; a B that is also W two); then what needs
    fewer slots; then fewer ticks.

    Raises:
        Refused: for an order that cannot be played; the message names the cell.
    """
    refuse(wrong_cells(order))
    return min((_compiled(order, most) for most in (1, len(KINDS))), key=_rank)


def _rank(table: Timetable) -> tuple:
    slots = (table.activations, table.cotangents, table.kept, table.between)
    return lockstep(table.order, table.at, Times()), sum(pool.count for pool in slots), table.ticks


def _compiled(order: Order, most: int) -> Timetable:
    """The timetable with at most so many cells in a tick of a device."""
    at = _pack(order, most)
    return Timetable(order, max(at.values()) + 1, at, *_slots(order, at), _channels(order))


def _pack(order: Order, most: int) -> dict[Cell, int]:
    """Tick of each cell: as soon as what it needs is there."""
    at, following, tick = {}, [0] * order.devices, 0
    left = sum(map(len, order.work))
    while len(at) < left:
        for device, row in enumerate(order.work):
            last = -1
            for cell in row[following[device] : following[device] + most]:
                rank = KINDS.index(cell.kind)
                ready = all(
                    need in at and at[need] + (need.stage != cell.stage) <= tick for need in needs(cell, order.stages)
                )
                if rank <= last or not ready:
                    break
                at[cell], last = tick, rank
                following[device] += 1
        tick += 1
    return at


def _slots(order: Order, at: dict[Cell, int]) -> tuple[Slots, Slots, Slots, Slots]:
    """The four pools: in which ticks each value is held, both ends counted, and its slot."""
    last, pools = order.kinds[-1], ({}, {}, {}, {})
    activations, cotangents, kept, between = pools
    for cell, tick in at.items():
        kind, stage, microbatch = cell
        key = stage, microbatch
        end = at[Cell(last, stage, microbatch)]
        if kind == "F" and stage:
            activations[key] = at[Cell("F", stage - 1, microbatch)] + 1, end
        if kind == "F" and last != "F":
            kept[key] = tick, end
        if kind == "B" and stage + 1 < order.stages:
            cotangents[key] = at[Cell("B", stage + 1, microbatch)] + 1, end
        if kind == "B" and last == "W":
            between[key] = tick, end
    return tuple(_coloured(order, pool) for pool in pools)


def _coloured(order: Order, held: dict[tuple[int, int], tuple[int, int]]) -> Slots:
    """The fewest slots in which no two values of a device lie at the same time (greedy colouring of intervals)."""
    of, free, used, counts = {}, defaultdict(list), defaultdict(list), defaultdict(int)
    for key, (start, end) in sorted(held.items(), key=lambda item: (item[1], item[0])):
        device = order.place[key[0]]
        while used[device] and used[device][0][0] < start:
            heapq.heappush(free[device], heapq.heappop(used[device])[1])
        if not free[device]:
            heapq.heappush(free[device], counts[device])
            counts[device] += 1
        of[key] = heapq.heappop(free[device])
        heapq.heappush(used[device], (end, of[key]))
    return Slots(of, max(counts.values(), default=0))


def _channels(order: Order) -> tuple[tuple[str, int], ...]:
    steps = [("F", here, there) for here, there in zip(order.place, order.place[1:], strict=False)]
    steps += [("B", there, here) for _, here, there in steps]
    return tuple(sorted({(kind, (there - here) % order.devices) for kind, here, there in steps if kind in order.kinds}))
