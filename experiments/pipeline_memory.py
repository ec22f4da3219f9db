"""How much memory does each pipeline schedule take as a batch is cut into more microbatches?

Every schedule on 4 devices, with the inputs of stages kept (`recompute`) or all that the backward pass needs
(`residual`), at 4 to 32 microbatches of 8 examples each: what the compiled program of loss and gradients holds besides
its arguments and results (`memory_analysis`), and what of it is said before: the *pools* in which a device keeps
activations from tick to tick, as many slots as the timetable needs of what was found to be kept.

Expect: the compiled memory less the predicted pools, "the rest", is the same number at every count of microbatches:
pools are predicted to the byte, and nothing else grows. (Where XLA fits a buffer in less well, the rest is larger by
that buffer, at some counts and not at others.) In slots of a device, with p devices and m microbatches: gpipe m, so its
memory grows with the batch; one_f_one_b and zero_bubble_h1 p, eager_one_f_one_b and zero_bubble_h2 2p-1, interleaved
p + (p-1)/V and zero_bubble_v p, which do not; and one is a dummy for ticks without work. `residual` holds more than
`recompute` per slot and does less work; schedules with a W hold what W needs for longer. (Huang et al. 2019,
arXiv:1811.06965; Narayanan et al. 2021, arXiv:2104.04473; Qi et al. 2023, arXiv:2401.10241.)

Nothing is run, each program is compiled once: ten minutes on 2 idle cores for all of them.

    python -m experiments.pipeline_memory
    python -m experiments.pipeline_memory --schedules gpipe,one_f_one_b --microbatches 4,16,64 --name two
    python -m experiments.pipeline_memory --plan pipe=2,tensor=one_d:2 --schedules zero_bubble_h2
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from jaxpar import Data, Model, Plan, Recipe, Refused, family
from jaxpar.cli import exit_codes, flags
from jaxpar.core.refuse import Problem
from jaxpar.train.folder import of_study

BASE = Recipe(
    model=Model("gpt", layers=8, width=64, heads=4, context=16),
    data=Data("stdlib_text"),
    plan=Plan(pipe=4),
    batch=8,  # of each microbatch
)
CHUNKS = {"interleaved": 2, "zero_bubble_v": 2}
STORAGES = ("recompute", "residual")
HEAD = "schedule           storage    microbatches    pool MB  compiled MB    rest MB"


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        name: the folder in --runs-dir.
        runs_dir: where folders of runs lie.
        data_dir: where data lies that is not downloaded.
        overwrite: write over the table that is there.
        schedules: names, with commas between them; all if empty.
        microbatches: counts, with commas between them.
    """

    name: Annotated[str, arg(prefix_name=False)] = "pipeline_memory"
    runs_dir: Annotated[str, arg(prefix_name=False)] = "runs"
    data_dir: Annotated[str | None, arg(prefix_name=False)] = None
    overwrite: Annotated[bool, arg(prefix_name=False)] = False
    schedules: Annotated[str, arg(prefix_name=False)] = ""
    microbatches: Annotated[str, arg(prefix_name=False)] = "4,8,16,32"


@dataclass(frozen=True)
class Options:
    """The flags: a recipe, whose `batch` is that of one microbatch, and what is compared."""

    recipe: Annotated[Recipe, arg(name="")]
    study: Study


def measure(parts) -> dict:
    """Bytes that a device holds besides arguments and results of loss and gradients: `pool` of it said before."""
    from jaxpar.report import account
    from jaxpar.step.program import program

    made = program(parts)
    compiled = made.gradients.lower(made.shapes, made.batch).compile()
    found = {"pool": account.pool_bytes(parts), "compiled": compiled.memory_analysis().temp_size_in_bytes}
    return found | {"rest": found["compiled"] - found["pool"]}


def recipes(recipe: Recipe, schedules: list[str], counts: list[int]) -> list[Recipe]:
    """One for each schedule, storage and count of microbatches; those of one line of the picture next to each other."""
    found = []
    for schedule in schedules:
        for storage in STORAGES:
            for count in counts:
                how = {"schedule": schedule, "chunks": CHUNKS.get(schedule, 1), "storage": storage}
                plan = replace(recipe.plan, microbatches=count, **how)
                found.append(replace(recipe, plan=plan, batch=count * recipe.batch))
    return found


def agrees(row: dict, first: dict) -> bool:
    """Whether the pools account for the difference to the first row of the line, to 5 % of the pools."""
    return abs(row["rest"] - first["rest"]) <= 0.05 * row["pool"]


def written(row: dict, first: dict) -> str:
    """A row of the table as text, bytes in millions."""
    sizes = "".join(f"{row[key] / 1e6:>{width}.4f}" for key, width in (("pool", 11), ("compiled", 13), ("rest", 11)))
    told = "" if agrees(row, first) else "   differs"
    return f"{row['schedule']:<19}{row['storage']:<11}{row['microbatches']:>12}{sizes}{told}"


