"""What several schedules have in common: where stages lie, and how forward and backward work alternate."""

from collections.abc import Iterable, Sequence

from jaxpar.core.cells import Cell, Order
from jaxpar.core.refuse import Problem, Refused


def loop(devices: int, chunks: int = 1) -> tuple[int, ...]:
    """Device of each stage if stages go round: 0, 1, 2, 0, 1, 2."""
    return tuple(stage % devices for stage in range(devices * chunks))


def vee(devices: int) -> tuple[int, ...]:
    """Device of each stage if they go up and come back, so that one device has the first and the last: 0, 1, 1, 0."""
    return (*range(devices), *reversed(range(devices)))


def one_chunk(chunks: int, name: str) -> None:
    """Refuse more than one stage per device.

    Raises:
        Refused: naming plan.chunks.
    """
    if chunks != 1:
        raise Refused([Problem("plan.chunks", chunks, f"{name} gives each device one stage.", "1; or interleaved")])


def alternate(forwards: Sequence[Cell], backwards: Sequence[Cell], ahead: int) -> list[Cell]:
    """`ahead` forward cells, then one forward and one backward in turn, then the backward cells that are left."""
    ahead = min(ahead, len(forwards))
    pairs = zip(forwards[ahead:], backwards, strict=False)
    return [*forwards[:ahead], *(cell for pair in pairs for cell in pair), *backwards[len(forwards) - ahead :]]


def one_stage_each(devices: int, microbatches: int, ahead: Sequence[int]) -> Order:
    """The order in which device d, which has stage d alone, is `ahead[d]` forward cells ahead of its backward ones."""
    work = []
    for stage in range(devices):
        forwards, backwards = ([Cell(kind, stage, number) for number in range(microbatches)] for kind in "FB")
        work.append(tuple(alternate(forwards, backwards, ahead[stage])))
    return Order(loop(devices), tuple(work))


def split(order: Order, waiting: Sequence[int]) -> Order:
    """Gradients of weights as cells of their own, done late: `waiting[d]` wait on device d before the first is done."""
    return order._replace(work=tuple(tuple(_split(row, most)) for row, most in zip(order.work, waiting, strict=True)))


def _split(row: Iterable[Cell], most: int):
    waiting = []
    for cell in row:
        yield cell
        if cell.kind == "B":
            waiting.append(cell._replace(kind="W"))
        if len(waiting) > most:
            yield waiting.pop(0)
    yield from waiting
