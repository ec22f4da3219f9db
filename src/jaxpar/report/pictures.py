"""Pictures of runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TRAINING, HELD_OUT, MUTED = "#8fb8de", "#0b5394", "#9a6700"
NEAR = {"textcoords": "offset points"}
COLORS = ("#0b5394", "#c0392b", "#2e7d32", "#8e44ad", "#d35400", "#00838f", "#5d4037", "#616161")  # of runs


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
        axes.annotate(f"{last:.3f}", (step, last), xytext=(0, 6), ha="right", color=HELD_OUT, **NEAR)
    for name, level in levels.items():
        axes.axhline(level, color=MUTED, linestyle="--", linewidth=1)
        axes.annotate(f"{name} {level:.3f}", (len(training), level), xytext=(0, 4), ha="right", color=MUTED, **NEAR)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title, xlim=(0, len(training) * 1.01))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path)
    return path


def runs_picture(
    path: Path, runs: Mapping[str, tuple[Sequence[tuple[int, float]], Sequence[tuple[int, float]]]]
) -> Path:
    """Write the losses of several runs against the step, in one picture, as PNG.

    Training losses are drawn pale, each as the mean of about a hundredth of the run, and held-out ones strong.

    Args:
        path: file to write.
        runs: (step, nats) of each training loss, and of each held-out loss, by the name of the run.
    """
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, (training, held_out)) in enumerate(runs.items()):
        color, thick = COLORS[number % len(COLORS)], 4 - 2.5 * (number + 1) / len(runs)  # equal curves both show
        last = (held_out or training)[-1:]
        label = f"{name}  {last[0][1]:.4f}" if last else f"{name}  no steps yet"
        axes.plot(*_smoothed(training), color=color, alpha=0.35, linewidth=1, label=None if held_out else label)
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True), color=color, marker="o", markersize=2 * thick, lw=thick, label=label
            )
        elif not training:
            axes.plot([], [], color=color, label=label)
    axes.set(xlabel="step", ylabel="loss, nats per label", title="held out (dots) and training (pale)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best", fontsize=8, title="last loss")
    figure.savefig(path)
    return path


def _smoothed(pairs: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and losses, each the mean over a stretch of neighbours."""
    width = max(1, len(pairs) // 100)
    stretches = [pairs[start : start + width] for start in range(0, len(pairs), width)]
    return tuple([sum(pair[which] for pair in stretch) / len(stretch) for stretch in stretches] for which in (0, 1))
