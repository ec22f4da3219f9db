"""The functions of the loop, compiled once, ahead of time."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxpar.core.recipe import Recipe
from jaxpar.core.types import Dataset, State
from jaxpar.report.bill import Bill, bill
from jaxpar.step.parts import Parts, learning_rate
from jaxpar.step.program import Program
from jaxpar.train.feed import checked


class Compiled(NamedTuple):
    """What the loop calls.

    Attributes:
        feed: `feed(step) -> batch`: the batch after `step` updates, checked and on the devices.
        step: `step(state, batch) -> (state, metrics)`; the state is donated.
        held_out: `held_out(state) -> nats`: mean over the labels of the held-out batches.
        rates: learning rate of each step.
        bill: bytes that each device sends in a step, predicted and compiled; None if nothing was compiled.
        seconds: that compiling took.
    """

    feed: Callable[[int], tuple]
    step: Callable[[State, tuple], tuple[State, dict]]
    held_out: Callable[[State], float]
    rates: np.ndarray
    bill: Bill | None
    seconds: float


def ready(
    state: State | None, recipe: Recipe, program: Program, parts: Parts, dataset: Dataset, note: Callable[[str], None]
) -> tuple[State, Compiled]:
    """The state to begin with, made if there is none, and all that is left to do, compiled.

    Args:
        state: of the last checkpoint, if there is one.
        recipe: for the numbers of steps and of held-out batches.
        program: what to compile: nothing, if all steps are done.
        parts: of the run.
        dataset: for the batches.
        note: is told how long it takes, since nothing else can be seen of it.
    """
    step, evaluate, sent, seconds = program.step, program.evaluate, None, 0.0
    rates = np.asarray(jax.jit(learning_rate(recipe))(np.arange(recipe.steps)))
    if state is None or state.step < recipe.steps:
        note("compiling the step ...")
        began = time.perf_counter()
        state = state or program.init()
        step = step.lower(program.shapes, program.batch).compile()
        evaluate = evaluate.lower(program.shapes.params, program.shapes.extra, program.batch).compile()
        seconds = time.perf_counter() - began
        note(f"compiled in {seconds:.1f} s")
        sent = bill(parts, step.as_text())

    def placed(batch, name: str):
        return program.place(checked(batch, parts, dataset, name))

    def held_out(state: State) -> float:
        count = min(recipe.evaluate_batches, dataset.held_out_batches)
        batches = (placed(dataset.held_out(i), f"held-out batch {i}") for i in range(count))
        found = jax.device_get([evaluate(state.params, state.extra, batch) for batch in batches])
        nats, labels = np.sum(found, axis=0, dtype=np.float64)
        return float(nats / max(labels, 1))

    def feed(step: int):
        return placed(dataset.batch(step), f"batch {step}")

    return state, Compiled(feed, step, held_out, rates, sent, seconds)
