"""Files of the datasets: list, get, or verify every byte of them.

python -m jaxpar data list
python -m jaxpar data get tiny_shakespeare
python -m jaxpar data verify
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from jaxpar import cli
from jaxpar.core import family, files
from jaxpar.core.files import File
from jaxpar.core.refuse import Collector, Problem, near_miss, refuse
from jaxpar.report.columns import aligned

COLUMNS = ("dataset", "file", "bytes", "checksum", "here", "from")


def data(argv: Sequence[str]) -> int | None:
    """List, get or verify the files of datasets.

    Returns:
        1 if a file is damaged, or one that was asked for by name is missing.

    Raises:
        Refused: for a dataset that there is not, or a file that cannot be had.
    """
    return cli.flags(_done, argv, __doc__)


def _done(
    action: Positional[Annotated[Literal["list", "get", "verify"], arg(help="what to do.")]] = "list",
    names: Positional[Annotated[tuple[str, ...], arg(metavar="DATASET", help="by default all.")]] = (),
    data_dir: Annotated[str | None, arg(help="folder to look in, or to fill; by default the cache.")] = None,
) -> int | None:
    known = family.names("datasets")
    missing = (
        []
        if names or action != "get"
        else [Problem("dataset", "(none)", "must be named, so that nothing large comes unasked.", ", ".join(known))]
    )
    refuse(
        Problem("dataset", name, "there is no such dataset.", near_miss(name, known))
        for name in names
        if name not in known
    )
    refuse([*missing, *(files.wrong_folder(data_dir) if action != "get" else ())])
    folder = files.cache_folder() if data_dir is None else Path(os.path.expanduser(data_dir))
    wanted = {name: declared(name) for name in names or known}
    return {"list": _list, "get": _get, "verify": _verify}[action](wanted, folder, bool(names))


def declared(name: str) -> tuple[File, ...]:
    """The files that a dataset reads, as its own file says; none if it needs no download."""
    return family.constant(family.pick("datasets", name), "FILES", ())


def _list(wanted: dict[str, tuple[File, ...]], folder: Path, named: bool) -> None:
    rows = []
    for name, needed in wanted.items():
        for file in needed:
            here = "yes" if any(os.path.lexists(folder / known) for known in file.names) else "no"
            rows.append((name, file.names[0], f"{file.size:,}", f"{file.checksum[:19]}...", here, file.url))
        if not needed:
            rows.append((name, "-", "-", "-", "yes", family.said("datasets", name)))
    print(aligned(COLUMNS, rows, right=("bytes",)))
    print(f"\nfolder: {folder}; downloads are {'off: JAXPAR_OFFLINE is set' if files.offline() else 'on'}")


def _get(wanted: dict[str, tuple[File, ...]], folder: Path, named: bool) -> None:
    refused = Collector([])
    for name, needed in wanted.items():
        for file in needed:
            print(f"{name}: {file.names[0]}, {file.size:,} bytes ...", flush=True)
            new = refused.attempt(files.fetch, file, folder)
            if new is not None:
                print(f"{name}: {'downloaded' if new else 'was there'} and verified, {folder / file.names[0]}")
        if not needed:
            print(f"{name}: needs no download")
    refuse(refused.problems)


def _verify(wanted: dict[str, tuple[File, ...]], folder: Path, named: bool) -> int | None:
    bad = False
    for name, needed in wanted.items():
        for file in needed:
            wrong = files.fault(file, folder)
            told = f"missing in {folder}" if wrong is None else wrong or f"ok, {file.checksum}"
            bad |= bool(wrong) or (named and wrong is None)
            print(f"{name}: {file.names[0]}: {told}")
        if not needed and named:
            print(f"{name}: reads no file of its own")
    return 1 if bad else None
