"""Where a run keeps its state and its lines: in a folder, or nowhere."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Problem, Refused
from jaxpar.core.types import Dataset, State
from jaxpar.step.program import Program
from jaxpar.train import checkpoint, folder


class Store(NamedTuple):
    """What the loop knows of the disk.

    Attributes:
        load: `load(note) -> (state, lines)`: the last checkpoint and the lines of metrics.jsonl up to it; for a new run
            None and no lines. `note` is told what was found.
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


def on_disk(path: Path, recipe: Recipe, program: Program, dataset: Dataset, overwrite: bool) -> Store:
    """Keeps everything in the folder `path`, which `folder.locate` gave.

    Args:
        path: of the run.
        recipe: of the run.
        program: for the shapes and places of the state.
        dataset: of the run, which must be the one that it was begun with.
        overwrite: whether `load` deletes what is there first.
    """
    checkpoints, digest = path / folder.CHECKPOINTS, _digest(dataset)

    def load(note):
        if overwrite and folder.clear(path):
            note(f"deleted the run that was in {path}")
        steps = checkpoint.steps(checkpoints)
        state = None
        if steps:
            _refuse_other_data(checkpoint.about(checkpoints, steps[-1]), digest, recipe, dataset)
            state = checkpoint.restore(checkpoints, program, steps[-1])
            how = "all is done in" if steps[-1] == recipe.steps else "resuming"
            note(f"{how} {path}: {steps[-1]} of {recipe.steps} steps")
        folder.describe(path, recipe)
        return state, folder.keep(path, steps[-1] if steps else 0)

    def save(state):
        about = {"recipe": json.loads(recipe.to_json()), "data": digest, "source": dataset.source}
        checkpoint.save(checkpoints, program, state, about)

    def finish(summary):
        folder.write(
            path / folder.SUMMARY, json.dumps(folder.summary(path) | summary, indent=2, allow_nan=False) + "\n"
        )

    return Store(load, lambda line: folder.append(path, line), save, finish)


def _refuse_other_data(about: dict, digest: str, recipe: Recipe, dataset: Dataset) -> None:
    if about["data"] != digest:
        rule = f"has other examples now ({dataset.source}) than when the run was begun ({about['source']})."
        legal = "the --data-dir or Python of that run; another --name; or --overwrite to delete that run"
        raise Refused([Problem("data.name", recipe.data.name, rule, legal)])


def _digest(dataset: Dataset) -> str:
    """Of the first batches, which stand for all: which examples they hold depends on how many there are."""
    arrays = [*dataset.batch(0), *(dataset.held_out(0) if dataset.held_out_batches else ())]
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
