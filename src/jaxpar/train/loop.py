"""The loop: feed, step, write down; now and then evaluate and save."""

from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import NamedTuple

from jaxpar.core.recipe import Recipe
from jaxpar.core.types import State
from jaxpar.train.ahead import Compiled
from jaxpar.train.metrics import Book
from jaxpar.train.stop import Interrupted, NonFinite, NotSaved
from jaxpar.train.store import Store


class Outside(NamedTuple):
    """Who may stop a run, and who is told of it.

    Attributes:
        asked: `asked()`: whether the run was asked to stop.
        alive: `alive()`: something was finished.
        note: `note(text)`: something that happened, in one line.
    """

    asked: Callable[[], bool]
    alive: Callable[[], None]
    note: Callable[[str], None]


def loop(state: State, recipe: Recipe, run: Compiled, written: Book, disk: Store, outside: Outside) -> State:
    """All steps that are left.

    Whether the run was asked to stop is looked at after compiling, each step, each batch of an evaluation and each
    checkpoint. It then stops with everything saved; an evaluation that was cut short is made when the run resumes.

    Args:
        state: of a checkpoint, or fresh.
        recipe: for when to evaluate and to save.
        run: what is called.
        written: where steps are written down.
        disk: where the state is saved.
        outside: who may stop the run.

    Raises:
        Interrupted: if it was asked to stop, with everything saved.
        NonFinite, NotSaved: as they say.
        Exception: what a batch or a step raised, after an attempt to save the steps before it.
    """
    number = saved = int(state.step)
    try:
        while True:
            stop = outside.asked() and number > 0  # a fresh run has nothing to save before its first step
            if not stop and _evaluates(number, recipe, run, written):
                stop = not _evaluated(number, state, run, written, outside)
            if number > saved and (stop or _due(number, recipe.checkpoint_every, recipe.steps)):
                written.settle()
                disk.save(state)
                saved = number
                outside.alive()
                stop = stop or outside.asked()
            if number == recipe.steps and not stop:
                written.settle()
                return state
            if stop:
                raise Interrupted(f"stopped after step {number} of {recipe.steps}; the same command goes on from there")
            began = perf_counter()
            batch = run.feed(number)
            fed = perf_counter()
            state, found = run.step(state, batch)
            number += 1
            written.step(number, found, began, fed)
            outside.alive()
    except (Interrupted, NonFinite, NotSaved):
        raise
    except Exception:
        if number > saved:
            _save_if_possible(number, state, written, disk, outside)
        raise


def _evaluates(number: int, recipe: Recipe, run: Compiled, written: Book) -> bool:
    """Whether an evaluation is due after `number` steps and was not made before the run resumed there."""
    if not (number and run.held_out_batches and _due(number, recipe.evaluate_every, recipe.steps)):
        return False
    return not any(line["step"] == number and "held_out_loss" in line for line in written.lines[-2:])


def _evaluated(number: int, state: State, run: Compiled, written: Book, outside: Outside) -> bool:
    """Evaluate and write it down; False if that was cut short."""

    def go_on() -> bool:
        outside.alive()
        return not outside.asked()

    written.settle()
    began = perf_counter()
    score = run.held_out(state, go_on)
    if score is not None:
        written.held_out(number, score, perf_counter() - began)
    return score is not None


def _save_if_possible(number: int, state: State, written: Book, disk: Store, outside: Outside) -> None:
    """After an error: the steps before it are done, unless it was one of them that failed."""
    with suppress(Exception):
        written.settle()
    try:
        disk.save(state)
    except Exception as error:
        outside.note(f"the steps since the last checkpoint could not be saved: {type(error).__name__}")
    else:
        outside.note(f"the {number} steps before this error are saved")


def _due(number: int, every: int, last: int) -> bool:
    return number == last or bool(every and number % every == 0)
