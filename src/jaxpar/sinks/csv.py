"""Metrics as a table: metrics.csv in the folder of the run."""

import os
from csv import DictReader, DictWriter
from pathlib import Path

from jaxpar.core.types import Sink


def csv(folder: Path, recipe: dict, lines: list[dict]) -> Sink:
    """One row per line, one column per name, in the order in which they first came; a cell may be empty.

    Args:
        folder: of the run.
        recipe: is not written.
        lines: those before the checkpoint from which the run goes on; the file begins anew with them.
    """
    path = folder / "metrics.csv"
    columns: list[str] = []

    def rewrite(rows) -> None:
        """All rows under the columns that there are now: whole, or not at all."""
        part = path.with_name(f"{path.name}.part")
        with open(part, "w", encoding="utf-8", newline="") as stream:
            table = DictWriter(stream, columns)
            table.writeheader()
            table.writerows(rows)
        os.replace(part, path)

    def rows():
        with open(path, encoding="utf-8", newline="") as stream:
            yield from DictReader(stream)

    def write(line: dict) -> None:
        if new := [name for name in line if name not in columns]:
            columns.extend(new)
            rewrite([*rows(), line])  # seldom: the first step, the first evaluation
            return
        with open(path, "a", encoding="utf-8", newline="") as stream:
            DictWriter(stream, columns).writerow(line)

    columns.extend(dict.fromkeys(name for line in lines for name in line))
    rewrite(lines)
    return Sink(write, lambda: None)
