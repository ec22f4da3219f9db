"""Files of known content: found or downloaded once, and used only if every byte is the expected one."""

import hashlib
import http.client
import os
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib import request
from urllib.error import HTTPError

from jaxpar.core.refuse import Problem, Refused
from jaxpar.core.waiting import waiting

TIMEOUT_S = 10  # to connect, and between two pieces of an answer
SLOWEST = 20_000  # bytes per second, over a whole download: a server that drips must not hold a run for ever
PIECE = 1 << 16


class File(NamedTuple):
    """A published file.

    Attributes:
        dataset: name of the dataset that reads it.
        names: names that it may have in a user's folder; in the cache it has the first.
        url: its canonical address, https.
        size: bytes.
        checksum: algorithm and hexadecimal digest, such as `sha256:86c4...`.
        instead: name of a dataset that works offline, offered where this one cannot be had.
    """

    dataset: str
    names: tuple[str, ...]
    url: str
    size: int
    checksum: str
    instead: str


def verified(file: File, data_dir: str | None = None) -> bytes:
    """The content of `file`: from `data_dir` alone if that is given, else from the cache, else downloaded into it.

    With JAXPAR_OFFLINE=1 in the environment the network is not tried. A file that is wrong is never replaced.

    Raises:
        Refused: if the file is missing, unreadable or not what was published, or cannot be downloaded.
    """
    folder = cache_folder() if data_dir is None else Path(os.path.expanduser(data_dir))
    path = next((folder / name for name in file.names if os.path.lexists(folder / name)), folder / file.names[0])
    if data_dir is not None and not os.path.isdir(folder):
        raise _refusal(file, path, f"{folder} is not a folder")
    if data_dir is None and not os.path.lexists(path):
        return _download(file, path)
    return _read(file, path)


def fetch(file: File, folder: Path) -> bool:
    """Make sure that `folder` holds `file`, by a download if it is not there.

    Returns:
        Whether it was downloaded.

    Raises:
        Refused: as of `verified`.
    """
    missing = not os.path.lexists(folder / file.names[0])
    if missing:
        _download(file, folder / file.names[0])
    else:
        _read(file, folder / file.names[0])
    return missing


def fault(file: File, folder: Path) -> str | None:
    """What is wrong with `file` in `folder`, every byte of it hashed anew: empty if nothing, None if it is missing."""
    path = next((folder / name for name in file.names if os.path.lexists(folder / name)), None)
    if path is None:
        return None
    try:
        _read(file, path)
    except Refused as refused:
        return refused.problems[0].rule
    return ""


def offline() -> bool:
    """Whether JAXPAR_OFFLINE forbids downloads."""
    return os.environ.get("JAXPAR_OFFLINE", "") not in ("", "0")


def cache_folder() -> Path:
    """Where downloads are kept: `$XDG_CACHE_HOME/jaxpar/data`, by default `~/.cache/jaxpar/data`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # to be ignored, says the XDG specification
        base = os.path.expanduser("~/.cache")
    return Path(base, "jaxpar", "data")


def wrong_folder(data_dir: str | None) -> list[Problem]:
    """One problem if `data_dir` is given and is not a folder: a misspelt one must not pass where no file is needed."""
    if data_dir is None or os.path.isdir(os.path.expanduser(data_dir)):
        return []
    return [Problem("data_dir", data_dir, "there is no such folder.", "a folder, or no --data-dir")]


def https_opener() -> request.OpenerDirector:
    """An opener that knows https and nothing else, so that no redirect can lead to http, ftp or a local file."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPErrorProcessor,
        request.HTTPDefaultErrorHandler,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _read(file: File, path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # asked before opening: a pipe would block
            raise _refusal(file, path, "is a directory" if stat.S_ISDIR(mode) else "is not a regular file")
        with path.open("rb") as stream:
            data = stream.read(file.size + 1)
            size, digest = len(data), hashlib.new(_algorithm(file), data)
            while piece := stream.read(1 << 20):  # a wrong file may be of any size: hashed, not kept
                size += len(piece)
                digest.update(piece)
    except FileNotFoundError:
        raise _refusal(file, path, "is missing") from None
    except OSError as error:
        raise _refusal(file, path, f"cannot be read ({error.strerror or error})") from error
    if fault := _fault(file, size, digest.hexdigest()):
        raise _refusal(file, path, f"is {fault}")
    return data


def _download(file: File, path: Path) -> bytes:
    if offline():
        raise _refusal(file, path, "is missing, and JAXPAR_OFFLINE forbids a download")
    try:
        with https_opener().open(file.url, timeout=TIMEOUT_S) as answer:
            data = _body(answer, file.size + 1, waiting(f"downloading {file.names[0]}", file.size, "bytes"))
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # it is the answer as well
        raise _refusal(file, path, f"is missing, and its download failed ({error or type(error).__name__})") from error
    if fault := _fault(file, len(data), hashlib.new(_algorithm(file), data).hexdigest()):
        raise _refusal(file, path, f"is missing, and its download, stopped at {file.size + 1:,} bytes, was {fault}")
    try:
        _store(path, data)
    except OSError as error:
        raise _refusal(file, path, f"was downloaded, but cannot be written ({error.strerror or error})") from error
    return data


def _body(answer, most: int, done: Callable[[int], None]) -> bytes:
    """At most `most` bytes of an answer; `done(bytes)` is told how many are there.

    Raises:
        TimeoutError: if they come more slowly than `SLOWEST` on the whole.
    """
    pieces, size, until = [], 0, time.monotonic() + TIMEOUT_S + most / SLOWEST
    while size < most and (piece := answer.read1(min(PIECE, most - size))):
        pieces.append(piece)
        size += len(piece)
        done(size)
        if time.monotonic() > until:
            raise TimeoutError(
                f"slower than {SLOWEST:,} bytes per second: given up after {size:,} of {most - 1:,} bytes"
            )
    return b"".join(pieces)


def _store(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
    try:
        with open(handle, "wb") as stream:
            stream.write(data)
        os.replace(part, path)  # whole or not at all, also with several processes
    except BaseException:
        os.unlink(part)
        raise


def _fault(file: File, size: int, digest: str) -> str:
    if (size, f"{_algorithm(file)}:{digest}") == (file.size, file.checksum):
        return ""
    word = "empty" if size == 0 else "truncated" if size < file.size else "too long" if size > file.size else "altered"
    return f"{word}: {size:,} bytes, {_algorithm(file)} {digest}"


def _algorithm(file: File) -> str:
    return file.checksum.partition(":")[0]


def _refusal(file: File, path: Path, found: str) -> Refused:
    rule = f"{path} {found}; expected: {file.size:,} bytes, {file.checksum.replace(':', ' ')}."
    legal = (
        f"save {file.url} as that file (or delete a bad one in the cache: it is downloaded again), name a folder "
        f"that holds {' or '.join(file.names)} by --data-dir, or choose {file.instead}, which works offline"
    )
    return Refused([Problem("data.name", file.dataset, rule, legal)])
