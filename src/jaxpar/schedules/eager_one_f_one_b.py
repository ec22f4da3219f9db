"""1F1B that runs twice as far ahead: more memory, but no time lost where all devices work in step."""

from jaxpar.core.cells import Order
from jaxpar.core.weave import one_chunk, one_stage_each


def eager_one_f_one_b(stages: int, microbatches: int, chunks: int = 1) -> Order:
    """Device d runs 2(p-1-d) microbatches ahead, so that a message has a whole forward and backward to travel.

    With p stages, m microbatches: span (m+p-1)(F + B), in lock-step as well; bubble (p-1)/(m+p-1); min(m, 2(p-1-d)+1)
    inputs held on device d.

    Args:
        stages: devices on the pipeline axis.
        microbatches: parts of a batch.
        chunks: stages per device; 1.

    Raises:
        Refused: for other chunks.

    Source: Zhuang et al. 2022, arXiv:2211.05322 (eager-1F1B).
    """
    one_chunk(chunks, "eager_one_f_one_b")
    return one_stage_each(stages, microbatches, [2 * (stages - 1 - device) for device in range(stages)])
