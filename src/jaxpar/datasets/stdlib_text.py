"""Python's own source code: real text on every machine, with no download."""

import functools
import hashlib
import os
import platform
import stat
import sysconfig
from pathlib import Path

import numpy as np

from jaxpar.core import order
from jaxpar.core.files import wrong_folder
from jaxpar.core.refuse import Problem, Refused, refuse
from jaxpar.core.types import Dataset
from jaxpar.core.windows import text_windows

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
BUILD = ("_sysconfigdata", "config-")  # written when Python is built: they hold paths of that machine
HELD_OUT = 0.6, 0.7  # of all tenths this one holds the fewest near-copies of training files (tables in `encodings`)


def stdlib_text(*, batch: int, context: int, seed: int = 0, vocab: int = 256, data_dir: str | None = None) -> Dataset:
    """Bytes of the standard library of the running Python, without its tests; one file in ten is held out.

    The text differs between versions of Python, so losses compare only under one `source`.

    Args:
        batch: windows per step, over all devices.
        context: bytes per input.
        seed: picks the order of the training windows.
        vocab: number of ids; 256, since a few files are not ASCII.
        data_dir: must be a folder if given; no file of it is used.

    Returns:
        Inputs and labels, int32 `[batch, context]`, the labels one byte ahead.

    Raises:
        Refused: if the standard library is not there as source files, or the sizes do not fit it.

    Source: about 12 MB, under the licence of Python (PSF-2.0).
    """
    refuse([*wrong_folder(data_dir), *order.wrong(seed, batch=batch, context=context, vocab=vocab)])
    train, held_out, source = _corpus(sysconfig.get_path("stdlib"))
    return text_windows(train, held_out, batch=batch, context=context, seed=seed, vocab=vocab, source=source)


@functools.lru_cache(maxsize=1)
def _corpus(folder: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Both splits, uint8 and read-only, and one line on what they are; the split is by path, so a new file moves none.

    Raises:
        Refused: if there is no text in `folder`, or it cannot be read.
    """
    try:
        files = [(name, Path(folder, name).read_bytes()) for name in _python_files(folder)]
    except OSError as error:
        rule = f"the standard library of this Python cannot be read: {error}."
        raise Refused([Problem("data.name", "stdlib_text", rule, "tiny_shakespeare")]) from error
    texts = [(name, data) for name, data in files if _is_text(data)]
    if not texts:
        rule = (
            f"{folder} holds no source files: the standard library of this Python is compiled (.pyc) or packed "
            "into a zip file."
        )
        raise Refused([Problem("data.name", "stdlib_text", rule, "tiny_shakespeare, or a Python with its source")])
    splits, digest = ([], []), hashlib.sha256()
    for name, data in texts:
        key = os.fsencode(name)
        splits[HELD_OUT[0] <= order.share(key) < HELD_OUT[1]].append(data)
        digest.update(key + b"\0" + data)
    train, held_out = (np.frombuffer(b"".join(split), np.uint8) for split in splits)
    size = f"{len(texts)} files, {len(train) + len(held_out):,} bytes, sha256:{digest.hexdigest()[:12]}"
    return train, held_out, f"stdlib_text: Python {platform.python_version()}, {size}"


def _python_files(folder: str) -> list[str]:
    """Posix paths, relative to `folder`, of its regular `.py` files; links are not followed, wherever they lead."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED and not name.startswith(BUILD)]
        for name in names:
            path = Path(parent, name)
            if name.endswith(".py") and not name.startswith(BUILD) and stat.S_ISREG(path.lstat().st_mode):
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
