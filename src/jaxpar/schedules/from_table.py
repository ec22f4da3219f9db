"""An order of your own, from a CSV file with a row per device: `from_table:path/to/table.csv`."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from jaxpar.core.cells import FIELD, KINDS, SHOWN, Cell, Order
from jaxpar.core.refuse import Problem, Refused, refuse

CELL = re.compile(f"([0-9]{{1,6}})?([{''.join(KINDS)}])([0-9]{{1,6}})")
FORM = "F0, B0 or W0 with the number of the microbatch, 2F0 with that of the stage before it, or nothing where idle"
Table = str | Path | Sequence[Sequence[str]]


def from_table(stages: int, microbatches: int, chunks: int = 1, table: Table = "") -> Order:
    """The order that a table gives: row d says what device d does, from left to right.

    A cell is `F0` (forward of microbatch 0), `B3` (its gradient) or `W2` (gradient of weights) of the stage with the
    number of the row; `4F0` is of stage 4, which then lies on that device. `.` or nothing is idle time, for the reader
    alone: a device starts each cell as soon as it can.

    Args:
        stages: devices on the pipeline axis; rows of the table.
        microbatches: parts of a batch; the table says them too, and must agree.
        chunks: stages per device.
        table: path of a CSV file, or rows of cells.

    Raises:
        Refused: for a file that is none, a cell that cannot be read, a stage on two devices or on none.
    """
    rows = _read(table) if isinstance(table, str | Path) else table
    cells = [[_cell(text, row, column) for column, text in enumerate(line)] for row, line in enumerate(rows)]
    refuse([cell for line in cells for cell in line if isinstance(cell, Problem)][:SHOWN])
    work = tuple(tuple(cell for cell in line if cell) for line in cells)
    if len(work) != stages:
        raise Refused(
            [Problem("plan.pipe", stages, f"the table has {len(work)} rows, one per device.", f"{len(work)}")]
        )
    return Order(_place(work, stages * chunks), work)


def _read(path: str | Path) -> list[list[str]]:
    """The lines of a CSV file; blank ones at its end do not count."""
    if not Path(path).is_file():
        rule = "there is no such file." if path else "needs the path of a table."
        raise Refused([Problem(FIELD, f"from_table:{path}", rule, "from_table:path/to/table.csv")])
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Refused([Problem(FIELD, f"from_table:{path}", f"cannot be read: {error}.", "a CSV file")]) from error
    while rows and not any(text.strip() for text in rows[-1]):
        rows.pop()
    return rows


def _cell(text: str, row: int, column: int) -> Cell | Problem | None:
    word = str(text).strip()
    if word in ("", "."):
        return None
    found = CELL.fullmatch(word)
    if not found:
        return Problem(FIELD, f"row {row}, column {column}, {word[:20]!r}", "is no cell.", FORM)
    stage, kind, microbatch = found.groups()
    return Cell(kind, row if stage is None else int(stage), int(microbatch))


def _place(work: Sequence[Sequence[Cell]], stages: int) -> tuple[int, ...]:
    """The device of each stage: the row where it stands."""
    place, problems = {}, []
    for device, row in enumerate(work):
        for number, cell in enumerate(row):
            where = f"device {device}, cell {number + 1}, {cell}"
            if cell.stage >= stages:
                rule = f"there are {stages} stages: plan.pipe times plan.chunks."
                problems.append(Problem(FIELD, where, rule, f"0 to {stages - 1}"))
            elif place.setdefault(cell.stage, device) != device:
                rule = f"stage {cell.stage} lies on device {place[cell.stage]} already."
                problems.append(Problem(FIELD, where, rule, "every stage in one row"))
    for stage in range(stages):
        if stage not in place and not problems:
            problems.append(
                Problem(FIELD, f"stage {stage}", "stands in no row.", f"stages 0 to {stages - 1}, each in one")
            )
    refuse(problems[:SHOWN])
    return tuple(place[stage] for stage in range(stages))
