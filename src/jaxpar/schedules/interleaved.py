"""Interleaved 1F1B: each device has several smaller stages, so that the pipeline fills faster; more messages."""

import itertools

from jaxpar.core.cells import Cell, Order
from jaxpar.core.weave import alternate, loop


def interleaved(stages: int, microbatches: int, chunks: int = 1) -> Order:
    """Groups of p microbatches go through all stages of a device in turn; a few more each if m is no multiple of p.

    With p devices, V chunks and m >= p microbatches: span (m + (p-1)/V)(F + B), bubble (p-1)/(mV+p-1), and at most
    2(p-1-d) + (V-1)g + 1 inputs of V-th parts held on device d, for groups of at most g. One chunk is eager 1F1B.

    Args:
        stages: devices on the pipeline axis.
        microbatches: parts of a batch.
        chunks: stages per device.

    Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.2, where m is a multiple of p. A last group of fewer
    than p, with which one might end otherwise, leaves devices idle and may even wait for ever.
    """
    groups, work = _groups(stages, microbatches), []
    for device in range(stages):
        own = [chunk * stages + device for chunk in range(chunks)]
        forwards, backwards = (
            [Cell(kind, stage, number) for group in groups for stage in mine for number in group]
            for kind, mine in (("F", own), ("B", own[::-1]))
        )
        ahead = 2 * (stages - 1 - device) + (chunks - 1) * len(groups[0])
        work.append(tuple(alternate(forwards, backwards, ahead)))
    return Order(loop(stages, chunks), tuple(work))


def _groups(size: int, microbatches: int) -> list[range]:
    """Microbatches in groups of `size` or more, as even as can be, the larger ones first; of fewer only if all are."""
    count = max(1, microbatches // size)
    ends = [-(-microbatches * number // count) for number in range(count + 1)]
    return [range(start, end) for start, end in itertools.pairwise(ends)]
