"""Does online normalization learn from one image at a time as it does from 32?

A small residual network on 8 x 8 digits. At a batch of 1 rate and momentum are rescaled so that each image counts as
in a batch of 32, by the rule of Chiley et al. 2019 (arXiv:1905.05894): momentum m^(1/32), and the rate to go with it.
Decays of online norm are per image anyway, and it knows no batch. Expect: within 2 points, as means over 3 seeds. Batch
norm is shown beside it: at a batch of 1 its statistics are those of one image, and those that it evaluates with are of
many. Four to eight minutes on 2 cores, nearly all of it for batches of 1.

    python -m experiments.online_norm_digits
    python -m experiments.online_norm_digits --norms online --seeds 1 --epochs 10 --name quick
"""

import json
import os
import statistics
import time
from dataclasses import dataclass

from experiments.online_norm import held_out, rescaled, scored
from jaxpar import Data, Model, Recipe, family
from jaxpar.cli import exit_codes, flags
from jaxpar.core.refuse import Collector, Problem, near_miss, refuse
from jaxpar.core.waiting import note, waiting
from jaxpar.report.columns import aligned
from jaxpar.report.pictures import COLORS
from jaxpar.train.folder import of_study

LARGE, SMALL = 32, 1  # images in a batch
MOMENTUM, RATE, DECAY = 0.9, 0.05, 2e-4  # at the large one
POINTS = 10  # looks at held-out digits
WITHIN = 0.02  # of accuracy, that batches of 1 may lose
MODEL = Model("convnet", layers=2, width=16)


@dataclass(frozen=True)
class Options:
    """What is trained.

    Attributes:
        name: the folder in --runs-dir.
        runs_dir: where folders of runs lie.
        overwrite: write over the table that is there.
        norms: with commas between them; all of them if empty.
        seeds: runs of each, of seeds 0, 1 ...
        epochs: of each run.
    """

    name: str = "online_norm_digits"
    runs_dir: str = "runs"
    overwrite: bool = False
    norms: str = "online,batch"
    seeds: int = 3
    epochs: int = 20


