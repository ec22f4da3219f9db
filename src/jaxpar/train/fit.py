"""Training: from a recipe to a finished run."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from jaxpar.core import strict
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Collector, refuse
from jaxpar.core.types import Dataset
from jaxpar.plan import mesh
from jaxpar.report import remedies
from jaxpar.report.remedies import Need
from jaxpar.step.parts import Parts, assemble, prepare
from jaxpar.step.program import Program
from jaxpar.step.program import program as program_of
from jaxpar.train.ahead import ready
from jaxpar.train.folder import inside, locate
from jaxpar.train.lock import locked, refuse_held
from jaxpar.train.loop import Outside, loop
from jaxpar.train.metrics import book
from jaxpar.train.progress import Report, progress, unfailing
from jaxpar.train.run import Run, finished
from jaxpar.train.sinks import opened, wrong
from jaxpar.train.stop import stoppable
from jaxpar.train.store import nowhere, on_disk
from jaxpar.train.watchdog import watchdog as watched
from jaxpar.train.watchdog import wrong_limit


def fit(
    recipe: Recipe,
    *,
    name: str | None = None,
    runs_dir: str = "runs",
    data_dir: str | None = None,
    overwrite: bool = False,
    report: Report | None = None,
    watchdog: float | None = None,
    sinks: Sequence[str] = (),
) -> Run:
    """Train what `recipe` describes, from the start or from the newest good checkpoint of `name`.

    Args:
        recipe: every choice.
        name: folder under `runs_dir` to resume from and to write to; None writes nothing.
        runs_dir: folder of all runs.
        data_dir: folder with the files of the dataset; by default the dataset's own.
        overwrite: delete the run of this name first.
        report: who is told how it goes; by default whoever reads stderr.
        watchdog: end this process, with exit code 76, when nothing is finished for so many seconds; None for never.
        sinks: members of sinks/ that get each line of metrics.jsonl as well; none of them can stop or delay a run.

    Raises:
        Refused: naming every bad field, before anything is compiled, written or deleted; or another run holds `name`.
        ValueError: for a batch of other shapes than the first, or with values out of range.
        Interrupted: after Ctrl-C or SIGTERM, with everything saved; without `name` these act as ever.
        NonFinite: after `recipe.skip_limit` updates in a row were skipped since they were no numbers.
        NotSaved: if a checkpoint or a line could not be written; the newest good checkpoint is untouched.
    """
    refuse(strict.mistyped(recipe))
    mesh.simulate(mesh.needed(recipe.plan) or 1)  # before jax makes its devices
    found = Collector([*wrong(sinks, name), *wrong_limit(watchdog)])
    folder = None if name is None else found.attempt(_place, recipe, name, runs_dir, overwrite)
    prepared = found.attempt(prepare, recipe, data_dir)
    refuse(found.problems)
    parts, dataset = prepared
    program = program_of(parts)
    with ExitStack() as until_done:
        report = unfailing(report or progress(recipe.steps))
        until_done.callback(report.close)
        need = _need(recipe, parts, dataset, program, report.note)
        if folder:
            until_done.enter_context(locked(folder, report.note))
            locate(recipe, name, runs_dir, overwrite)  # again, now that nobody else may change what is there
        asked = until_done.enter_context(stoppable(report.note, wanted=folder is not None))
        closing = until_done.enter_context(ExitStack())  # after the watchdog is off
        alive = until_done.enter_context(watched(watchdog, folder))
        disk = on_disk(folder, recipe, program, parts, dataset, overwrite) if folder else nowhere()
        state, lines = disk.load(report.note)
        state, run = ready(state, lines, recipe, program, parts, dataset, report.note, need)
        further = opened(sinks, folder, recipe, lines, report.note)
        closing.callback(further.close)
        written = book(lambda line: (disk.append(line), further.write(line), report.line(line)), lines, recipe, run)
        with remedies.answered(need, report.note, "the run ended"):
            state = loop(state, recipe, run, written, disk, Outside(asked, alive, report.note))
        done = finished(state, written.lines, folder, program, parts, dataset, run)
        disk.finish(done.summary)
    return done


def _need(recipe: Recipe, parts: Parts, dataset: Dataset, program: Program, note: Callable[[str], None]) -> Need:
    """What the run needs, once it is known to fit without activations; `note` is told of idle devices."""
    need = remedies.need_of(recipe.plan, parts, partial(_again, recipe, parts, dataset), program.mesh)
    refuse(remedies.problems(need, note))
    if idle := mesh.idle(program.mesh):
        note(idle)
    if said := parts.settings.policy.note:
        note(f"precision={recipe.plan.precision}: {said}")
    return need


def _again(recipe: Recipe, parts: Parts, dataset: Dataset, plan: Plan) -> Parts:
    """The parts of the same run under another plan."""
    return assemble(replace(recipe, plan=plan), parts.inputs, parts.labels, dataset.classes)


def _place(recipe: Recipe, name: str, runs_dir: str, overwrite: bool) -> Path:
    """The folder of the run, if no other run holds it and this recipe may be trained there."""
    refuse_held(inside(runs_dir, name))
    return locate(recipe, name, runs_dir, overwrite)
