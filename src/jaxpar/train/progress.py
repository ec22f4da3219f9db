"""How far a run is: a live bar in a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LINES = 10  # of a whole run, where there is no terminal


class Report(NamedTuple):
    """Who is told how a run goes.

    Attributes:
        note: `note(text)`: something that happened, in one line.
        line: `line(values)`: one line of metrics.jsonl.
        close: `close()`: the run is over, well or not.
    """

    note: Callable[[str], None]
    line: Callable[[dict], None]
    close: Callable[[], None]


def quiet() -> Report:
    """Tells nobody."""
    return Report(lambda text: None, lambda values: None, lambda: None)


def progress(steps: int, stream: TextIO | None = None) -> Report:
    """A bar if `stream` is a terminal that can redraw a line, else about `LINES` plain lines.

    Args:
        steps: of the whole run.
        stream: by default stderr, so that stdout holds results only; in a notebook stdout, since it shows stderr as
            if something had failed.
    """
    notebook = "ipykernel" in sys.modules
    stream = stream or (sys.stdout if notebook else sys.stderr)
    live = stream.isatty() and not notebook and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    return bar(steps, stream) if live else plain(steps, stream)


def plain(steps: int, stream: TextIO) -> Report:
    """Lines of text: the first step, about `LINES` more, and every evaluation."""
    left, every = _clock(steps), max(1, steps // LINES)
    first = []

    def note(text: str) -> None:
        print(text, file=stream, flush=True)

    def line(values: dict) -> None:
        remaining, step = left(values["step"]), values["step"]
        if "held_out_loss" in values or step % every == 0 or step == steps or not first:
            first.append(step)
            more = f"  {remaining} left" if remaining and step < steps and "loss" in values else ""
            note(f"step {step}/{steps}  {_told(values)}{more}")

    return Report(note, line, lambda: None)


def bar(steps: int, stream: TextIO) -> Report:
    """One line that is drawn again and again, and notes above it."""
    left = _clock(steps)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}")
    display = Progress(*columns, console=Console(file=stream), refresh_per_second=8)
    task = display.add_task("step", total=steps, told="")
    display.start()

    def note(text: str) -> None:
        display.console.print(text, markup=False, highlight=False)

    def line(values: dict) -> None:
        if "held_out_loss" in values:
            note(f"step {values['step']}/{steps}  {_told(values)}")
        else:
            remaining = left(values["step"])
            told = f"{_told(values)}  {remaining} left" if remaining else _told(values)
            display.update(task, completed=values["step"], told=told)

    return Report(note, line, display.stop)


def _told(values: dict) -> str:
    if "held_out_loss" in values:
        return f"held-out loss {values['held_out_loss']:.4f} nats"
    rates = [f"{values[name]:,.0f} {unit}/s" for name, unit in _RATES.items() if name in values]
    return "  ".join([f"loss {values['loss']:.4f} nats", *rates])


_RATES = {"tokens_per_second": "tokens", "examples_per_second": "examples"}


def _clock(steps: int) -> Callable[[int], str]:
    """`left(step)`: the time until the last step as "1:05", from the second one that was seen on; before, nothing."""
    seen = []

    def left(step: int) -> str:
        now = time.perf_counter()
        if not seen:
            seen.append((step, now))
        first, began = seen[0]
        if step == first:
            return ""
        seconds = round((now - began) / (step - first) * (steps - step))
        hours, seconds = divmod(seconds, 3600)
        return f"{hours}:{seconds // 60:02}:{seconds % 60:02}" if hours else f"{seconds // 60}:{seconds % 60:02}"

    return left
