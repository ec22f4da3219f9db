"""What a run measures, one line per step, without making the devices wait for it."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxpar.train.ahead import Compiled


class NonFinite(ArithmeticError):
    """The loss or the gradients are no longer numbers."""

    exit_code = 78


class Book(NamedTuple):
    """The lines of metrics.jsonl as they come.

    Attributes:
        step: `step(number, found, began, fed)`: the step was sent off; `found` is still on the devices. Times are of
            `time.perf_counter`: before its batch was made, and after that was on the devices.
        settle: wait for all steps that were sent off and write them down.
        held_out: `held_out(number, nats)`: the loss on held-out data after `number` steps.
        lines: all that is written so far, also before this run resumed.
    """

    step: Callable
    settle: Callable
    held_out: Callable
    lines: list[dict]


def book(write: Callable[[dict], None], lines: list[dict], labels: tuple[int, ...], run: Compiled) -> Book:
    """An open book.

    A step is written down while the next one runs: fetching its loss at once would leave the devices idle between two
    steps.

    Args:
        write: takes each new line.
        lines: those of earlier parts of the run.
        labels: shape of the labels of a batch: tokens are counted where each example has many, else examples.
        run: for the learning rates, and the seconds of compiling, which are on the first new line.
    """
    unit = "tokens_per_second" if len(labels) > 1 else "examples_per_second"
    count, waiting, lines = math.prod(labels), [], list(lines)
    ended, once = -math.inf, {"compile_s": round(run.seconds, 3)}

    def put(line: dict) -> None:
        lines.append(line)
        write(line)

    def finish(number: int, found, began: float, fed: float) -> None:
        nonlocal ended, once
        values = {name: float(value) for name, value in jax.device_get(found).items()}  # waits for that step
        seconds = -max(began, ended) + (ended := time.perf_counter())
        line = {"step": number, "loss": values["loss"]} | _finite(values, f"step {number}")
        line |= {"learning_rate": float(f"{run.rates[number - 1]:.6g}"), unit: round(count / seconds, 1)}
        line |= {"step_ms": round(seconds * 1e3, 3), "data_ms": round((fed - began) * 1e3, 3)}
        put(line | once)
        once = {}

    def step(number: int, found, began: float, fed: float) -> None:
        waiting.append((number, found, began, fed))
        if len(waiting) > 1:
            finish(*waiting.pop(0))

    def settle() -> None:
        while waiting:
            finish(*waiting.pop(0))

    def held_out(number: int, nats: float) -> None:
        settle()
        put({"step": number} | _finite({"held_out_loss": nats}, f"step {number}"))

    return Book(step, settle, held_out, lines)


def _finite(values: dict[str, float], where: str) -> dict[str, float]:
    if wrong := [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]:
        raise NonFinite(
            f"{where}: {', '.join(wrong)}. The run was stopped, and nothing was saved since its last checkpoint. "
            "Try a lower learning_rate, a longer warmup or clip, or precision=fp32."
        )
    return values
