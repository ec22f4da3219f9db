"""Why a run ends before its last step, and how it is asked to: one exception and exit code for each reason."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A run was asked to stop, and has saved what it had."""

    exit_code = 77


class NonFinite(ArithmeticError):
    """Losses or gradients are no longer numbers."""

    exit_code = 78


class NotSaved(RuntimeError):
    """A run could not write what it must keep; what it had written before is untouched."""

    exit_code = 1


@contextmanager
def stoppable(note: Callable[[str], None], wanted: bool) -> Iterator[Callable[[], bool]]:
    """While inside, the first Ctrl-C or SIGTERM only sets a flag; the second raises `KeyboardInterrupt` at once.

    Handlers are Python's own and its main thread's, so elsewhere nothing is installed; what was there is put back.

    Args:
        note: is told, in one line, what will happen.
        wanted: whether to install the handlers; a run that saves nothing is better stopped at once.

    Returns:
        `asked()`: whether the run was asked to stop.
    """
    seen = []

    def handler(number, frame):
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt
        with suppress(RuntimeError, OSError, ValueError):  # amid another line, or nobody reads any more
            note(f"{signal.Signals(number).name}: finishing the step and saving; once more to stop at once")

    if not (wanted and threading.current_thread() is threading.main_thread()):
        yield lambda: False
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield lambda: bool(seen)
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
