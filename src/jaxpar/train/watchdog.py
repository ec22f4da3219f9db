"""A run that stands still is ended, with the reason on record, so that it can be started again."""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxpar.core.refuse import Problem

EXIT_CODE = 76
STACKS = "stacks.txt"
GRACE = 10  # times as long may pass before the first step, which is compiled first


def wrong_limit(seconds: float | None) -> list[Problem]:
    """One problem if a watchdog cannot wait so long."""
    if seconds is None or 0 < seconds < float("inf"):
        return []
    return [Problem("watchdog", seconds, "must be a number of seconds above 0.", "300, or no --watchdog")]


@contextmanager
def watchdog(seconds: float | None, folder: Path | None) -> Iterator[Callable[[], None]]:
    """While inside, end this process with exit code 76 when `alive` was not called for `seconds`.

    A device that waits for another holds its thread for ever, and Python with it: nothing milder than the end of the
    process helps. (Code that hangs and holds Python's own lock besides is not found.) The stacks of all threads go to
    stderr and to stacks.txt in the folder of the run.

    Args:
        seconds: longer than the longest step, evaluation batch or checkpoint; None for no watchdog.
        folder: of the run, or None.

    Returns:
        `alive()`: something was finished. Before its first call, `GRACE` times as long may pass.
    """
    if seconds is None:
        yield lambda: None
        return
    due, done = [time.monotonic() + GRACE * seconds], threading.Event()

    def watch():
        while (left := due[0] - time.monotonic()) > 0:
            if done.wait(min(left, seconds / 10)):
                return
        _end(seconds, folder)

    def alive():
        due[0] = time.monotonic() + seconds

    threading.Thread(target=watch, name="jaxpar watchdog", daemon=True).start()
    try:
        yield alive
    finally:
        done.set()


def _end(seconds: float, folder: Path | None) -> None:
    """Write down where every thread stands, and end the process at once: a clean end would wait for what is stuck."""
    told = f"watchdog: nothing was finished for {seconds:g} s, so the run was ended; the same command goes on from its "
    told += "last checkpoint. Where every thread stood:\n"
    with suppress(OSError):
        os.write(2, told.encode())  # sys.stderr may be locked by a thread that is stuck
        faulthandler.dump_traceback(2)
    if folder:
        with suppress(OSError), open(folder / STACKS, "w", encoding="utf-8") as stream:
            stream.write(told)
            stream.flush()
            faulthandler.dump_traceback(stream)
    os._exit(EXIT_CODE)
