"""ZB-V: stages go up the devices and come back; gradients of weights fill the gaps, in the memory of 1F1B."""

from collections import Counter

from jaxpar.core.cells import Cell, Order, needs
from jaxpar.core.refuse import Problem, Refused
from jaxpar.core.weave import vee


def zero_bubble_v(stages: int, microbatches: int, chunks: int = 2) -> Order:
    """Device d has stages d and 2p-1-d, so the first has the loss too; each holds at most 2p inputs, of half a stage.

    With p devices, m >= p microbatches and F = B = W = 1: span 3m + (p-1)/2. No device is idle between its first and
    last cell if m >= 2p-1; what is left of the bubble is that devices start one after the other.

    Args:
        stages: devices on the pipeline axis.
        microbatches: parts of a batch.
        chunks: stages per device; 2.

    Raises:
        Refused: for other chunks.

    Source: Qi et al. 2023, arXiv:2401.10241, section 6. Forward and backward cells are in their order; gradients of
    weights are put wherever a device would otherwise wait, or run out of room.
    """
    if chunks != 2:
        raise Refused([Problem("plan.chunks", chunks, "zero_bubble_v gives each device two stages.", "2")])
    planned = [_planned(device, stages, microbatches) for device in range(stages)]
    return Order(vee(stages), tuple(map(tuple, _filled(planned, room=2 * stages))))


def _planned(device: int, devices: int, microbatches: int) -> list[Cell]:
    """The forward and backward cells of a device, in order."""
    up, down = device, 2 * devices - 1 - device
    kinds = [("F", up)] * (2 * (devices - device) - 1)
    kinds += [("F", down), ("F", up)] * device
    kinds += [("F", down), ("B", down)] * (devices - device)
    kinds += [("F", up), ("B", up), ("F", down), ("B", down)] * (microbatches - devices)
    kinds += [("B", up), ("B", down)] * microbatches
    cells, counts = [], Counter()
    for kind, stage in kinds:
        if counts[kind, stage] < microbatches:
            cells.append(Cell(kind, stage, counts[kind, stage]))
            counts[kind, stage] += 1
    return cells


def _filled(planned: list[list[Cell]], room: int) -> list[list[Cell]]:
    """What devices do if F, B and W take one unit each: what is planned once it can be done, else a W that waits."""
    following, held = [0] * len(planned), [0] * len(planned)
    work, waiting, done, began = [[] for _ in planned], [[] for _ in planned], set(), [None]
    while began:
        began = []
        for device, cells in enumerate(planned):
            cell = cells[following[device]] if following[device] < len(cells) else None
            if cell and done.issuperset(needs(cell, room)) and not (cell.kind == "F" and held[device] == room):
                following[device] += 1
            elif waiting[device]:
                cell = waiting[device].pop(0)
            else:
                continue
            held[device] += {"F": 1, "B": 0, "W": -1}[cell.kind]
            waiting[device] += [cell._replace(kind="W")] * (cell.kind == "B")
            work[device].append(cell)
            began.append(cell)
        done.update(began)
    return work
