"""Images decoded once: uint8 pixels and labels in one file of the cache, mapped into memory and checked when opened."""

import hashlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxpar.core.files import cache_folder
from jaxpar.core.waiting import note

SEAL = 32  # bytes at the end: the SHA-256 of all before
STALE_S = 3600  # after which a part that was left behind, by a process that was killed, is deleted


def decoded(
    name: str, key: str, shape: tuple[int, int, int, int], make: Callable[[], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels, read-only: from the cache if they are there, else made and kept.

    The file is pixels, labels and the SHA-256 of both; it is written aside and renamed, so it is whole or not there.
    One that is damaged is told and made again. Where it cannot be written (a full disk, a cache that is read-only) that
    is told, and the arrays stay in memory.

    Args:
        name: of the dataset.
        key: hexadecimal digest of what is decoded.
        shape: of the pixels.
        make: decodes: pixels, uint8 of that shape, and labels, uint8 `[shape[0]]`.
    """
    path = cache_folder() / "decoded" / f"{name}-{key[:24]}.u8"
    if (found := _opened(path, shape)) is not None:
        return found
    pixels, labels = make()
    try:
        _keep(path, pixels, labels)
    except OSError as error:
        note(f"{name}: {path} cannot be written ({error.strerror or error}), so it is decoded anew in each run")
    else:
        if (found := _opened(path, shape)) is not None:
            return found
    for array in (pixels, labels):
        array.setflags(write=False)
    return pixels, labels


def _opened(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """The arrays in a file of the cache; None if it is not there, or damaged, which is told."""
    size = int(np.prod(shape))
    try:
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size != size + shape[0] + SEAL:
                note(f"{path} is damaged: it has another length. It is made again")
                return None
            whole = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        note(f"{path} cannot be read ({error}). It is made again")
        return None
    body, seal = whole[:-SEAL], whole[-SEAL:]
    if hashlib.sha256(body).digest() != seal.tobytes():
        note(f"{path} is damaged: its checksum is another. It is made again")
        return None
    return body[:size].reshape(shape), body[size:]


def _keep(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{path.name}.*.part"):
        if time.time() - left.stat().st_mtime > STALE_S:
            left.unlink(missing_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".part")
    try:
        digest = hashlib.sha256()
        with open(handle, "wb") as stream:
            for array in (pixels, labels):
                data = memoryview(np.ascontiguousarray(array)).cast("B")
                digest.update(data)
                stream.write(data)
            stream.write(digest.digest())
        os.replace(part, path)  # whole or not at all, also with several processes
    except BaseException:
        os.unlink(part)
        raise
