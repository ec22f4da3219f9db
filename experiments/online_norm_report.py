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
    """Test accuracy against epochs, for each batch (of one batch alone: the loss), and beside what was published."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 5.5), dpi=110, layout="constrained")
    panels = figure.subplots(1, 3)
    sizes = sorted({row["batch"] for row in rows}, reverse=True)
    _curves(panels[0], rows, lambda one: 100 * one[2], 100 / (100 if data == "cifar100" else 10))
    top = 100 + 5 * -(-len(rows) // len(sizes))  # room for the legend, a column for each batch
    panels[0].set(ylabel="% of test images right", ylim=(0, top), yticks=range(0, 101, 20))
    panels[0].set_title(f"{data}, ResNet-20; right at the end in the legend", loc="left", fontsize=10)
    panels[0].legend(frameon=False, fontsize=8, loc="upper right", ncols=len(sizes))
    if len(sizes) > 1:
        _batches(panels[1], rows, sizes)
    else:
        _curves(panels[1], rows, lambda one: one[1])
        panels[1].set(ylabel="test loss, nats")
        panels[1].set_title("loss on test images", loc="left", fontsize=10)
    _beside(panels[2], [row for row in rows if row["batch"] == sizes[0]], data)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def _color(row: dict, rows: list[dict]) -> str:
    norms = list(dict.fromkeys(one["norm"] for one in rows))
    return COLORS[norms.index(row["norm"]) % len(COLORS)]


def _curves(axes, rows: list[dict], value, first: float | None = None) -> None:
    """`value` of each look, against epochs; `first` before there was any."""
    sizes = sorted({row["batch"] for row in rows}, reverse=True)
    for row in rows:
        points = [(one[0], value(one)) for one in row["curve"]]
        points = [(0.0, first), *points] if first else points
        style = ["-", "--", ":", "-."][sizes.index(row["batch"]) % 4]
        label = f"{row['norm']}, {row['batch']}: {row['accuracy']:.1%}"
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1.5, ls=style, color=_color(row, rows), label=label)
    axes.set(xlabel="epochs", xlim=(0, None))


def _batches(axes, rows: list[dict], sizes: list[int]) -> None:
    """Accuracy against the batch, a line for each norm."""
    for norm in dict.fromkeys(row["norm"] for row in rows):
        own = sorted((row for row in rows if row["norm"] == norm), key=lambda row: row["batch"])
        points = [(row["batch"], 100 * row["accuracy"]) for row in own]
        axes.plot(*zip(*points, strict=True), marker="o", color=_color(own[0], rows), label=norm)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.set(xlabel="images in a batch", ylabel="% of test images right at the end", ylim=(0, 100))
    axes.set_title("each with as much time; rate and momentum rescaled", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _beside(axes, rows: list[dict], data: str) -> None:
    """Bars of what was published and what was found here."""
    for place, row in enumerate(rows):
        published = PUBLISHED[data].get(row["norm"], (0, 0))[0]
        bars = (published, "0.8", "published, 250 epochs"), (100 * row["accuracy"], COLORS[0], "here")
        for number, (value, color, name) in enumerate(bars):
            at = place + 0.4 * number - 0.2
            axes.bar(at, value, width=0.38, color=color, label=None if place else name)
            axes.annotate(f"{value:.1f}" if value else "-", (at, value), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(rows)), [row["norm"] for row in rows], fontsize=8)
    axes.set(ylabel="% of test images right", ylim=(0, 115), yticks=range(0, 101, 20))
    epochs = " to ".join(dict.fromkeys(f"{end(row['epochs'] for row in rows):.2g}" for end in (min, max)))
    axes.set_title(f"batch {rows[0]['batch']}, {epochs} epochs", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
