"""What does training take in memory with online norm at batch 1, and with batch norm at the batches that it needs?

The cases of table 1 of the Online Normalization paper: ResNet-50 on images of 224 x 224, U-Nets on volumes of 150^3 and
250^3 voxels and on images of 1024^2 and 2048^2 pixels; online norm takes one example at a time, batch norm 32 or 128.
Bytes of one device, all found from abstract shapes: the trace of a step is laid out as XLA for CPUs would
(`report/memory.py`), nothing of this size is compiled or run. float32, SGD with momentum, everything kept for the way
back. Parameters, their gradients and their momentum are the same for both norms; activations grow with the batch.
Expect nearly 32 and 128 times the activations: large volumes fit an accelerator at batch 1, or none at all.

The U-Nets are those of `models/unet.py`: four levels, 64 channels at the first, two classes for each pixel of three
channels or voxel of one. The paper does not say all of that, and its figures are not repeated here, since they could
not be read where this was written: what to compare is the ratios.

Small networks of the same kinds are compiled as well, and predicted next to that.

Four minutes of one core.

    python -m experiments.norm_memory
    python -m experiments.norm_memory --batches 8,32 --name other

Source: Chiley et al. 2019, arXiv:1905.05894, table 1.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from jaxpar import Model, Recipe
from jaxpar.cli import exit_codes, flags
from jaxpar.core.refuse import Problem, refuse
from jaxpar.report.columns import aligned
from jaxpar.report.pictures import COLORS
from jaxpar.train.folder import of_study

RESNET, UNET = Model("resnet", layers=50), Model("unet")
NETWORKS = {  # model, one example, classes
    "ResNet-50, 224 x 224": (RESNET, (224, 224, 3), 1000),
    "U-Net, 150^3 voxels": (UNET, (150, 150, 150, 1), 2),
    "U-Net, 250^3 voxels": (UNET, (250, 250, 250, 1), 2),
    "U-Net, 1024^2 pixels": (UNET, (1024, 1024, 3), 2),
    "U-Net, 2048^2 pixels": (UNET, (2048, 2048, 3), 2),
}
TINY = replace(UNET, layers=2, width=8)
SMALL = {
    "small ResNet-50, 64 x 64": (replace(RESNET, width=8), (64, 64, 3), 10),
    "small U-Net, 14^3 voxels": (TINY, (14, 14, 14, 1), 2),
    "small U-Net, 64^2 pixels": (TINY, (64, 64, 3), 2),
}
SMALL_CASES = (("online", 1), ("online:control=clamp", 1), ("batch", 1), ("batch", 4))  # norm, batch
KINDS = ("parameters", "gradients", "optimizer", "activations")
DEVICE = 80e9  # bytes of an accelerator, such as those in report/chips.py, to compare with


@dataclass(frozen=True)
class Options:
    """What is reckoned.

    Attributes:
        name: the folder in --runs-dir.
        runs_dir: where folders of runs lie.
        overwrite: write over the table that is there.
        batches: examples per step under batch norm, with commas between them.
    """

    name: str = "norm_memory"
    runs_dir: str = "runs"
    overwrite: bool = False
    batches: str = "32,128"


def parts_of(network: tuple, norm: str, batch: int):
    """The parts of a run on one device, for examples with one label, or one for each pixel."""
    import jax

    from jaxpar.step.parts import assemble

    model, example, classes = network
    each = example[:-1] if model.name == "unet" else ()
    inputs = jax.ShapeDtypeStruct((batch, *example), "float32")
    labels = jax.ShapeDtypeStruct((batch, *each), "int32")
    recipe = Recipe(model=replace(model, norm=norm), batch=batch, optimizer="sgd")
    return assemble(recipe, inputs, labels, classes)


def row(name: str, norm: str, batch: int) -> dict:
    """Predicted bytes by category; of a small network also those of the compiled step."""
    from jaxpar.report import memory
    from jaxpar.step.program import program

    parts = parts_of((NETWORKS | SMALL)[name], norm, batch)
    found = {"network": name, "norm": norm, "examples": batch} | memory.predicted(parts)
    if name in SMALL:
        made = program(parts)
        said = made.step.lower(made.shapes, made.batch).compile().memory_analysis()
        fresh = said.output_size_in_bytes - said.alias_size_in_bytes
        found["compiled"] = said.argument_size_in_bytes + said.temp_size_in_bytes + fresh
    return found


def reckoned(batches: list[int]) -> list[dict]:
    """All rows; the time that is left goes to stderr."""
    work = [(name, "online", 1) for name in NETWORKS] + [(name, "batch", n) for name in NETWORKS for n in batches]
    work += [(name, norm, n) for name in SMALL for norm, n in SMALL_CASES]
    found, began = [], time.perf_counter()
    for done, one in enumerate(work, 1):
        found.append(row(*one))
        left = (time.perf_counter() - began) / done * (len(work) - done)
        print(f"  {done} of {len(work)}, about {left:.0f} s left", file=sys.stderr, flush=True)
    return found


def table(rows: list[dict], batches: list[int]) -> str:
    """GB of a step, and how many times that of online norm."""
    of = {(one["network"], one["norm"], one["examples"]): one for one in rows}
    head, lines = ["network", "weights", "online, 1"], []
    head += [words for n in batches for words in (f"batch, {n}", "times")]
    for name in NETWORKS:
        one = of[name, "online", 1]
        line = [name, _gb(sum(one[kind] for kind in KINDS[:3])), _gb(one["total"])]
        for n in batches:
            total = of[name, "batch", n]["total"]
            line += [_gb(total), f"{total / one['total']:.1f}"]
        lines.append(line)
    return "GB of a training step; weights: with gradients and momentum\n" + aligned(head, lines, head[1:])


def small_table(rows: list[dict]) -> str:
    """The small networks: what is predicted, and what is compiled."""
    head = ["network", "norm", "batch", "MB predicted", "compiled", "ratio"]
    lines = [
        [
            one["network"],
            one["norm"],
            str(one["examples"]),
            f"{one['total'] / 1e6:.2f}",
            f"{one['compiled'] / 1e6:.2f}",
            f"{one['total'] / one['compiled']:.3f}",
        ]
        for one in rows
        if "compiled" in one
    ]
    return "Small ones, compiled for CPUs as well\n" + aligned(head, lines, head[2:])


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 1e11 else f"{size / 1e9:,.0f}"


def picture(path: Path, rows: list[dict], batches: list[int]) -> Path:
    """A bar for each network and batch, on a logarithmic scale, with what one accelerator has."""
    figure = Figure(figsize=(9, 5), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    cases, large = [("online", 1), *(("batch", n) for n in batches)], [one for one in rows if "compiled" not in one]
    thick = 0.8 / len(cases)
    for number, (norm, batch) in enumerate(cases):
        chosen = [one for one in large if (one["norm"], one["examples"]) == (norm, batch)]
        places = [place + (number - (len(cases) - 1) / 2) * thick for place in range(len(chosen))]
        sizes = [one["total"] / 1e9 for one in chosen]
        label = f"{norm} norm, batch {batch}"
        axes.barh(places, sizes, height=thick * 0.92, color=COLORS[number], label=label)
        for place, one in zip(places, chosen, strict=True):
            axes.text(one["total"] / 1e9 * 1.06, place, f"{_gb(one['total'])} GB", va="center", fontsize=8)
    axes.axvline(DEVICE / 1e9, color="#616161", linestyle="--", linewidth=1)
    axes.annotate(
        "80 GB: one accelerator",
        (DEVICE / 1e9, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=8,
        color="#616161",
    )
    names = [one["network"] for one in large if one["norm"] == "online"]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    low, high = min(one["total"] for one in large) / 1e9, max(one["total"] for one in large) / 1e9
    axes.set(
        xscale="log",
        xlim=(min(low / 3, 0.1), max(high, DEVICE / 1e9) * 12),
        xlabel="GB of one training step on one device, float32, predicted",
    )
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.set_title("Memory of training by norm and batch", loc="left", fontsize=11, pad=16)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def chosen(options: Options) -> list[int]:
    """The batches that the flags name.

    Raises:
        Refused: for what is no list of whole numbers above 1.
    """
    words = [word.strip() for word in options.batches.split(",")]
    if not all(word.isdecimal() and 1 < int(word) <= 4096 for word in words):
        refuse([Problem("batches", options.batches or "(nothing)", "must be batches of 2 to 4096.", Options.batches)])
    return sorted({int(word) for word in words})


def main(options: Options) -> None:
    """Reckon what training takes with online norm and with batch norm."""
    from jaxpar.plan.mesh import devices

    batches = chosen(options)
    folder = of_study(options.runs_dir, options.name, options.overwrite)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    devices(1)
    found = reckoned(batches)
    print(f"{table(found, batches)}\n\n{small_table(found)}")
    (folder / "table.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"\npicture: {picture(folder / 'norm_memory.png', found, batches)}\ntable: {folder / 'table.json'}")


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}", Options()))
