"""Pictures of runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

TRAINING, HELD_OUT, MUTED = "#8fb8de", "#0b5394", "#9a6700"
NEAR = {"textcoords": "offset points"}


def losses_picture(
    path: Path,
    training: Sequence[float],
    held_out: Sequence[tuple[int, float]],
    levels: Mapping[str, float],
    title: str,
) -> Path:
    """Write the training and held-out loss against the step, with horizontal `levels` to compare with, as PNG.

    Args:
        path: file to write.
        training: loss of each step, in nats.
        held_out: (step, nats) pairs.
        levels: baselines by name, in nats.
        title: one line.
    """
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(training) + 1), training, color=TRAINING, linewidth=1, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=HELD_OUT, marker="o", markersize=4, label="held out")
        step, last = held_out[-1]
        axes.annotate(f"{last:.3f}", (step, last), xytext=(-4, -14), ha="right", color=HELD_OUT, **NEAR)
    for name, level in levels.items():
        axes.axhline(level, color=MUTED, linestyle="--", linewidth=1)
        axes.annotate(f"{name} {level:.3f}", (len(training), level), xytext=(0, 4), ha="right", color=MUTED, **NEAR)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title, xlim=(0, len(training) * 1.01))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path)
    return path
