"""What a step sends between a device and its host where a plan offloads, and how long that takes at stated rates."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpar.core.walk import Shares, visits
from jaxpar.report.traced import shares_of
from jaxpar.step.parts import Parts
from jaxpar.step.program import traced

NVME = 1.6e9  # bytes per second that each GPU of a DGX-2 reads from its disks while all 16 do: ZeRO-Infinity, figure 2b


class Moved(NamedTuple):
    """Bytes of one device and step.

    Attributes:
        to_device, to_host: all that is sent.
        state: of each, what the update of parameters and optimizer reads from the host and writes back.
    """

    to_device: int
    to_host: int
    state: int


def moved(parts: Parts, resting: int, trace=None) -> Moved:
    """What a step sends over the link to the host; of a pipeline the device that sends most.

    Args:
        parts: of the run.
        resting: bytes of the state that rest on the host, `memory.held(parts)["host"]`: the update takes all of it
            to the device and back.
        trace: `traced(parts)`, if it is at hand.
    """
    if not parts.offload:
        return Moved(0, 0, 0)
    if parts.offload == {"optimizer"}:  # the only part of which the first half of a step knows nothing
        return Moved(resting, resting, resting)
    each = [_sent(trace or traced(parts), one) for one in shares_of(parts)]
    down, up = max(each, key=sum)
    return Moved(round(down) + resting, round(up) + resting, resting)


def lent(parts: Parts, trace=None) -> int:
    """Bytes of activations that are on the host at most: those of one microbatch, which come back before the next."""
    if "activations" not in parts.offload:
        return 0
    each = [_sent(trace or traced(parts), one)[1] for one in shares_of(parts)]
    return round(max(each)) // parts.microbatches


def stated(stats) -> int:
    """Bytes that a compiled step has on the host, of XLA's `memory_analysis`."""
    own = stats.host_argument_size_in_bytes + stats.host_output_size_in_bytes - stats.host_alias_size_in_bytes
    return own + stats.host_temp_size_in_bytes


def seconds(found: Moved, rate: float) -> float:
    """How long the link is busy, if it carries `rate` bytes per second each way, both ways at once."""
    return max(found.to_device, found.to_host) / rate


def nvme_seconds(found: Moved, rate: float = NVME) -> float:
    """How long it would take to read the state from disks and write it back: arithmetic, since nothing here uses disks.

    Source: Rajbhandari et al. 2021 (ZeRO-Infinity), arXiv:2104.07857, figure 2b and section 4.
    """
    return 2 * found.state / rate


def _sent(jaxpr, shares: Shares) -> np.ndarray:
    """Bytes to the device and to the host in a traced program."""
    total = np.zeros(2)
    for equation, times in visits(jaxpr, lambda one: sum(size for _, size in _moves(one)), shares):
        for up, size in _moves(equation):
            total[int(up)] += times * size
    return total


def _moves(equation) -> Iterator[tuple[bool, int]]:
    """(whether to the host, bytes) of each array that an operation moves."""
    if equation.primitive.name != "device_put":
        return
    for read, written in zip(equation.invars, equation.outvars, strict=True):
        there = [getattr(var.aval, "memory_space", None) == jax.memory.Space.Host for var in (read, written)]
        if there[0] != there[1]:
            yield there[1], written.aval.size * written.aval.dtype.itemsize


def as_json(found: Moved, rate: float | None) -> dict[str, Any]:
    """Bytes of a device and step, seconds at `rate` (None if nobody states it), and those that disks would take."""
    return {
        "to_device": found.to_device,
        "to_host": found.to_host,
        "rate": rate,
        "seconds": seconds(found, rate) if rate else None,
        "nvme_rate": NVME,
        "nvme_seconds": nvme_seconds(found),
    }


def text(found: dict[str, Any]) -> list[tuple[str, str]]:
    """`as_json` as rows that people read."""
    busy = "nobody states how fast its link to the host is"
    if found["rate"]:
        busy = f"{found['seconds']:.3g} s at {found['rate'] / 1e9:,.0f} GB/s each way, both at once"
    sent = f"{found['to_device']:,} bytes to the device, {found['to_host']:,} back in a step: {busy}"
    disks = f"{found['nvme_seconds']:.3g} s a step to read and write the state, at {found['nvme_rate'] / 1e9:,.1f} GB/s"
    return [("link to the host", sent), ("if it were disks", f"{disks}: arithmetic alone, no plan uses disks")]
