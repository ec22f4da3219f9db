"""What the folder of a run says of it, read without jax."""

import math
import os
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Problem, Refused, near_miss
from jaxpar.train import folder, lock


class Record(NamedTuple):
    """A run as it lies on the disk.

    Attributes:
        folder: of the run.
        recipe: every choice.
        lines: of metrics.jsonl.
        summary: what summary.json says; empty until the run is done.
        step: updates done, as far as the lines say.
        status: `done`, `running` or `interrupted`.
        when: of the last line, or of the recipe if there is none.
    """

    folder: Path
    recipe: Recipe
    lines: list[dict]
    summary: dict
    step: int
    status: str
    when: datetime


def recipe(path: Path, field: str = "recipe") -> Recipe:
    """The recipe in the JSON file `path`.

    Raises:
        Refused: naming the file and `field`, if it cannot be read or is no recipe.
    """
    try:
        return Recipe.from_json(path.read_text(encoding="utf-8"))
    except Refused as refused:
        raise Refused([problem._replace(rule=f"{problem.rule} ({path})") for problem in refused.problems]) from refused
    except OSError as error:
        rule = f"cannot be read: {error.strerror or error}."
    except UnicodeDecodeError as error:
        rule = f"is no text: {error}."
    raise Refused([Problem(field, path, rule, "a file that Recipe.to_json wrote, such as runs/NAME/recipe.json")])


def record(path: Path) -> Record:
    """The run in the folder `path`.

    Raises:
        Refused: if it is no run's folder, or its recipe cannot be read.
    """
    chosen, lines, said = recipe(path / folder.RECIPE, "run"), folder.lines(path), folder.summary(path)
    step = max((line["step"] for line in lines), default=0)
    status = "running" if lock.holder(path) else "done" if said and step >= chosen.steps else "interrupted"
    newest = path / (folder.METRICS if lines else folder.RECIPE)
    return Record(path, chosen, lines, said, step, status, datetime.fromtimestamp(newest.stat().st_mtime))


def find(run: str, runs_dir: str) -> Path:
    """The folder of `run`: a name in `runs_dir`, or a path.

    Raises:
        Refused: if there is no run there, with the likeliest name.
    """
    given = Path(os.path.expanduser(run))
    named = Path(os.path.expanduser(runs_dir)) / run
    if folder.NAME.fullmatch(run) and run not in (".", "..") and (named / folder.RECIPE).is_file():
        return named
    if (given / folder.RECIPE).is_file():
        return given
    there = [path.name for path in folders(runs_dir)]
    rule = f"there is no run of this name in {runs_dir}, and no folder of this path with a recipe.json."
    raise Refused([Problem("run", run, rule, near_miss(run, there) if there else "another --runs-dir")])


def folders(runs_dir: str) -> list[Path]:
    """The folders in `runs_dir` that may be runs, by name; none if there is no such folder.

    Raises:
        Refused: if `runs_dir` cannot be read.
    """
    path = Path(os.path.expanduser(runs_dir))
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        rule = f"cannot be read: {error.strerror or error}."
        raise Refused([Problem("runs_dir", runs_dir, rule, "a folder of runs")]) from error


def losses(lines: list[dict]) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(step, nats) of each training loss and of each held-out loss in `lines`."""
    kinds = ("loss", "held_out_loss")
    return tuple([(line["step"], line[kind]) for line in lines if _is_number(line.get(kind))] for kind in kinds)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
