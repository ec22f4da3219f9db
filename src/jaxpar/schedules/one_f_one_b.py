"""1F1B (PipeDream-flush): one forward, one backward; the bubble of GPipe, but memory flat in microbatches."""

from jaxpar.core.cells import Order
from jaxpar.core.weave import one_chunk, one_stage_each


def one_f_one_b(stages: int, microbatches: int, chunks: int = 1) -> Order:
    """Device d runs p-1-d microbatches ahead, then takes one forward and one backward in turn.

    With p stages, m microbatches: span (m+p-1)(F + B), bubble (p-1)/(m+p-1), min(m, p-d) inputs held on device d.

    Args:
        stages: devices on the pipeline axis.
        microbatches: parts of a batch.
        chunks: stages per device; 1.

    Raises:
        Refused: for other chunks.

    Source: Narayanan et al. 2021, arXiv:2006.09503 (PipeDream-flush); arXiv:2104.04473, section 2.2.1.
    """
    one_chunk(chunks, "one_f_one_b")
    return one_stage_each(stages, microbatches, [stages - 1 - device for device in range(stages)])
