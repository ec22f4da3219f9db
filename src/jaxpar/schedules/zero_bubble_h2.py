"""ZB-H2: twice the memory of 1F1B, and no device is idle between its own first and last cell."""

from jaxpar.core.cells import Order
from jaxpar.core.weave import one_chunk, one_stage_each, split


def zero_bubble_h2(stages: int, microbatches: int, chunks: int = 1) -> Order:
    """Forward and backward cells in the order of eager 1F1B; on device d, up to 2d gradients of weights wait.

    With p stages, m >= 2p-1 microbatches and F = B = W = 1: no gap on any device, 2p-1 inputs held on every one. The
    span is 3m + p-1, since devices start one after the other: what is left of the bubble is gone only if a device may
    begin its next step before others have ended this one.

    Args:
        stages: devices on the pipeline axis.
        microbatches: parts of a batch.
        chunks: stages per device; 1.

    Raises:
        Refused: for other chunks.

    Source: Qi et al. 2023, arXiv:2401.10241, sections 2.2 and 2.3.
    """
    one_chunk(chunks, "zero_bubble_h2")
    order = one_stage_each(stages, microbatches, [2 * (stages - 1 - device) for device in range(stages)])
    return split(order, [2 * device for device in range(stages)])
