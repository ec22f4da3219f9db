"""Can weights be stored in few bits?  Rounded to nearest they stand still; rounded stochastically they train.

A small MLP learns digits in float32, but for its weights: after each step of Adam they are rounded onto the grid of a
format, and nothing finer is kept. An update of less than half of the distance to the next number is lost if it is
rounded to nearest. If it is rounded up or down at random, with the probabilities that keep its mean, it counts on
average. Each format is run with both, from the same weights and on the same batches, and float32 once.

Expect: as in float32 wherever the format is fine enough; else nearest stalls at a higher loss, the earlier the coarser
the format, as fewer and fewer weights are moved by a step; and stochastic rounding goes on, down to about the loss that
its noise allows. Formats of 16 bits are those of Gupta et al. 2015 (arXiv:1502.02551, figures 1 and 2: an MLP on MNIST;
with 8 bits behind the point nearest fails and stochastic trains, with 14 both do) and (1,6,9) of Wang et al. 2018
(arXiv:1812.08011, section 2.4: nearest updates cost accuracy, stochastic ones none); those of 8 bits go further than
either paper.

Two minutes on 2 idle cores.

    python -m experiments.rounding
    python -m experiments.rounding --steps 2000 --learning-rate 3e-4 --name slow
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from jaxpar import Data, Model, Recipe
from jaxpar.cli import exit_codes, flags
from jaxpar.core.refuse import Problem
from jaxpar.report.columns import aligned
from jaxpar.train.folder import of_study

BASE = Recipe(model=Model("mlp", layers=2, width=32, hidden=64), data=Data("digits"), batch=64, weight_decay=0.0)
FORMATS = ("bf16", "fp169", "fp16", "fixed:2.14", "fixed:6.10", "fixed:8.8", "e4m3", "e5m2")
CLAIMED = {"fp169": "worse / trains", "fixed:2.14": "trains / trains", "fixed:8.8": "fails / trains"}
CLAIMED |= {"fixed:6.10": "worse / trains"}
POINTS = 16  # of each curve
MOST = 100_000


@dataclass(frozen=True)
class Options:
    """What is trained.

    Attributes:
        name: the folder in --runs-dir.
        runs_dir: where folders of runs lie.
        overwrite: write over the table that is there.
        formats: with commas between them.
        steps: of each run.
        learning_rate: the largest.
        seed: of parameters, batches and rounding.
    """

    name: str = "rounding"
    runs_dir: str = "runs"
    overwrite: bool = False
    formats: str = ",".join(FORMATS)
    steps: int = 500
    learning_rate: float = 1e-3
    seed: int = 0


def trained(name: str, stochastic: bool, options: Options) -> dict:
    """One run: held-out loss and the share of weights that a step moves, at some steps.

    Args:
        name: of the format of the weights.
    """
    import jax
    import numpy as np
    import optax

    from jaxpar.core import formats
    from jaxpar.step.parts import prepare
    from jaxpar.step.program import program
    from jaxpar.step.rounding import rounded

    recipe = replace(BASE, steps=options.steps, learning_rate=options.learning_rate, seed=options.seed)
    parts, dataset = prepare(recipe)
    fmt = formats.named(name)
    parts = parts._replace(optimizer=optax.chain(parts.optimizer, rounded(fmt, stochastic, options.seed)))
    made = program(parts)
    state = made.init()
    on_grid = jax.jit(lambda params: jax.tree.map(lambda leaf: formats.nearest(leaf, fmt), params))
    state = state._replace(params=on_grid(state.params))
    held_out = [made.place(dataset.held_out(i)) for i in range(dataset.held_out_batches)]

    def weights() -> np.ndarray:
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])

    losses, moved, every = [], [], max(1, options.steps // POINTS)
    for step in range(options.steps):
        last = step % every == every - 1
        before = weights() if last else None
        state, metrics = made.step(state, made.place(dataset.batch(step)))
        if last:
            sums = np.sum([made.evaluate(state.params, state.extra, batch) for batch in held_out], 0)
            losses.append((step + 1, float(sums[0] / sums[1])))
            moved.append((step + 1, float(np.mean(weights() != before))))
    rounding = "stochastic" if stochastic else "nearest"
    training = float(metrics["loss"])
    return {"format": name, "rounding": rounding, "training": training, "held_out": losses, "moved": moved}


def table(rows: list[dict]) -> str:
    """One line for each format, nearest beside stochastic."""
    by = {(row["format"], row["rounding"]): row for row in rows}
    head = [
        "weights in",
        "nearest",
        "stochastic",
        "moved by the last step",
        "stochastic ",
        "papers: nearest / stochastic",
    ]
    lines = []
    for name in dict.fromkeys(row["format"] for row in rows):
        both = [by.get((name, rounding)) for rounding in ("nearest", "stochastic")]
        last = [f"{row['held_out'][-1][1]:.4f}" if row else "" for row in both]
        moved = [f"{row['moved'][-1][1]:.1%}" if row else "" for row in both]
        lines.append([name, *last, *moved, CLAIMED.get(name, "")])
    return "held-out loss in nats, and the share of weights that the last step moved\n" + aligned(
        head, lines, head[1:5]
    )


def picture(path: Path, rows: list[dict]) -> Path:
    """Held-out losses against the step, 16 bits and 8; and the share of weights that a step moves."""
    from matplotlib.figure import Figure

    from jaxpar.report.pictures import COLORS

    names = list(dict.fromkeys(row["format"] for row in rows if row["format"] != "fp32"))
    figure = Figure(figsize=(12, 4.3), dpi=150, layout="constrained")
    losses, moved = figure.subplots(1, 2)
    for row in rows:
        exact = row["format"] == "fp32"
        style = "-" if exact or row["rounding"] == "stochastic" else ":"
        look = {"color": "black" if exact else COLORS[names.index(row["format"]) % len(COLORS)], "ls": style}
        look |= {"lw": 4, "alpha": 0.25} if exact else {"lw": 1.5}
        label = row["format"] if exact or row["rounding"] == "stochastic" else None
        losses.plot(*zip(*row["held_out"], strict=True), **look, label=label)
        moved.plot(*zip(*row["moved"], strict=True), **look)
    losses.set(xlabel="step", ylabel="held-out loss, nats", yscale="log")
    losses.set_yticks([0.3, 0.5, 1, 2], ["0.3", "0.5", "1", "2"])
    losses.yaxis.minorticks_off()
    losses.set_title("weights rounded to nearest (dotted) and stochastically", loc="left", fontsize=10)
    losses.legend(frameon=False, fontsize=8)
    moved.set(xlabel="step", ylabel="share of weights that a step moves", ylim=(-0.02, 1.02))
    moved.set_title("what is not moved is lost to nearest, and a chance to stochastic", loc="left", fontsize=10)
    for axes in (losses, moved):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def chosen(options: Options) -> list[str]:
    """The formats that the flags name.

    Raises:
        Refused: for names that are none, and for steps out of range.
    """
    from jaxpar.core import formats
    from jaxpar.core.refuse import Collector, refuse

    found = Collector([])
    names = [word.strip() for word in options.formats.split(",")]
    for name in names:
        found.attempt(formats.named, name, "formats")
    if not 1 <= options.steps <= MOST:
        found.problems.append(Problem("steps", options.steps, f"must be from 1 to {MOST}.", str(Options.steps)))
    refuse(found.problems)
    return [name for name in dict.fromkeys(names) if name != "fp32"]


def main(options: Options) -> None:
    """Train a small MLP with weights stored in few bits, rounded to nearest and stochastically."""
    from jaxpar.plan.mesh import devices

    names = chosen(options)
    folder = of_study(options.runs_dir, options.name, options.overwrite)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    devices(1)
    work = [("fp32", False), *((name, stochastic) for name in names for stochastic in (False, True))]
    rows, began = [], time.perf_counter()
    for done, one in enumerate(work, 1):
        rows.append(trained(*one, options))
        left = (time.perf_counter() - began) / done * (len(work) - done)
        print(f"  {done} of {len(work)}, about {left:.0f} s left", file=sys.stderr, flush=True)
    print(table(rows))
    (folder / "table.json").write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(f"\npicture: {picture(folder / 'rounding.png', rows)}\ntable: {folder / 'table.json'}")


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}", Options()))
