"""Further places for metrics, which never stop a run and never make it wait."""

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from jaxpar.core import family
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Problem, Refused, near_miss, refuse
from jaxpar.core.types import Sink

BEHIND = 10_000  # lines that a sink may be behind before it is given up
CLOSE_S = 20  # for all that is left to write at the end


def wrong(names: Sequence[str], run: str | None) -> Iterator[Problem]:
    """Names that are no sink's, or any if `run` has no name and so no folder."""
    known = family.names("sinks")
    if names and run is None:
        rule = "lie in the folder of the run, and this run has none."
        yield Problem("sinks", ", ".join(names), rule, "fit(..., name=...), or no sinks")
    for name in names:
        if name not in known and ".py:" not in name:
            yield Problem("sinks", name, "there is no such file in sinks/.", near_miss(name, known))


def opened(
    names: Sequence[str], folder: Path | None, recipe: Recipe, lines: Sequence[dict], note: Callable[[str], None]
) -> Sink:
    """One sink that hands each line on to all that are named.

    Each works in a thread of its own. One that raises, cannot be imported, falls far behind or does not end is dropped
    with one warning.

    Args:
        names: members of sinks/, or path/to/file.py:name.
        folder: of the run; None for a run that is kept nowhere.
        recipe: of the run.
        lines: of metrics.jsonl up to the checkpoint from which the run goes on.
        note: is told each warning.

    Raises:
        Refused: for a name that is no sink's, or any name without a folder, before any is opened.
    """
    refuse(wrong(names, folder and folder.name))
    given = folder, json.loads(recipe.to_json()), [dict(line) for line in lines]
    members = [(name, _picked(name, note)) for name in dict.fromkeys(names)]
    sinks = [_alone(name, member, given, note) for name, member in members if member]

    def write(line: dict) -> None:
        for sink in sinks:
            sink.write(dict(line))

    def close() -> None:
        for sink in sinks:
            sink.close()

    return Sink(write, close)


def _picked(name: str, note: Callable[[str], None]) -> Callable | None:
    """The sink of that name; None, and a warning, if what it needs is not installed."""
    try:
        return family.pick("sinks", name, "sinks")
    except Refused:
        raise
    except ModuleNotFoundError as error:
        note(f"warning: no metrics for {name}: {error.name} is not installed; pip install {error.name}")
    except Exception as error:
        note(f"warning: no metrics for {name}: it cannot be imported: {_told(error)}")
    return None


def _alone(name: str, member: Callable, given: tuple, note: Callable[[str], None]) -> Sink:
    """A sink in a thread of its own; its warnings come from the thread of the run, one at most."""
    waiting, failed, dropped = queue.Queue(BEHIND), [], []

    def work() -> None:
        sink = None
        try:
            sink = member(*given)
            while (line := waiting.get()) is not None:
                sink.write(line)
            sink.close()
        except BaseException as error:
            failed.append(_told(error))
            with suppress(BaseException):
                sink.close()

    def drop(why: str) -> None:
        dropped.append(why)
        note(f"warning: no more metrics for {name}: {why}; the run goes on")

    def put(line: dict | None) -> None:
        if failed and not dropped:
            drop(failed[0])
        if dropped:
            return
        try:
            waiting.put_nowait(line)
        except queue.Full:
            drop(f"it is {BEHIND:,} lines behind")

    def close() -> None:
        put(None)
        if not dropped:
            thread.join(CLOSE_S)
            if thread.is_alive():
                drop(f"it did not end within {CLOSE_S} s")
            elif failed:
                drop(failed[0])

    thread = threading.Thread(target=work, name=f"sink {name}", daemon=True)
    thread.start()
    return Sink(put, close)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(": ")
