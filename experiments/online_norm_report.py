"""Table and pictures of `experiments/online_norm.py`, which runs this and says more."""

from pathlib import Path

from jaxpar.report.columns import aligned
from jaxpar.report.pictures import COLORS

PUBLISHED = {  # test accuracy and least test loss, medians over runs, of 250 epochs at a batch of 128
    "cifar10": {
        "online": (92.3, 0.26),
        "batch": (92.2, 0.26),
        "group": (90.3, 0.32),
        "instance": (90.4, 0.31),
        "layer": (87.4, 0.39),
    },
    "cifar100": {
        "online": (68.6, 1.12),
        "batch": (68.6, 1.14),
        "group": (63.3, 1.35),
        "instance": (63.1, 1.32),
        "layer": (59.2, 1.47),
    },
}


def line(row: dict) -> str:
    """A run in words."""
    return (
        f"{row['norm']}, batch {row['batch']}: {row['accuracy']:.1%} of the test images right, {row['loss']:.3f} nats, "
        f"after {row['epochs']:.2f} epochs in {row['seconds'] / 60:.1f} min"
    )


def table(rows: list[dict], data: str) -> str:
    """One line for each run, with what was published."""
    head = ["norm", "batch", "steps", "epochs", "of 250", "images/s", "right", "published", "nats", "published"]
    lines = []
    for row in rows:
        accuracy, loss = PUBLISHED[data].get(row["norm"], (None, None)) if row["batch"] == 128 else (None, None)
        lines.append(
            [row["norm"], str(row["batch"]), f"{row['steps']:,}", f"{row['epochs']:.2f}", f"{row['share']:.2%}"]
        )
        lines[-1] += [
            f"{row['images_per_second']:,.0f}",
            f"{row['accuracy']:.2%}",
            f"{accuracy} %" if accuracy else "-",
        ]
        lines[-1] += [f"{row['loss']:.3f}", f"{loss:.2f}" if loss else "-"]
    return aligned(head, lines, head[1:])


def told(rows: list[dict], options) -> str:
    """What the table does not say."""
    lossy = " JPEG, so a little worse than what was published." if "encoded" in rows[0]["source"] else ""
    lines = [f"{rows[0]['source']}.{lossy}", "right: of the 10,000 test images, after the last step; one seed."]
    if options.full:
        lines[-1] = "right and nats: the best of all looks at the test images, as published; one seed."
    else:
        part = max(row["share"] for row in rows)
        lines.append(
            f"A budget of {options.budget:g} minutes was at most {part:.2%} of the published 250 epochs, by another "
            "schedule: the rate rises for a twentieth of the steps, then falls to 0. --full is the whole."
        )
    return "\n".join(lines)


def picture(path: Path, rows: list[dict], data: str) -> Path:
    """Test accuracy against epochs, and at the end for each batch and beside what was published."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5), dpi=110, layout="constrained")
    curves, batches, beside = figure.subplots(1, 3)
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    sizes = sorted({row["batch"] for row in rows}, reverse=True)
    styles = dict(zip(sizes, ["-", "--", ":", "-.", *["-"] * len(sizes)], strict=False))
    for row in rows:
        epochs, shares = [0, *(one[0] for one in row["curve"])], [0, *(100 * one[2] for one in row["curve"])]
        label = f"{row['norm']}, {row['batch']}: {row['accuracy']:.1%}"
        look = {"color": COLORS[norms.index(row["norm"]) % len(COLORS)], "ls": styles[row["batch"]]}
        curves.plot(epochs, shares, marker="o", ms=3, lw=1.5, label=label, **look)
    curves.set(xlabel="epochs", ylabel="% of test images right", ylim=(0, 100), xlim=(0, None))
    curves.set_title(f"{data}: ResNet-20; in the legend: norm, batch, at the end", loc="left", fontsize=10)
    curves.legend(frameon=False, fontsize=8)
    for norm in norms:
        points = sorted((row["batch"], 100 * row["accuracy"]) for row in rows if row["norm"] == norm)
        batches.plot(*zip(*points, strict=True), marker="o", color=COLORS[norms.index(norm) % len(COLORS)], label=norm)
    batches.set_xscale("log", base=2)
    batches.set_xticks(sizes, list(map(str, sizes)))
    batches.set(xlabel="batch, each with the same time", ylabel="% right at the end", ylim=(0, 100))
    batches.set_title("rate and momentum rescaled for each image", loc="left", fontsize=10)
    batches.legend(frameon=False, fontsize=8)
    _beside(beside, [row for row in rows if row["batch"] == sizes[0]], data)
    for axes in (curves, batches, beside):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def _beside(axes, rows: list[dict], data: str) -> None:
    """Bars of what was published and what was found here."""
    for place, row in enumerate(rows):
        published = PUBLISHED[data].get(row["norm"], (0, 0))[0]
        for number, (value, name) in enumerate(((published, "published, 250 epochs"), (100 * row["accuracy"], "here"))):
            at = place + 0.4 * number - 0.2
            axes.bar(at, value, width=0.38, color=COLORS[1 - number], label=None if place else name)
            axes.annotate(f"{value:.1f}" if value else "-", (at, value), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(rows)), [row["norm"] for row in rows], fontsize=8)
    axes.set(ylabel="% of test images right", ylim=(0, 100))
    axes.set_title(f"batch {rows[0]['batch']}: {rows[0]['epochs']:.1f} epochs or so", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
