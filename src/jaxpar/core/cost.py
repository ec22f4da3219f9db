"""What something costs on one device."""

from typing import NamedTuple

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "permute", "all_to_all")


class Cost(NamedTuple):
    """A bill for one device and one step; bills add up with `plus`.

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


def plus(first: Cost, second: Cost) -> Cost:
    """The bill for doing one after the other; `idle` is the larger of the two, which is exact when either is 0."""
    keys = {**first.sent, **second.sent}
    sent = {key: first.sent.get(key, 0.0) + second.sent.get(key, 0.0) for key in keys}
    return Cost(sent, first.flops + second.flops, first.held + second.held, max(first.idle, second.idle))


def wire_bytes(kind: str, operand: float, group: int) -> float:
    """Bytes that a device sends in one collective over `group` devices, with ring algorithms.

    Args:
        kind: one of `KINDS`.
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