def picture(path: Path, rows: list[dict], title: str) -> Path:
    """Compiled memory against microbatches, a line per schedule, and dashed the pools in it; a panel per storage."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    from jaxpar.report.pictures import COLORS

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(STORAGES))
    names = list(dict.fromkeys(row["schedule"] for row in rows))
    for storage, axes in zip(STORAGES, panels, strict=True):
        lines: dict[tuple, list[str]] = {}  # schedules that take the same memory share a line
        for name in names:
            here = [row for row in rows if (row["schedule"], row["storage"]) == (name, storage)]
            lines.setdefault(tuple((row["microbatches"], row["compiled"], row["pool"]) for row in here), []).append(
                name
            )
        for line, alike in lines.items():
            counts, compiled, pool = zip(*line, strict=True)
            color = COLORS[names.index(alike[0]) % len(COLORS)]
            axes.plot(counts, [size / 1e6 for size in compiled], "o-", ms=4, color=color, label="\n".join(alike))
            axes.plot(counts, [size / 1e6 for size in pool], "--", lw=1, color=color)
        axes.set(xscale="log", xlabel="microbatches", ylim=(0, None))
        axes.set_title(f"storage={storage}", loc="left", fontsize=10)
        axes.set_xticks(sorted({row["microbatches"] for row in rows}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    panels[0].set_ylabel("megabytes of a device")
    figure.suptitle(f"{title}: compiled, and predicted pools in it (dashed)", fontsize=10)
    figure.savefig(path)
    return path


def chosen(study: Study, plan: Plan) -> tuple[list[str], list[int]]:
    """The schedules and counts of microbatches that the flags name.

    Raises:
        Refused: for a name that is no schedule with figures of its own, a count that is no number, and no pipeline.
    """
    legal = [name for name in family.names("schedules") if name != "from_table"]
    schedules = [name.strip() for name in study.schedules.split(",")] if study.schedules else legal
    problems = [
        Problem("schedules", name, "there is no such schedule.", ", ".join(legal))
        for name in schedules
        if name not in legal
    ]
    counts = [word.strip() for word in study.microbatches.split(",")]
    if not all(word.isdecimal() and int(word) for word in counts) or len(set(counts)) < 2:
        problems.append(Problem("microbatches", study.microbatches, "must be two counts or more.", "4,8,16,32"))
    if plan.pipe < 2 or plan.partition != "manual":
        problems.append(Problem("plan", plan, "has no pipeline.", "pipe=2 or more, partition=manual"))
    if problems:
        raise Refused(problems)
    return schedules, [int(word) for word in counts]


def main(options: Options) -> None:
    """Compare the memory of every pipeline schedule, predicted and compiled, as microbatches grow in number."""
    from jaxpar.plan.mesh import devices, needed
    from jaxpar.step.parts import prepare

    study, recipe = options.study, options.recipe
    schedules, counts = chosen(study, recipe.plan)
    work = [(one, prepare(one, study.data_dir)[0]) for one in recipes(recipe, schedules, counts)]  # refused now
    folder = of_study(study.runs_dir, study.name, study.overwrite)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    devices(needed(work[0][0].plan))

    print(HEAD)
    rows, began = [], time.perf_counter()
    for done, (here, parts) in enumerate(work, 1):
        named = {name: getattr(here.plan, name) for name in ("schedule", "storage", "microbatches")}
        rows.append(named | {"plan": str(here.plan)} | measure(parts))
        print(written(rows[-1], rows[-1 - (done - 1) % len(counts)]), flush=True)
        left = (time.perf_counter() - began) / done * (len(work) - done)
        print(f"  {done} of {len(work)}, about {left:.0f} s left", file=sys.stderr, flush=True)
    firsts = [rows[number - number % len(counts)] for number in range(len(rows))]
    later = [(row, first) for row, first in zip(rows, firsts, strict=True) if row is not first]
    most = max(abs(row["rest"] - first["rest"]) / row["pool"] for row, first in later)
    same = sum(agrees(*pair) for pair in later)
    print(
        f"\nPools account for what grows, to 5 % of them, in {same} of {len(later)} rows after the first of their line;"
    )
    print(f"the largest difference is {most:.2%} of the pools. MB are millions of bytes.")
    about = {"recipe": json.loads(recipe.to_json()), "rows": rows}
    (folder / "table.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    model = recipe.model
    title = f"{model.name}, {model.layers} layers of width {model.width}, {recipe.batch} examples a microbatch"
    print(f"picture: {picture(folder / 'memory.png', rows, title)}\ntable: {folder / 'table.json'}")


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}", Options(BASE, Study())))
