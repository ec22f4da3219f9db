"""How far a run is: a live bar in a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
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


def unfailing(report: Report) -> Report:
    """The same, but it never raises: whoever reads may have gone, and a run is worth more than its progress."""

    def quietly(tell: Callable) -> Callable:
        def told(*what) -> None:
            with suppress(OSError, ValueError):  # a broken pipe, a full disk, a stream that was closed
                tell(*what)

        return told

    return Report(*map(quietly, report))


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
    left, told, every = _clock(steps), _teller(), max(1, steps // LINES)
    first = []

    def note(text: str) -> None:
        print(text, file=stream, flush=True)

    def line(values: dict) -> None:
        remaining, words, step = left(values["step"]), told(values), values["step"]
        if "held_out_loss" in values or "skipped" in values or step % every == 0 or step == steps or not first:
            first.append(step)
            more = f"  {remaining} left" if remaining and step < steps and "loss" in values else ""
            note(f"step {step}/{steps}  {words}{more}")

    return Report(note, line, lambda: None)


def bar(steps: int, stream: TextIO) -> Report:
    """One line that is drawn again and again, and notes above it."""
    left, told = _clock(steps), _teller()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}")
    display = Progress(*columns, console=Console(file=stream), refresh_per_second=8)
    task = display.add_task("step", total=steps, told="")
    display.start()

    def note(text: str) -> None:
        display.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def line(values: dict) -> None:
        remaining, words = left(values["step"]), told(values)
        if "held_out_loss" in values:
            note(f"step {values['step']}/{steps}  {words}")
        else:
            display.update(task, completed=values["step"], told=f"{words}  {remaining} left" if remaining else words)

    return Report(note, line, display.stop)


def _teller() -> Callable[[dict], str]:
    """`told(values)`: a line in words; its speed is the mean over about the last ten steps, since single ones jump."""
    seconds = {}  # per token or example

    def told(values: dict) -> str:
        if "held_out_loss" in values:
            share = values.get("held_out_accuracy")
            right = "" if share is None else f"  {share:.1%} right"
            return f"held-out loss {_nats(values['held_out_loss'])}{right}"
        words = [f"loss {_nats(values['loss'])}" + (", update skipped" if "skipped" in values else "")]
        for unit in ("tokens", "examples"):
            if rate := values.get(f"{unit}_per_second"):
                seconds[unit] = 0.9 * seconds.get(unit, 1 / rate) + 0.1 / rate
                words.append(f"{1 / seconds[unit]:,.0f} {unit}/s")
        if "mfu" in values:
            words.append(f"MFU {values['mfu']:.1%}")
        return "  ".join(words)

    return told


def _nats(value: float | None) -> str:
    return "is no number" if value is None else f"{value:.4f} nats"


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
