"""What bounds a step on a chip: arithmetic, its memory, or what it sends; three ceilings, and a plan below them.

Source: Williams, Waterman and Patterson 2009, Roofline, CACM 52(4); the third ceiling is the same for links.
"""

import math
from typing import Any, NamedTuple

from jaxpar.core import products
from jaxpar.plan.mesh import across_slices
from jaxpar.report.compiled import rates_of
from jaxpar.report.topology import Topology
from jaxpar.report.traced import shares_of
from jaxpar.step.parts import Parts

STATE_PASSES = 2  # parameters and optimizer state are read and written once each by an update


class Roof(NamedTuple):
    """A plan on devices of one kind; each figure is of one device and one step, predicted.

    Attributes:
        plan: its text.
        topology: the devices.
        flops: executed.
        traffic: bytes through the device's memory: each product's operands and result once, gradients, and the state.
        sent: bytes to other devices.
        peak: flops per second, dense bfloat16.
        memory_rate: bytes per second from memory.
        link_rate: bytes per second to other devices, the mean over what is sent; None if nothing is.
        idle: share of the time for which a device of the pipeline has nothing to do, by the clock.
        arithmetic, memory, communication: seconds that each would take alone, the first two stretched by `idle`.
    """

    plan: str
    topology: str
    flops: float
    traffic: float
    sent: float
    peak: float
    memory_rate: float
    link_rate: float | None
    idle: float
    arithmetic: float
    memory: float
    communication: float

    @property
    def bound(self) -> str:
        """Which of the three takes longest."""
        return max(("arithmetic", "memory", "communication"), key=lambda name: getattr(self, name))

    @property
    def seconds(self) -> float:
        """No step is faster: the longest of the three, if the other two go on meanwhile."""
        return getattr(self, self.bound)


def roof(found: dict[str, Any], parts: Parts, where: Topology, trace) -> Roof:
    """The three ceilings of a plan.

    Args:
        found: its `forecast`.
        parts: of the run.
        where: the devices.
        trace: `traced(parts)`.
    """
    axes, chip, held = found["mesh"], where.chip, found["memory"]["predicted"]
    rates = rates_of(axes, where)
    worked = max(products.traffic(trace, one) for one in shares_of(parts))
    traffic = worked + STATE_PASSES * (held["parameters"] + held["optimizer"]) + held["gradients"]
    sent, seconds = 0.0, 0.0
    for label, kinds in found["comm"]["predicted"].items():
        for kind, size in kinds.items():
            far = size * _far(label.split("+"), axes, where)
            sent += size
            seconds += (size - far) / rates.link(label, kind) + (far / chip.network if far else 0.0)
    peak, executed = chip.flops["bf16"] / chip.cores, found["flops"]["executed"]
    memory_rate = chip.memory_rate / chip.cores
    return Roof(
        plan=found["plan"],
        topology=where.word,
        flops=executed,
        traffic=traffic,
        sent=sent,
        peak=peak,
        memory_rate=memory_rate,
        link_rate=sent / seconds if seconds else None,
        idle=found["bubble"],
        arithmetic=executed / peak / (1 - found["bubble"]),
        memory=traffic / memory_rate / (1 - found["bubble"]),
        communication=seconds,
    )


def _far(label: list[str], axes: dict[str, int], where: Topology) -> float:
    """The share of a collective's bytes that goes between slices of TPUs: sums within slices first, then across.

    Of n devices in o slices, (o-1)/(n-1) of what a ring of n would send.
    """
    across = across_slices(axes, where.slices) if where.platform == "tpu" and where.slices > 1 else None
    return (where.slices - 1) / (math.prod(axes[axis] for axis in label) - 1) if across in label else 0.0


def as_json(found: Roof) -> dict[str, Any]:
    """All fields, `bound` and `seconds`."""
    return found._asdict() | {"bound": found.bound, "seconds": found.seconds}


def text(found: Roof) -> str:
    """One paragraph."""
    parts = ", ".join(f"{name} {getattr(found, name):.3g} s" for name in ("arithmetic", "memory", "communication"))
    ratios = f"{found.flops / found.traffic:,.0f} flops per byte of memory"
    ratios += f", {found.flops / found.sent:,.0f} per byte sent" if found.sent else ""
    share = found.flops / found.peak / found.seconds
    reached = f"at most {share:.0%} of the dense bfloat16 peak ({ratios})"
    return f"ceilings on {found.topology}: {parts}; bound by {found.bound}: {reached}"
