"""Where a run keeps its state and its lines: in a folder, or nowhere."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Problem, Refused
from jaxpar.core.types import Dataset, State
from jaxpar.step.parts import Parts
from jaxpar.step.program import Program
from jaxpar.train import checkpoint, folder
from jaxpar.train.stop import NotSaved


class Store(NamedTuple):
    """What the loop knows of the disk.

    Attributes:
        load: `load(note) -> (state, lines)`: the newest good checkpoint and the lines of metrics.jsonl up to it; for a
            new run None and no lines. `note` is told what was found.
        append: `append(line)`: one more line of metrics.jsonl.
        save: `save(state)`: a checkpoint, complete when this returns.
        finish: `finish(summary)`: the run is done; what an earlier summary knew besides is kept.
    """

    load: Callable[[Callable[[str], None]], tuple[State | None, list[dict]]]
    append: Callable[[dict], None]
    save: Callable[[State], None]
    finish: Callable[[dict], None]


def nowhere() -> Store:
    """Keeps nothing."""
    return Store(lambda note: (None, []), lambda line: None, lambda state: None, lambda summary: None)


def on_disk(path: Path, recipe: Recipe, program: Program, parts: Parts, dataset: Dataset, overwrite: bool) -> Store:
    """Keeps everything in the folder `path`, which `folder.locate` gave and `lock.locked` locked.

    Args:
        path: of the run.
        recipe: of the run.
        program: for the shapes and places of the state.
        parts: for the shapes of a batch.
        dataset: of the run, which must be the one that it was begun with.
        overwrite: whether `load` deletes what is there first.
    """
    checkpoints, digest, was_done = path / folder.CHECKPOINTS, _digest(dataset), []

    def load(note):
        if overwrite and folder.clear(path):
            note(f"deleted the run that was in {path}")
        found, step = checkpoint.newest(checkpoints, program, note), 0
        if found:
            _refuse_other_data(found.manifest["about"], digest, recipe, dataset)
            step = found.manifest["step"]
            how = "all is done in" if step == recipe.steps else "resuming"
            note(f"{how} {path}: {step} of {recipe.steps} steps")
        else:
            _refuse_lost(path, note)
        with _written(path):
            checkpoint.tidy(checkpoints, found.damaged if found else ())
            if step == recipe.steps and folder.summary(path):
                was_done.append(step)  # under another plan perhaps, which its files go on telling
            else:
                folder.describe(path, recipe)
            return found.state if found else None, folder.keep(path, step)

    def save(state):
        batch = {"inputs": _shape(parts.inputs), "labels": _shape(parts.labels), "classes": dataset.classes}
        about = {"recipe": json.loads(recipe.to_json()), "data": digest, "source": dataset.source, "batch": batch}
        with _written(path):
            folder.settle(path)
        checkpoint.save(checkpoints, program, state, about)

    def finish(summary):
        if was_done:
            return
        with _written(path):
            text = json.dumps(folder.summary(path) | summary, indent=2, allow_nan=False)
            folder.write(path / folder.SUMMARY, text + "\n")

    def append(line):
        with _written(path):
            folder.append(path, line)

    return Store(load, append, save, finish)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotSaved(
            f"{error.filename or path} could not be written: {error.strerror or error}\n"
            "Checkpoints are untouched; once this is mended, the same command goes on from the newest."
        ) from error


def _shape(a: jax.ShapeDtypeStruct) -> dict:
    return {"shape": [*a.shape], "dtype": np.dtype(a.dtype).name}


def _refuse_lost(path: Path, note: Callable[[str], None]) -> None:
    """Without a checkpoint a run starts anew; not so one that was done."""
    if folder.summary(path):
        rule = "there is none, and the run was done."
        legal = "a copy of that folder; another --name; or --overwrite to start anew"
        raise Refused([Problem("checkpoint", path / folder.CHECKPOINTS, rule, legal)])
    if lines := folder.lines(path):
        note(f"WARNING: {path} got as far as step {lines[-1]['step']} and has no checkpoint of it; starting anew")


def _refuse_other_data(about: dict, digest: str, recipe: Recipe, dataset: Dataset) -> None:
    if about["data"] != digest:
        rule = f"has other examples now ({dataset.source}) than when the run was begun ({about['source']})."
        legal = "the --data-dir or Python of that run; another --name; or --overwrite to delete that run"
        raise Refused([Problem("data.name", recipe.data.name, rule, legal)])


def _digest(dataset: Dataset) -> str:
    """Of the first batches, which stand for all: which examples they hold depends on how many there are."""
    arrays = [*dataset.batch(0), *(dataset.held_out(0) if dataset.held_out_batches else ())]
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
