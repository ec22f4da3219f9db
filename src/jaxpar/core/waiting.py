"""What takes long before a run has begun says so on stderr: how far it is, and how long it will still take."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress

FIRST_S, EVERY_S = 2.0, 30.0  # until the first line, and between two at most; what is done sooner says nothing


def note(text: str) -> None:
    """One line on stderr; whoever reads may have gone."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def waiting(what: str, total: int, unit: str, clock: Callable[[], float] = time.monotonic) -> Callable[[int], None]:
    """`done(count)`, to be called as work goes on, tells now and then how many of `total` are done.

    Lines come after 2, 4, 8, 16, 32 seconds, and then every 30.

    Args:
        what: is done, such as `decoding cifar10`.
        total: how many there are.
        unit: what they are, in the plural.
        clock: seconds.
    """
    began, due = clock(), FIRST_S

    def done(count: int) -> None:
        nonlocal due
        gone = clock() - began
        if gone >= due and 0 < count <= total:
            due = gone + min(gone, EVERY_S)
            left = round(gone / count * (total - count))
            note(f"{what}: {count:,} of {total:,} {unit}, about {left // 60}:{left % 60:02} left")

    return done
