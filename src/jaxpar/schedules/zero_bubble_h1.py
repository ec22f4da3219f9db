"""ZB-H1: 1F1B with the gradients of the weights put off to where a device would be idle; a third of its bubble."""

from jaxpar.core.cells import Order
from jaxpar.core.weave import one_chunk, one_stage_each, split


def zero_bubble_h1(stages: int, microbatches: int, chunks: int = 1) -> Order:
    """Forward and backward cells in the order of 1F1B; on device d, up to d gradients of weights wait.

    With p stages, m >= p microbatches and F = B = W = 1: span 3m + p-1, bubble (p-1)/(3m+p-1), p inputs held on every
    device. For other times the bubble is (p-1)(F + B - W) long.

    Args:
        stages: devices on the pipeline axis.
        microbatches: parts of a batch.
        chunks: stages per device; 1.

    Raises:
        Refused: for other chunks.

    Source: Qi et al. 2023, arXiv:2401.10241, sections 2.1 and 2.3.
    """
    one_chunk(chunks, "zero_bubble_h1")
    order = one_stage_each(stages, microbatches, [stages - 1 - device for device in range(stages)])
    return split(order, range(stages))
