"""The functions of the loop, compiled once, ahead of time."""

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import refuse
from jaxpar.core.types import Dataset, State
from jaxpar.report import chips, flops, remedies
from jaxpar.report.bill import Bill, bill
from jaxpar.report.remedies import Need
from jaxpar.step.parts import Parts
from jaxpar.step.program import Program
from jaxpar.step.rates import learning_rate
from jaxpar.train.feed import checked

RATES = 4096  # learning rates that are found at once


class Score(NamedTuple):
    """Means over the labels of held-out data.

    Attributes:
        nats: cross entropy.
        accuracy: share of labels whose logit is the largest; None where an example has many labels.
    """

    nats: float
    accuracy: float | None


class Compiled(NamedTuple):
    """What the loop calls.

    Attributes:
        feed: `feed(step) -> batch`: the batch after `step` updates, checked and on the devices.
        step: `step(state, batch) -> (state, metrics)`; the state is donated.
        held_out: `held_out(state, go_on) -> Score`, of the labels of all held-out batches; None if `go_on()`, asked
            before each, said no.
        held_out_batches: how many there are; with 0 nothing is evaluated.
        rate: `rate(step)`: learning rate of the step after `step` updates.
        speed: `speed(seconds) -> values`: what a step that took so long means for metrics.jsonl.
        model_flops: of one step, over all devices.
        peak: flops per second of all devices that `mfu` is reckoned against; None if nobody stated one.
        bill: bytes that each device sends in a step, predicted and compiled; None if nothing was compiled.
        seconds: that compiling took.
    """

    feed: Callable[[int], tuple]
    step: Callable[[State, tuple], tuple[State, dict]]
    held_out: Callable[[State, Callable[[], bool]], Score | None]
    held_out_batches: int
    rate: Callable[[int], float]
    speed: Callable[[float], dict]
    model_flops: float
    peak: float | None
    bill: Bill | None
    seconds: float


def ready(
    state: State | None,
    lines: list[dict],
    recipe: Recipe,
    program: Program,
    parts: Parts,
    dataset: Dataset,
    note: Callable[[str], None],
    need: Need,
) -> tuple[State, Compiled]:
    """The state to begin with, made if there is none, and all that is left to do, compiled.

    Args:
        state: of the last checkpoint, if there is one.
        lines: of metrics.jsonl up to there.
        recipe: for the numbers of steps and of held-out batches, and the stated peak.
        program: what to compile: nothing, if all steps and the last evaluation are done.
        parts: of the run.
        dataset: for the batches.
        note: is told how long it takes, since nothing else can be seen of it.
        need: the run as `remedies` has it, in case that it does not fit.

    Raises:
        Refused: if the compiled step asks for more memory than there is.
    """
    step, evaluate, sent, seconds = program.step, program.evaluate, None, 0.0
    done = any(line["step"] == recipe.steps and "held_out_loss" in line for line in lines[-2:])
    if state is None or state.step < recipe.steps or not (done or dataset.held_out_batches == 0):
        note("compiling the step ...")
        began = time.perf_counter()
        with remedies.answered(need, note):
            step = step.lower(program.shapes, program.batch).compile()
            refuse(remedies.of_compiled(need, step, note))
            evaluate = evaluate.lower(program.shapes.params, program.shapes.extra, program.batch).compile()
            state = state or program.init()
        seconds = time.perf_counter() - began
        note(f"compiled in {seconds:.1f} s")
        sent = bill(parts, step.as_text())

    def placed(batch, name: str):
        return program.place(checked(batch, parts, dataset, name))

    count = min(recipe.evaluate_batches, dataset.held_out_batches)
    work, peak = flops.of_model(parts), _peak(recipe, program)
    return state, Compiled(
        feed=lambda step: placed(dataset.batch(step), f"batch {step}"),
        step=step,
        held_out=_held_out(
            evaluate, lambda i: placed(dataset.held_out(i), f"held-out batch {i}"), count, len(parts.labels.shape) == 1
        ),
        held_out_batches=count,
        rate=_rate(recipe),
        speed=speed_of(parts.labels.shape, work, peak),
        model_flops=work,
        peak=peak,
        bill=sent,
        seconds=seconds,
    )


def speed_of(labels: tuple[int, ...], work: float, peak: float | None) -> Callable[[float], dict]:
    """`Compiled.speed`, for labels of this shape, model flops per step and peak flops per second of all devices.

    Tokens are counted where each example is a sequence of labels, else examples, of which each pixel may have one.
    """
    text = len(labels) == 2
    unit, count = "tokens_per_second" if text else "examples_per_second", math.prod(labels[: 1 + text])

    def speed(seconds: float) -> dict:
        known = {"mfu": float(f"{work / seconds / peak:.4g}")} if peak else {}
        return {unit: round(count / seconds, 1)} | known

    return speed


def _held_out(evaluate: Callable, batch: Callable[[int], tuple], count: int, classifies: bool) -> Callable:
    """`Compiled.held_out`: one batch is placed while the one before it runs."""

    def held_out(state: State, go_on: Callable[[], bool]) -> Score | None:
        total, waiting = np.zeros(3), []
        for i in range(count + 1):
            if not go_on():
                return None
            if i < count:
                waiting.append(evaluate(state.params, state.extra, batch(i)))
            if len(waiting) > 1 or i == count:
                total += [float(value) for value in jax.device_get(waiting.pop(0))]
        nats, labels, right = total
        return Score(float(nats / max(labels, 1)), float(right / max(labels, 1)) if classifies else None)

    return held_out


def _rate(recipe: Recipe) -> Callable[[int], float]:
    """`Compiled.rate`: found for many steps at once, so that it does not wait for the devices at each."""
    schedule = jax.jit(learning_rate(recipe))

    @functools.lru_cache(maxsize=1)
    def block(number: int) -> np.ndarray:
        return np.asarray(schedule(number * RATES + np.arange(RATES)))

    return lambda step: float(block(step // RATES)[step % RATES])


def _peak(recipe: Recipe, program: Program) -> float | None:
    """Of all devices together: as stated in the recipe, else as the maker of the chip states it."""
    device, count = program.mesh.devices.flat[0], program.mesh.devices.size
    one = recipe.peak_tflops * 1e12 if recipe.peak_tflops else chips.peak(device.device_kind)
    return one * count if one else None
