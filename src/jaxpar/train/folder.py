"""The folder of a run: `runs/NAME/` with recipe.json, plan.txt, metrics.jsonl, summary.json and checkpoints/."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Problem, Refused, refuse
from jaxpar.train.lock import LOCK
from jaxpar.train.manifest import sync

RECIPE, PLAN, METRICS, SUMMARY, CHECKPOINTS = "recipe.json", "plan.txt", "metrics.jsonl", "summary.json", "checkpoints"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
FREE = {"plan", "evaluate_every", "evaluate_batches", "checkpoint_every", "skip_limit", "peak_tflops"}  # may change


def locate(recipe: Recipe, name: str, runs_dir: str, overwrite: bool = False) -> Path:
    """The folder of run `name`, if this recipe may be trained there; nothing is written or deleted yet.

    A run resumes under any plan and with evaluations and checkpoints at other steps. Every other field changes what is
    learned, also `steps`, which the learning rate follows.

    Raises:
        Refused: if the name cannot be that of a folder, another recipe was trained there, or it is no run's folder.
    """
    folder = inside(runs_dir, name)
    if not os.path.lexists(folder) or _is_fresh(folder):
        return folder
    if not _is_run(folder):
        rule = f"{folder} is there and is not the folder of a run, so it is left alone."
        raise Refused([Problem("name", name, rule, "another --name or --runs-dir")])
    if not overwrite:
        refuse(_differences(folder, recipe))
    return folder


def inside(runs_dir: str, name: str) -> Path:
    """Where the run `name` lies, whether it is there or not.

    Raises:
        Refused: if the name cannot be that of a folder, or would lie elsewhere.
    """
    if not NAME.fullmatch(name) or name in (".", ".."):
        rule = "must be 1 to 64 of A-Z a-z 0-9 . _ - and neither . nor .."
        legal = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:64] or "run"
        raise Refused([Problem("name", repr(name), rule, legal)])
    return Path(os.path.expanduser(runs_dir)) / name


def of_study(runs_dir: str, name: str, overwrite: bool) -> Path:
    """The folder for the table and the pictures of an experiment, made; unless `overwrite`, one without a table.

    Raises:
        Refused: if there is a table already, the name cannot be that of a folder, or the folder cannot be made.
    """
    folder = inside(runs_dir, name)
    if (folder / "table.json").exists() and not overwrite:
        raise Refused([Problem("name", name, f"{folder} has a table.", "--overwrite, or another --name")])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"the folder {folder} cannot be made: {error.strerror or error}."
        raise Refused([Problem("runs_dir", runs_dir, rule, "a folder that you may write to")]) from error
    return folder


def clear(folder: Path) -> bool:
    """Delete the folder of a run, but for its lock if that is held; False, and nothing is touched, if it is none.

    The recipe goes last, so that what a kill leaves is still known for a run.
    """
    if not _is_run(folder):
        return False
    with _writing(folder):
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == RECIPE):
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    with suppress(OSError):  # not empty: somebody holds the lock
        folder.rmdir()
    return True


def describe(folder: Path, recipe: Recipe) -> None:
    """Make the folder and write recipe.json and plan.txt, as they are from now on.

    Raises:
        Refused: if it cannot be written.
    """
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / PLAN, f"{recipe.plan}\n")
        write(folder / RECIPE, recipe.to_json() + "\n")


def write(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, path)


def summary(folder: Path) -> dict:
    """What summary.json says; nothing if there is none that can be read."""
    try:
        found = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def append(folder: Path, line: dict) -> None:
    """Add one line to metrics.jsonl."""
    with open(folder / METRICS, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line, allow_nan=False) + "\n")


def keep(folder: Path, step: int) -> list[dict]:
    """Cut metrics.jsonl back to what was known after `step` updates, and return its lines.

    A run that was killed may have got further than its last checkpoint, or have left half a line.
    """
    kept = [line for line in lines(folder) if line["step"] <= step]
    write(folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def lines(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl that can be read; none if there is no such file."""
    path = folder / METRICS
    written = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [line for line in map(_parsed, written.splitlines()) if line]


def settle(folder: Path) -> None:
    """Bring the lines of metrics.jsonl to the disk, so that no checkpoint is there without those of its steps."""
    if (folder / METRICS).exists():
        sync(folder / METRICS)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        rule = f"{error.filename or folder} cannot be written: {error.strerror or error}."
        raise Refused([Problem("runs_dir", folder.parent, rule, "a folder of yours, by --runs-dir")]) from error


def _parsed(text: str) -> dict | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _is_fresh(folder: Path) -> bool:
    """Whether `folder` is empty, or was left by a run that was killed before it had written its recipe."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return not {entry.name.removesuffix(".part") for entry in folder.iterdir()} - {RECIPE, PLAN, LOCK} and not _is_run(
        folder
    )


def _is_run(folder: Path) -> bool:
    """Whether `folder` itself, not a link to it, holds the recipe of a run, of this or another version."""
    if folder.is_symlink() or not (folder / RECIPE).is_file():
        return False
    try:
        return {"model", "data", "plan"} <= set(json.loads((folder / RECIPE).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return False


def _differences(folder: Path, recipe: Recipe) -> Iterable[Problem]:
    """One problem for each field of `recipe` that means another run than the one in `folder`."""
    try:
        there = flat(json.loads(Recipe.from_json((folder / RECIPE).read_text(encoding="utf-8")).to_json()))
    except (ValueError, TypeError) as error:
        rule = f"{folder / RECIPE} is not a recipe that this version can read ({error})."
        return [Problem("name", folder.name, rule, "another --name, or --overwrite to delete that run and start anew")]
    here = flat(dataclasses.asdict(recipe))
    found = [
        Problem(field, value, f"the run in {folder} has {there[field]}.", f"{there[field]}, to resume it")
        for field, value in here.items()
        if field not in FREE and value != there[field]
    ]
    legal = "another --name, or --overwrite to delete that run"
    return [*found, Problem("name", folder.name, "is that of a run of another recipe.", legal)] if found else []


def flat(values: dict, above: str = "") -> dict:
    """Fields by their dotted names; the plan stays one field."""
    found = {}
    for name, value in values.items():
        inner = isinstance(value, dict) and name != "plan"
        found |= flat(value, f"{above}{name}.") if inner else {above + name: value}
    return found
