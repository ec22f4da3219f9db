"""GPipe: all microbatches forward, then all backward; simple, and memory grows with their number."""

from jaxpar.core.cells import Order
from jaxpar.core.weave import one_chunk, one_stage_each


def gpipe(stages: int, microbatches: int, chunks: int = 1) -> Order:
    """Every forward cell before the first backward one.

    With p stages, m microbatches: span (m+p-1)(F + B), bubble (p-1)/(m+p-1), m inputs held per device.

    Args:
        stages: devices on the pipeline axis.
        microbatches: parts of a batch.
        chunks: stages per device; 1.

    Raises:
        Refused: for other chunks.

    Source: Huang et al. 2019, arXiv:1811.06965, section 2.3.
    """
    one_chunk(chunks, "gpipe")
    return one_stage_each(stages, microbatches, [microbatches] * stages)
