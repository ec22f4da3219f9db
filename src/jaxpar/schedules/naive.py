"""One microbatch at a time: all devices but one stand idle, the staircase that every lecture draws."""

from jaxpar.core.cells import Cell, Order
from jaxpar.core.weave import loop, one_chunk


def naive(stages: int, microbatches: int, chunks: int = 1) -> Order:
    """Forward through all stages and back again before the next microbatch starts.

    With p stages, m microbatches: span m p (F + B), bubble (p-1)/p, 1 input held per device.

    Args:
        stages: devices on the pipeline axis.
        microbatches: parts of a batch.
        chunks: stages per device; 1.

    Raises:
        Refused: for other chunks.
    """
    one_chunk(chunks, "naive")
    turns = [(kind, number) for number in range(microbatches) for kind in "FB"]
    work = tuple(tuple(Cell(kind, stage, number) for kind, number in turns) for stage in range(stages))
    return Order(loop(stages), work)
