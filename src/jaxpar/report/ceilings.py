"""What bounds a step on a chip: arithmetic, its memory, or what it sends; three ceilings, and a plan below them.

Source: Williams, Waterman and Patterson 2009, Roofline, CACM 52(4); the third ceiling is the same for links.
"""

from typing import Any, NamedTuple

from jaxpar.core import products
from jaxpar.report.compiled import rates_of
from jaxpar.report.topology import Topology
from jaxpar.report.traced import shares_of
from jaxpar.step.parts import Parts

STATE_PASSES = 2  # parameters and optimizer state are read and written once each by an update


class Roof(NamedTuple):
    """A plan on devices of one kind; each figure is of one device and one step, predicted, nothing overlapped.

    Attributes:
        plan: its text.
        topology: the devices.
        flops: executed.
        traffic: bytes through the device's memory: each product's operands and result once, gradients, and the state.
        sent: bytes to other devices.
        peak: flops per second, dense bfloat16.
        memory_rate: bytes per second from memory.
        link_rate: bytes per second to other devices, the mean over what is sent; None if nothing is.
        arithmetic, memory, communication: seconds that each would take alone.
    """

    plan: str
    topology: str
    flops: float
    traffic: float
    sent: float
    peak: float
    memory_rate: float
    link_rate: float | None
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
            sent, seconds = sent + size, seconds + size / rates.link(label, kind)
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
        arithmetic=executed / peak,
        memory=traffic / memory_rate,
        communication=seconds,
    )


def as_json(found: Roof) -> dict[str, Any]:
    """All fields, `bound` and `seconds`."""
    return found._asdict() | {"bound": found.bound, "seconds": found.seconds}


def text(found: Roof) -> str:
    """One paragraph."""
    parts = ", ".join(f"{name} {getattr(found, name):.3g} s" for name in ("arithmetic", "memory", "communication"))
    ratios = f"{found.flops / found.traffic:,.0f} flops per byte of memory"
    ratios += f", {found.flops / found.sent:,.0f} per byte sent" if found.sent else ""
    reached = f"at most {found.arithmetic / found.seconds:.0%} of peak ({ratios})"
    return f"ceilings on {found.topology}: {parts}; bound by {found.bound}: {reached}"
