"""The picture of three ceilings, and plans below them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jaxpar.report.ceilings import Roof
from jaxpar.report.pictures import COLORS


def picture(path: Path, roofs: Sequence[Roof] | Mapping[str, Roof], title: str = "") -> Path:
    """Flops per second against flops per byte, of memory on the left and sent on the right, as PNG.

    The slope is the bytes per second of memory or links, the flat line the arithmetic; a point is a plan at the speed
    that its slowest ceiling leaves, so one that lies below the line of its panel is bound by another ceiling.
    """
    named = roofs if isinstance(roofs, Mapping) else {one.plan: one for one in roofs}
    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, below, rate, label in (
        (left, "traffic", "memory_rate", "flops per byte of memory"),
        (right, "sent", "link_rate", "flops per byte sent"),
    ):
        shown = {name: one for name, one in named.items() if getattr(one, below)}
        ratios = [one.flops / getattr(one, below) for one in shown.values()]
        ridges = [one.peak / getattr(one, rate) for one in shown.values()]
        if not ratios:
            axes.text(0.5, 0.5, "nothing is sent", transform=axes.transAxes, ha="center")
            continue
        x = np.geomspace(min(*ratios, *ridges) / 4, max(*ratios, *ridges) * 4, 100)
        for slope in dict.fromkeys(getattr(one, rate) for one in shown.values()):
            peak = next(one.peak for one in shown.values() if getattr(one, rate) == slope)
            axes.plot(x, np.minimum(slope * x, peak) / 1e12, color="#616161", lw=1)
        for number, (name, one) in enumerate(named.items()):
            if name in shown:
                ratio = one.flops / getattr(one, below)
                color = COLORS[number % len(COLORS)]
                axes.plot(ratio, one.flops / one.seconds / 1e12, "o", color=color, label=f"{name} ({one.bound})")
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("1e12 flops per second of a device")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8, title="plan (bound by)")
    figure.suptitle(title or f"{next(iter(named.values())).topology}, predicted", fontsize=10, x=0.01, ha="left")
    figure.savefig(path)
    return path
