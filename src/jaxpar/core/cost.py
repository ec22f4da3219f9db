"""What something costs on one device."""

from typing import NamedTuple


class Cost(NamedTuple):
    """A bill for one device and one step.

    Attributes:
        sent: bytes sent, by (mesh axes joined by "+", kind of collective), with ring algorithms (`wire_bytes`).
        flops: floating-point operations.
        held: bytes held in memory.
        idle: share of the time in which the device waits for others, 0 to 1.
    """

    sent: dict[tuple[str, str], float] = {}  # noqa: RUF012 (never written to)
    flops: float = 0.0
    held: float = 0.0
    idle: float = 0.0

    @property
    def total_sent(self) -> float:
        """Bytes sent over all axes."""
        return sum(self.sent.values())


def wire_bytes(kind: str, operand: float, group: int) -> float:
    """Bytes that a device sends in one collective over `group` devices, with ring algorithms.

    Args:
        kind: `all_gather`, `reduce_scatter`, `all_reduce`, `all_to_all` or `permute`.
        operand: bytes of what this device puts in: the shard of an all-gather, the whole of a reduce-scatter.
        group: number of devices that take part.
    """
    share = {
        "all_gather": group - 1,
        "reduce_scatter": (group - 1) / group,
        "all_reduce": 2 * (group - 1) / group,
        "all_to_all": (group - 1) / group,
        "permute": 1,
    }
    return operand * share[kind]
