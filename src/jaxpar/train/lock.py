"""One run at a time in a folder."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from jaxpar.core.refuse import Problem, Refused

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
PATIENCE_S = 0.5  # for one who only looks, and for a run that is just ending


@contextmanager
def locked(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of the run in `folder`, which is made if need be.

    The system takes the lock back when a process ends, however it ends, so a killed run never has to be unlocked.

    Args:
        folder: of the run.
        note: is told where a file system has no locks; the run then goes on without.

    Raises:
        Refused: if another run holds it, naming that one's process and machine; or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _opened(folder)
    except OSError as error:
        rule = f"{error.filename or folder} cannot be written: {error.strerror or error}."
        raise Refused([Problem("runs_dir", folder.parent, rule, "a folder of yours, by --runs-dir")]) from error
    if handle is None:
        note(f"warning: {folder} lies where files cannot be locked; do not start two runs of one name")
        yield
        return
    try:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps(about).encode())
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(handle)


def holder(folder: Path) -> dict | None:
    """`pid`, `host` and `since` of the run that holds the lock of `folder`; None if none does."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        return None if _taken(handle) is not False else _said(handle)
    finally:
        os.close(handle)


def refuse_held(folder: Path) -> None:
    """Raise what `locked` would if another run holds the lock: to be asked early, since it needs no jax and no data.

    Raises:
        Refused: naming that run's process and machine.
    """
    patience = time.monotonic() + PATIENCE_S
    while found := holder(folder):
        if time.monotonic() > patience:
            raise Refused([_held(folder, found)])
        time.sleep(0.02)


def _held(folder: Path, found: dict) -> Problem:
    rule = f"{folder} is in use by process {found['pid']} on {found['host']}, since {found['since']}."
    return Problem("name", folder.name, rule, "another --name; or wait for that run, or stop it")


def _opened(folder: Path) -> int | None:
    """The locked file; None if it cannot be locked here."""
    patience = time.monotonic() + PATIENCE_S
    while True:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        taken = _taken(handle)
        if taken and _is_at(handle, folder / LOCK):
            return handle
        found = _said(handle)
        os.close(handle)
        if taken is None:
            return None
        if taken is False and time.monotonic() > patience:
            raise Refused([_held(folder, found)])
        time.sleep(0.02)


def _taken(handle: int) -> bool | None:
    """Whether the lock is ours now; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _said(handle: int) -> dict:
    unknown = {"pid": "(unknown)", "host": "an unknown machine", "since": "just now"}
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except (OSError, ValueError):
        return unknown
    return unknown | found if isinstance(found, dict) else unknown
