"""Table and picture of `experiments.batch_norm_faults`."""

import math
import statistics
from pathlib import Path

from jaxpar.report.columns import aligned
from jaxpar.report.pictures import COLORS, NEAR

HIGHEST = 4.0  # nats in the picture


def of_runs(row: dict, mode: str, what: str) -> list[float]:
    """One number of each run of a row, `mode` being `training` or `evaluation`."""
    return [run[mode][what] for run in row["runs"]]


def middle(values: list[float]) -> float:
    """Their median, of which a run that went wrong is only one; NaN if any is none."""
    return math.nan if any(math.isnan(value) for value in values) else statistics.median(values)


def table(found: dict) -> str:
    """Distances of gradients by norm and batch, then one line for each run that learned."""
    sizes = list(dict.fromkeys(row["batch"] for row in found["bias"]))
    by = {(row["norm"], row["batch"]): row for row in found["bias"]}
    norms = dict.fromkeys(row["norm"] for row in found["bias"])
    lines = [[norm, *(f"{by[norm, size]['distance']:.2g}" for size in sizes)] for norm in norms]
    first = "distance of the mean gradient of batches to that of the whole set, over its length\n"
    first += aligned(["norm", *map(str, sizes)], lines, map(str, sizes))
    head = ["batches", "of", "norm", "accuracy", "loss in training", "in evaluation", "accuracy of each seed"]
    lines = []
    for row in found["learned"]:
        losses = [f"{middle(of_runs(row, mode, 'loss')):.3f}" for mode in ("training", "evaluation")]
        accuracies = of_runs(row, "evaluation", "accuracy")
        each = " ".join(f"{100 * one:.1f}" for one in accuracies)
        kind = "one class" if row["skewed"] else "all classes"
        lines.append([kind, str(row["batch"]), row["norm"], f"{middle(accuracies):.1%}", *losses, each])
    second = "held-out digits: by what evaluation does, and with batches as in training; medians over seeds\n"
    return first + "\n\n" + second + aligned(head, lines, head[3:6])


def picture(path: Path, found: dict) -> Path:
    """Distances of gradients against the batch; losses in training and evaluation, of mixed and of skewed batches."""
    from matplotlib.figure import Figure

    norms = list(dict.fromkeys(row["norm"] for row in found["learned"]))
    known = dict.fromkeys([*norms, *(row["norm"] for row in found["bias"])])
    color = dict(zip(known, COLORS, strict=False))
    figure = Figure(figsize=(13, 4.4), dpi=150, layout="constrained")
    bias, mixed, skewed = figure.subplots(1, 3)
    for norm in dict.fromkeys(row["norm"] for row in found["bias"]):
        pairs = [(row["batch"], max(row["distance"], 1e-7)) for row in found["bias"] if row["norm"] == norm]
        bias.plot(*zip(*pairs, strict=True), color=color[norm], marker="o", ms=4, label=norm)
    bias.set(xscale="log", yscale="log", xlabel="examples in a batch", ylabel="distance over length")
    bias.set_xticks(sizes := sorted({row["batch"] for row in found["bias"]}), list(map(str, sizes)))
    bias.xaxis.minorticks_off()
    bias.set_title("mean gradient of batches: distance to that of all", loc="left", fontsize=10)
    for norm in norms:
        if norm not in {row["norm"] for row in found["bias"]}:
            bias.plot([], [], color=color[norm], marker="o", ms=4, label=f"{norm} (to the right)")
    bias.legend(frameon=False, fontsize=8, loc="center right")
    for axes, which in ((mixed, False), (skewed, True)):
        _losses(axes, [row for row in found["learned"] if row["skewed"] == which], norms, color)
    mixed.set_title("trained (hollow) and evaluated; x: none are numbers", loc="left", fontsize=10)
    skewed.set_title("the same, each batch of one class", loc="left", fontsize=10)
    for axes in (bias, mixed, skewed):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def _losses(axes, rows: list[dict], norms: list[str], color: dict[str, str]) -> None:
    """Held-out losses of each norm, beside each other for each size of batches."""
    sizes = list(dict.fromkeys(row["batch"] for row in rows))
    for row in rows:
        place = sizes.index(row["batch"]) + (norms.index(row["norm"]) - (len(norms) - 1) / 2) / (len(norms) + 2)
        look = {"color": color[row["norm"]], "ms": 6, "ls": ""}
        ends = [middle(of_runs(row, mode, "loss")) for mode in ("training", "evaluation")]
        if math.isnan(sum(ends)):
            axes.plot(place, HIGHEST, marker="x", **look)
            continue
        axes.plot([place] * 2, ends, color=color[row["norm"]], lw=1.5, alpha=0.5)
        axes.plot(place, ends[0], marker="o", mfc="white", **look)
        axes.plot(place, ends[1], marker="o", **look)
    axes.axhline(math.log(10), color="gray", lw=1, ls=":", zorder=0)
    axes.annotate(
        "guessing", (len(sizes) - 0.5, math.log(10)), xytext=(0, 3), color="gray", ha="right", fontsize=8, **NEAR
    )
    axes.set(yscale="log", xlabel="examples in a batch", ylabel="held-out loss, nats", ylim=(0.07, 1.2 * HIGHEST))
    axes.set_xticks(range(len(sizes)), list(map(str, sizes)))
    axes.set_yticks(ticks := [0.1, 0.2, 0.5, 1, 2], list(map(str, ticks)))
    axes.yaxis.minorticks_off()