def recipe_of(norm: str, batch: int, seed: int, epochs: int, count: int) -> Recipe:
    """One run over `count` images."""
    rate, momentum = rescaled(RATE, MOMENTUM, batch / LARGE)
    steps = max(POINTS, epochs * count // batch)
    return Recipe(
        model=Model(**(vars(MODEL) | {"norm": norm})),
        data=Data("digits"),
        batch=batch,
        steps=steps,
        seed=seed,
        optimizer=f"sgd:momentum={momentum:.8g}",
        learning_rate=rate,
        schedule="linear:0",
        warmup=steps // 20,
        weight_decay=DECAY,
        clip=0.0,
    )


def trained(recipe: Recipe, looks, tests: list) -> dict:
    """One run: (epochs, nats, share of right digits) at each look.

    Args:
        recipe: what to train.
        looks: a program that evaluates, for batches of any size.
        tests: all held-out batches for it.
    """
    import jax

    from jaxpar.step.parts import prepare
    from jaxpar.step.program import program

    parts, dataset = prepare(recipe)
    made, curve, began = program(parts), [], time.perf_counter()
    state, every, count = made.init(), -(-recipe.steps // POINTS), len(dataset.splits[0])
    step = made.step.lower(state, made.place(dataset.batch(0))).compile()
    done = waiting(f"{recipe.model.norm}, batch {recipe.batch}, seed {recipe.seed}", recipe.steps, "steps")
    for number in range(1, recipe.steps + 1):
        state, _ = step(state, made.place(dataset.batch(number - 1)))
        if number % 100 == 0:
            jax.block_until_ready(state)  # so that nobody runs far ahead, and what is left is known
            done(number)
        if number % every == 0 or number == recipe.steps:
            curve.append([number * recipe.batch / count, *scored(looks, state, tests)])
    found = {"norm": recipe.model.norm, "batch": recipe.batch, "seed": recipe.seed, "steps": recipe.steps}
    return found | {
        "curve": curve,
        "accuracy": curve[-1][2],
        "loss": curve[-1][1],
        "seconds": time.perf_counter() - began,
    }


def study(norm: str, options: Options) -> list[dict]:
    """All runs of one norm."""
    from jaxpar.step.parts import prepare
    from jaxpar.step.program import program

    parts, dataset = prepare(recipe_of(norm, LARGE, 0, 1, LARGE))
    looks, count, rows = program(parts), len(dataset.splits[0]), []
    tests = held_out(looks, dataset)
    for batch in (LARGE, SMALL):
        for seed in range(options.seeds):
            rows.append(trained(recipe_of(norm, batch, seed, options.epochs, count), looks, tests))
            row = rows[-1]
            note(f"  {norm}, batch {batch}, seed {seed}: {row['accuracy']:.2%} right in {row['seconds']:.0f} s")
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """Of each norm: mean accuracies at both batches, and what the small one loses."""
    found = []
    for norm in dict.fromkeys(row["norm"] for row in rows):
        shares = {
            batch: [row["accuracy"] for row in rows if (row["norm"], row["batch"]) == (norm, batch)]
            for batch in (LARGE, SMALL)
        }
        means = {batch: statistics.fmean(own) for batch, own in shares.items()}
        lost = means[LARGE] - means[SMALL]
        found.append({"norm": norm, "large": shares[LARGE], "small": shares[SMALL], "lost": lost})
    return found


def table(rows: list[dict]) -> str:
    """A line for each norm."""
    lines = []
    for one in summary(rows):
        each = [" ".join(f"{share:.1%}" for share in one[size]) for size in ("large", "small")]
        lines.append([one["norm"], *each, f"{100 * one['lost']:+.2f}", "yes" if one["lost"] <= WITHIN else "no"])
    return aligned(["norm", f"batch {LARGE}", f"batch {SMALL}", "points lost", f"within {100 * WITHIN:g}"], lines)


def picture(path, rows: list[dict]):
    """Held-out accuracy and loss against epochs, a line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), dpi=110, layout="constrained")
    right, losses = figure.subplots(1, 2)
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    for row in rows:
        look = {"color": COLORS[norms.index(row["norm"])], "ls": "-" if row["batch"] == LARGE else "--", "lw": 1.2}
        label = f"{row['norm']}, batch {row['batch']}" if row["seed"] == 0 else None
        epochs, nats, shares = zip(*row["curve"], strict=True)
        right.plot(epochs, [100 * (1 - share) for share in shares], label=label, **look)
        losses.plot(epochs, nats, **look)
    right.set(xlabel="epochs", ylabel="% of held-out digits wrong", yscale="log")
    losses.set(xlabel="epochs", ylabel="held-out loss, nats", yscale="log")
    right.set_title("convnet on digits, a line for each seed", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    for axes in (right, losses):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def main(options: Options) -> None:
    """Train a small network on digits, 32 at a time and one at a time."""
    known, found = family.names("norms"), Collector([])
    norms = [name.strip() for name in options.norms.split(",")] if options.norms else known
    for name in sorted({*norms} - {*known}):
        found.problems.append(Problem("norms", name, "there is no such norm.", near_miss(name, known)))
    for field in ("seeds", "epochs"):
        if getattr(options, field) < 1:
            found.problems.append(Problem(field, getattr(options, field), "must be at least 1.", "1"))
    refuse(found.problems)
    folder = of_study(options.runs_dir, options.name, options.overwrite)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    rows = [row for norm in norms for row in study(norm, options)]
    print(table(rows))
    written = json.dumps({"rows": rows, "summary": summary(rows)}, indent=2)
    (folder / "table.json").write_text(written + "\n", encoding="utf-8")
    print(f"picture: {picture(folder / 'online_norm_digits.png', rows)}\ntable: {folder / 'table.json'}")


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}", Options()))
