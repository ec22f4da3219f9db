"""A second opinion on a timetable: play it with names for arrays, and see that each cell finds what it needs."""

from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from jaxpar.core.cells import FIELD, KINDS, Cell
from jaxpar.core.refuse import Problem
from jaxpar.core.timetable import Slots, Timetable


class _Read(NamedTuple):
    """A value that a cell takes from a pool."""

    pool: str
    key: tuple[int, int]


def verify(table: Timetable) -> list[Problem]:
    """What is wrong with a finished timetable; nothing of the compiler is used.

    Every cell must be there once and in the order of its device; every value that it reads must lie in the slot that
    the table names, written by the cell that makes it and by no other since; what is sent must go over a channel.

    Returns:
        One problem for each wrong cell, slot or channel; none for a good table.
    """
    wrong = [*_cells(table), *_sizes(table)]
    return wrong or [*_played(table)]


def _problem(table: Timetable, cell: Cell, rule: str) -> Problem:
    device = table.order.place[cell.stage] if 0 <= cell.stage < table.stages else "?"
    return Problem(FIELD, f"tick {table.at.get(cell)}, device {device}, {cell}", rule)


def _cells(table: Timetable) -> Iterator[Problem]:
    """Cells that are missing, too many, or not where the order has them."""
    kinds, place = table.kinds, table.order.place
    wanted = {Cell(*parts) for parts in product(kinds, range(table.stages), range(table.microbatches))}
    for cell in wanted ^ set(table.at):
        yield _problem(table, cell, "has no tick." if cell in wanted else "should not be there.")
    for device, row in enumerate(table.order.work):
        if Counter(row) != Counter(cell for cell in wanted if place[cell.stage] == device):
            yield Problem(FIELD, f"device {device}", "does not have every cell of its stages once.")
        times = [(table.at.get(cell, -1), KINDS.index(cell.kind)) for cell in row]
        for cell, before, now in zip(row[1:], times, times[1:], strict=False):
            if now <= before:
                yield _problem(table, cell, "comes no later than the cell before it.")
    if kinds != KINDS[: len(kinds)] or table.ticks != 1 + max(table.at.values(), default=-1):
        yield Problem(FIELD, f"{table.ticks} ticks of {kinds}", "is not what the cells say.")


def _sizes(table: Timetable) -> Iterator[Problem]:
    """Slots that are not in the pool, or of values that there are not."""
    stages, microbatches, kinds = table.stages, table.microbatches, len(table.kinds)
    held = {  # the stages that use each pool
        "activations": range(1, stages),
        "cotangents": range(stages - 1 if kinds > 1 else 0),
        "kept": range(stages if kinds > 1 else 0),
        "between": range(stages if kinds > 2 else 0),
    }
    for name, using in held.items():
        pool: Slots = getattr(table, name)
        for key in {*pool.of} ^ set(product(using, range(microbatches))):
            yield Problem(FIELD, f"{name}, (stage, microbatch) {key}", "has a slot and no use, or a use and no slot.")
        for key, slot in pool.of.items():
            if not 0 <= slot < pool.count:
                yield Problem(FIELD, f"{name}, (stage, microbatch) {key}", f"slot {slot} of {pool.count}.")


def _played(table: Timetable) -> Iterator[Problem]:
    """Every tick in turn; what a slot holds is named (stage, microbatch)."""
    pools = {(name, device): {} for name in Timetable._fields[3:7] for device in range(table.devices)}
    ticks: list[list[Cell]] = [[] for _ in range(table.ticks)]
    for cell in sorted(table.at, key=lambda cell: KINDS.index(cell.kind)):
        ticks[table.at[cell]].append(cell)
    used = set()
    for cells in ticks:
        arriving = []
        for cell in cells:
            device = table.order.place[cell.stage]
            for name, key in _reads(table, cell):
                if pools[name, device].get(getattr(table, name).of[key]) != key:
                    yield _problem(table, cell, f"finds something else in its slot of {name}.")
            kept = {"F": "kept", "B": "between"}.get(cell.kind)
            key = cell.stage, cell.microbatch
            if kept and key in getattr(table, kept).of:
                pools[kept, device][getattr(table, kept).of[key]] = key
            other = cell.stage + {"F": 1, "B": -1, "W": table.stages}[cell.kind]
            if 0 <= other < table.stages:
                arriving.append((cell, (other, cell.microbatch)))
        for cell, key in arriving:
            name, there = ("activations" if cell.kind == "F" else "cotangents"), table.order.place[key[0]]
            channel = cell.kind, (there - table.order.place[cell.stage]) % table.devices
            used.add(channel)
            if channel not in table.channels:
                yield _problem(table, cell, f"sends over {channel}, which is no channel.")
            pools[name, there][getattr(table, name).of[key]] = key
    for channel in {*table.channels} - used:
        yield Problem(FIELD, f"channel {channel}", "is not used.")


def _reads(table: Timetable, cell: Cell) -> Iterator[_Read]:
    """What a cell takes from the pools: the stage's input always, for B and W what came back and what was kept."""
    kind, *key = cell
    key = tuple(key)
    if cell.stage:
        yield _Read("activations", key)
    if kind != "F":
        yield _Read("kept", key)
        if cell.stage + 1 < table.stages:
            yield _Read("cotangents", key)
    if kind == "W":
        yield _Read("between", key)
