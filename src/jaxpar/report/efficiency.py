"""Statistical and hardware efficiency of recorded runs: how many steps to a loss, and how long each takes.

A larger batch or staler gradients may take fewer seconds per example and more examples to the same loss; only the
product says which run is there first.

Source: Zhang and Re 2014, DimmWitted, arXiv:1403.7550, section 1, for the two efficiencies and their product.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from jaxpar.report.columns import aligned
from jaxpar.report.pictures import COLORS

HEAD = ("run", "steps to it", "ms per step", "seconds to it", "slower than the first there")


MEAN = 10  # training losses of so many steps are taken together


class Reached(NamedTuple):
    """A run against a loss.

    Attributes:
        steps: until the loss was reached; None if it never was.
        step_seconds: the median time of a step.
    """

    steps: int | None
    step_seconds: float

    @property
    def seconds(self) -> float | None:
        """Steps times time per step; compiling and reading data come on top."""
        return None if self.steps is None else self.steps * self.step_seconds


def reached(losses: Sequence[tuple[int, float]], step_seconds: Sequence[float], level: float) -> Reached:
    """When a run reached a loss, the mean over `MEAN` steps, and how fast it went.

    Args:
        losses: (step, nats) of training, in order of steps.
        step_seconds: of its steps.
        level: nats.
    """
    steps = None
    for end in range(min(MEAN, len(losses)), len(losses) + 1) if losses else ():
        if statistics.fmean(loss for _, loss in losses[max(0, end - MEAN) : end]) <= level:
            steps = losses[end - 1][0]
            break
    return Reached(steps, statistics.median(step_seconds))


def text(found: Mapping[str, Reached]) -> str:
    """A row per run, by the time that it took; those that never got there last."""
    best = min((one.seconds for one in found.values() if one.seconds), default=None)
    rows = []
    for name, one in sorted(found.items(), key=lambda pair: (pair[1].seconds is None, pair[1].seconds or 0)):
        there = ("never", "", "") if one.seconds is None else (one.steps, one.seconds, one.seconds / best)
        steps, seconds, slower = (word if isinstance(word, str) else f"{word:,.5g}" for word in there)
        rows.append((name, steps, f"{one.step_seconds * 1e3:.2f}", seconds, slower and f"{slower} x"))
    return aligned(HEAD, rows, HEAD[1:])


def picture(path: Path, found: Mapping[str, Reached], level: float) -> Path:
    """Time per step against steps, with lines of equal time to the loss, as PNG; without runs that never got there.

    Raises:
        ValueError: if none did.
    """
    there = {name: one for name, one in found.items() if one.seconds}
    if not there:
        raise ValueError(f"no run reached a loss of {level}")
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    steps, times = [one.steps for one in there.values()], [1e3 * one.step_seconds for one in there.values()]
    x = np.geomspace(min(steps) / 2, max(steps) * 2, 100)
    for seconds in sorted({one.seconds for one in there.values()}):
        axes.plot(x, 1e3 * seconds / x, color="#bdbdbd", lw=0.8, zorder=0)
        axes.annotate(f"{seconds:.3g} s", (x[-1], 1e3 * seconds / x[-1]), fontsize=7, color="#616161")
    for number, (name, one) in enumerate(there.items()):
        axes.plot(one.steps, 1e3 * one.step_seconds, "o", color=COLORS[number % len(COLORS)], label=name)
    axes.set(xscale="log", yscale="log", xlabel=f"steps to a loss of {level:g} nats", ylabel="ms per step")
    axes.set(ylim=(min(times) / 2, max(times) * 2))
    axes.set_title("grey: equal time to that loss", loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
    return path
