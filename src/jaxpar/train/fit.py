"""Training: from a recipe to a finished run."""

from contextlib import ExitStack
from time import perf_counter

from jaxpar.core.recipe import Recipe
from jaxpar.plan import mesh
from jaxpar.step.parts import prepare
from jaxpar.step.program import program as program_of
from jaxpar.train.ahead import ready
from jaxpar.train.folder import locate
from jaxpar.train.interrupt import Interrupted, stoppable
from jaxpar.train.metrics import book
from jaxpar.train.progress import Report, progress
from jaxpar.train.run import Run, finished
from jaxpar.train.store import nowhere, on_disk


def fit(
    recipe: Recipe,
    *,
    name: str | None = None,
    runs_dir: str = "runs",
    data_dir: str | None = None,
    overwrite: bool = False,
    report: Report | None = None,
) -> Run:
    """Train what `recipe` describes, from the start or from the last checkpoint of `name`.

    Args:
        recipe: every choice.
        name: folder under `runs_dir` to resume from and to write to; None writes nothing.
        runs_dir: folder of all runs.
        data_dir: folder with the files of the dataset; by default the dataset's own.
        overwrite: delete the run of this name first.
        report: who is told how it goes; by default whoever reads stderr.

    Raises:
        Refused: naming every bad field, before anything is compiled, written or deleted.
        ValueError: for a batch of other shapes than the first, or with values out of range.
        Interrupted: after Ctrl-C or SIGTERM, with everything saved; without `name` these act as ever.
        NonFinite: if a loss or gradient is no number; nothing is saved after that.
    """
    mesh.simulate(mesh.needed(recipe.plan) or 1)  # before jax makes its devices
    parts, dataset = prepare(recipe, data_dir)
    folder = locate(recipe, name, runs_dir, overwrite) if name is not None else None
    program = program_of(parts)
    with ExitStack() as until_done:
        report = report or progress(recipe.steps)
        until_done.callback(report.close)
        asked = until_done.enter_context(stoppable(report.note, wanted=folder is not None))
        disk = on_disk(folder, recipe, program, dataset, overwrite) if folder else nowhere()
        state, lines = disk.load(report.note)
        state, run = ready(state, recipe, program, parts, dataset, report.note)
        written = book(lambda line: (disk.append(line), report.line(line)), lines, parts.labels.shape, run)
        for number in range(int(state.step) + 1, recipe.steps + 1):
            began = perf_counter()
            batch = run.feed(number - 1)
            fed = perf_counter()
            state, found = run.step(state, batch)
            written.step(number, found, began, fed)
            stop = asked()
            evaluate = dataset.held_out_batches and _due(number, recipe.evaluate_every, recipe.steps)
            save = stop or _due(number, recipe.checkpoint_every, recipe.steps)
            if evaluate or save:
                written.settle()
            if evaluate:
                written.held_out(number, run.held_out(state))
            if save:
                disk.save(state)
            if stop:
                raise Interrupted(f"stopped after step {number} of {recipe.steps}; the same command goes on from there")
        done = finished(state, written.lines, folder, program, parts, dataset, run.bill)
        disk.finish(done.summary)
    return done


def _due(number: int, every: int, last: int) -> bool:
    return number == last or bool(every and number % every == 0)
