"""What a run measures, one line per step, without making the devices wait for it."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxpar.core.recipe import Recipe
from jaxpar.train.ahead import Compiled, Score
from jaxpar.train.stop import NonFinite


class Book(NamedTuple):
    """The lines of metrics.jsonl as they come.

    Attributes:
        step: `step(number, found, began, fed)`: the step was sent off; `found` is still on the devices. Times are of
            `time.perf_counter`: before its batch was made, and after that was on the devices.
        settle: wait for all steps that were sent off and write them down.
        held_out: `held_out(number, score, seconds)`: the loss on held-out data after `number` steps, with the accuracy
            of a classifier, and what finding them took.
        lines: all that is written so far, also before this run resumed.
    """

    step: Callable
    settle: Callable
    held_out: Callable
    lines: list[dict]


def book(write: Callable[[dict], None], lines: list[dict], recipe: Recipe, run: Compiled) -> Book:
    """An open book.

    A step is written down while the next one runs: fetching its loss at once would leave the devices idle between two
    steps. A step whose loss or gradients were no numbers has changed nothing (`step/update.py`); its line has null for
    them, under `skipped` how many there were in a row, and under `skipped_total` how many in all.

    Where gradients are scaled each line has the `loss_scale` of its step. One that was skipped for gradients alone, and
    for which a scale above 1 fell, has `lowered`: it is not counted against `skip_limit`, since a scale that is too
    large, as the first one may well be, is found by trying. That ends by itself, as the scale falls each time.

    Args:
        write: takes each new line.
        lines: those of earlier parts of the run.
        recipe: for `skip_limit`.
        run: for the learning rates, what a step does, and the seconds of compiling, which are on the first new line.

    Raises:
        NonFinite: by `step` or `settle`, after `recipe.skip_limit` steps in a row that changed nothing and count.
    """
    waiting, lines = [], list(lines)
    ended, once = -math.inf, {"compile_s": round(run.seconds, 3)}
    lost = sum("skipped" in line for line in lines)  # updates that the schedule has not seen
    skipped, counted = _in_a_row(lines)

    def put(line: dict) -> None:
        lines.append(line)
        write(line)

    def finish(number: int, found, began: float, fed: float) -> None:
        nonlocal ended, once, skipped, counted, lost
        values = {name: float(value) for name, value in jax.device_get(found).items()}  # waits for that step
        seconds = -max(began, ended) + (ended := time.perf_counter())
        skipped, lowered = skipped + 1 if values.pop("skipped") else 0, bool(values.pop("lowered", 0))
        counted = counted + (not lowered) if skipped else 0
        line = {"step": number} | {name: _or_null(value) for name, value in values.items()}
        line |= {"skipped": skipped, "skipped_total": lost + 1} if skipped else {}
        line |= {"lowered": True} if lowered else {}
        line |= {"learning_rate": float(f"{run.rate(number - 1 - lost):.6g}")} | run.speed(seconds)
        line |= {"step_ms": round(seconds * 1e3, 3), "data_ms": round((fed - began) * 1e3, 3)}
        put(line | once)
        once, lost = {}, lost + bool(skipped)
        if counted >= recipe.skip_limit and not lowered:
            raise NonFinite(_told(number, values, skipped))

    def step(number: int, found, began: float, fed: float) -> None:
        waiting.append((number, found, began, fed))
        if len(waiting) > 1:
            finish(*waiting.pop(0))

    def settle() -> None:
        while waiting:
            finish(*waiting.pop(0))

    def held_out(number: int, score: Score, seconds: float) -> None:
        settle()
        right = {} if score.accuracy is None else {"held_out_accuracy": round(score.accuracy, 6)}
        put({"step": number, "held_out_loss": _or_null(score.nats)} | right | {"evaluate_s": round(seconds, 3)})

    return Book(step, settle, held_out, lines)


def _in_a_row(lines: list[dict]) -> tuple[int, int]:
    """How many steps were skipped in a row up to the last one, and how many of them count."""
    skipped = counted = 0
    for line in reversed([line for line in lines if "loss" in line]):
        if "skipped" not in line:
            break
        skipped, counted = skipped + 1, counted + ("lowered" not in line)
    return skipped, counted


def _or_null(value: float) -> float | None:
    """JSON has no word for what is no number."""
    return value if math.isfinite(value) else None


def _told(number: int, values: dict[str, float], skipped: int) -> str:
    wrong = ", ".join(f"{name} = {value}" for name, value in values.items() if not math.isfinite(value))
    wrong += f" under loss_scale = {values['loss_scale']:g}" if "loss_scale" in values else ""
    return (
        f"step {number}: {wrong}. That was update {skipped} in a row that was skipped for it, so the run was stopped. "
        "Look at the data of these steps; try a lower learning_rate, a longer warmup, a smaller clip, precision=fp32, "
        "or a larger skip_limit."
    )
