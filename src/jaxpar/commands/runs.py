"""List runs, or compare some: recipes, losses and a picture.

python -m jaxpar runs
python -m jaxpar runs square cube --png compare.png
python -m jaxpar runs small large --loss 2.5
"""

import dataclasses
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from jaxpar import cli
from jaxpar.core.refuse import Problem, Refused
from jaxpar.report.columns import aligned
from jaxpar.train import folder, record
from jaxpar.train.record import Record

NUMBERS = ("steps", "loss, nats", "held out", "speed")
COLUMNS = ("run", "status", "model", "plan", *NUMBERS, "last change")


def runs(argv: Sequence[str]) -> None:
    """Print a table of runs; of those that are named also how they differ, and draw their losses.

    Raises:
        Refused: if a run that is named is none, or the picture cannot be written.
    """
    cli.flags(_listed, argv, __doc__)


def _listed(
    names: Positional[Annotated[tuple[str, ...], arg(metavar="RUN", help="names in --runs-dir, or paths.")]] = (),
    runs_dir: Annotated[str, arg(help="folder of all runs.")] = "runs",
    png: Annotated[
        str | None, arg(help="file for the losses; by default RUNS-DIR/compare.png if runs are named.")
    ] = None,
    loss: Annotated[
        float | None, arg(help="also which run was there first: steps to this training loss times time per step.")
    ] = None,
) -> None:
    if loss is not None and not 0 < loss < float("inf"):
        raise Refused([Problem("loss", loss, "is no loss.", "a number of nats above 0")])
    if names:
        found, broken = [record.record(record.find(name, runs_dir)) for name in dict.fromkeys(names)], []
    else:
        found, broken = _all(runs_dir)
    if not found and not broken:
        print(f"no runs in {runs_dir}; python -m jaxpar train makes one")
        return
    if found:
        print(aligned(COLUMNS, [_row(one) for one in found], right=NUMBERS))
    print("".join(f"{line}\n" for line in broken), end="")
    if len(names) > 1:
        print("", _differences(found), sep="\n")
    if found and loss is not None:
        print("", _efficiency(found, loss, Path(os.path.expanduser(runs_dir)) / "efficiency.png"), sep="\n")
    if found and (names or png):
        print(
            "", f"picture: {_picture(found, Path(os.path.expanduser(png or Path(runs_dir) / 'compare.png')))}", sep="\n"
        )


def _all(runs_dir: str) -> tuple[list[Record], list[str]]:
    """The runs in a folder, and a line for each that cannot be read."""
    found, broken = [], []
    for path in record.folders(runs_dir):
        try:
            found.append(record.record(path))
        except Refused as refused:
            broken.append(f"{path.name}: {refused.problems[0].rule}")
        except OSError as error:
            broken.append(f"{path.name}: cannot be read: {error.strerror or error}.")
    return found, broken


def _row(one: Record) -> tuple[str, ...]:
    training, held_out = (f"{pairs[-1][1]:.4f}" if pairs else "-" for pairs in record.losses(one.lines))
    speed = _speed(one.lines)
    what, steps = one.recipe, f"{one.step}/{one.recipe.steps}"
    name = f"{what.model.name} on {what.data.name}"
    return (
        one.folder.name,
        one.status,
        name,
        str(what.plan),
        steps,
        training,
        held_out,
        speed,
        f"{one.when:%Y-%m-%d %H:%M}",
    )


def _speed(lines: list[dict]) -> str:
    """The median, of tokens or, where there are none, of examples."""
    for unit in ("tokens", "examples"):
        if speeds := [line[f"{unit}_per_second"] for line in lines if f"{unit}_per_second" in line]:
            return f"{statistics.median(speeds):,.0f} {unit}/s"
    return "-"


def _differences(found: list[Record]) -> str:
    """The fields of the recipes that are not the same in all, a column per run."""
    flat = [folder.flat(dataclasses.asdict(one.recipe) | {"plan": str(one.recipe.plan)}) for one in found]
    rows = [[field, *(str(fields[field]) for fields in flat)] for field in flat[0]]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return (
        aligned(("field", *(one.folder.name for one in found)), rows)
        if rows
        else "all fields of their recipes are equal"
    )


def _efficiency(found: list[Record], level: float, path: Path) -> str:
    """Steps to a loss and time per step of each run, and a picture if any got there."""
    from jaxpar.report import efficiency

    timed = {one.folder.name: [line["step_ms"] / 1e3 for line in one.lines if "step_ms" in line] for one in found}
    known = {
        one.folder.name: efficiency.reached(record.losses(one.lines)[0], timed[one.folder.name], level)
        for one in found
        if timed[one.folder.name]
    }
    without = [one.folder.name for one in found if one.folder.name not in known]
    said = "\n".join([*([efficiency.text(known)] if known else []), *(f"{name}: no timed steps" for name in without)])
    if not any(one.seconds for one in known.values()):
        return said
    try:
        return f"{said}\npicture: {efficiency.picture(path, known, level)}"
    except OSError as error:
        raise Refused([Problem("runs_dir", path, f"cannot be written: {error}.", "another --runs-dir")]) from error


def _picture(found: list[Record], path: Path) -> Path:
    from jaxpar.report.pictures import runs_picture

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return runs_picture(path, {one.folder.name: record.losses(one.lines) for one in found})
    except (OSError, ValueError) as error:
        raise Refused([Problem("png", path, f"cannot be written: {error}.", "a file that ends in .png")]) from error
