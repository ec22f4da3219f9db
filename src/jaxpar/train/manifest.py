"""The manifest of a checkpoint: what every file and every array of it must be, written when all of it is on the disk.

File systems, disks and orbax return altered bytes without a word: of single flipped bits in array data, orbax 0.12.8
restores most. A checkpoint is therefore good only if its manifest says so of each byte.

    {"sha256": of all that follows,
     "format": 2, "step": 400,
     "files":  {"state/d/8d94e8": {"bytes": 440, "sha256": ...}, ...},
     "leaves": {"params/table": {"shape": [256, 128], "dtype": "float32", "sha256": ...}, ...},
     "about":  {"recipe": ..., "data": ..., "plan": ..., "jax": ...}}

The digest of a leaf is that of its unpadded values in C order, so no mesh changes it. Digests detect accidents, not
attackers.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from jaxpar.core.refuse import Problem, Refused

NAME = "manifest.json"
FORMAT = 2  # of what is on disk; a higher number is refused


class Damaged(Exception):
    """A checkpoint is not what was written.

    Attributes:
        step: of the checkpoint.
        file: in its folder, or the leaf, that differs.
        reason: what is wrong with it.
    """

    def __init__(self, folder: Path, file: str, reason: str):
        self.step, self.file, self.reason = int(folder.name), file, reason
        super().__init__(f"checkpoint of step {self.step} is damaged: {folder / file} {reason}")


def leaf(a: np.ndarray) -> dict:
    """Shape, dtype and digest of one array on the host."""
    flat = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
    return {"shape": [*a.shape], "dtype": a.dtype.name, "sha256": hashlib.sha256(flat).hexdigest()}


def write(folder: Path, step: int, leaves: Mapping[str, dict], about: dict) -> None:
    """Bring all that is in `folder` to the disk, and then write what it must be.

    Args:
        folder: of one checkpoint, complete but for the manifest.
        step: updates done.
        leaves: what `leaf` says of each array, by name.
        about: plain values for whoever finds the checkpoint.
    """
    files = {path.relative_to(folder).as_posix(): _digest(path) for path in _files(folder)}
    for path in [*_files(folder), *_folders(folder)]:
        sync(path)
    text = _text({"format": FORMAT, "step": step, "files": files, "leaves": dict(leaves), "about": about})
    part = folder / f"{NAME}.part"
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, folder / NAME)
    sync(folder)


def read(folder: Path) -> dict:
    """The manifest in `folder`.

    Raises:
        Damaged: if it is missing or is not, byte for byte, what was written.
        Refused: if the system cannot read it.
    """
    try:
        data = (folder / NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Damaged(folder, NAME, "is missing") from None
    except OSError as error:
        raise _unreadable(folder / NAME, error) from error
    try:
        found = json.loads(data)
        found.pop("sha256")
        same = _text(found).encode() == data
    except (ValueError, TypeError, KeyError, AttributeError):
        same = False
    if not same:
        raise Damaged(folder, NAME, "is empty" if not data else "is altered")
    if str(found["step"]) != folder.name:
        raise Damaged(folder, NAME, f"is of step {found['step']}")
    return found


def verify(folder: Path) -> dict:
    """The manifest in `folder`, if every file that it names is what was written.

    Raises:
        Damaged: naming the first file that is not.
        Refused: if the system cannot read one.
    """
    found = read(folder)
    for name, wanted in found["files"].items():
        try:
            size = (folder / name).stat().st_size
            got = _digest(folder / name) if size == wanted["bytes"] else None
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise Damaged(folder, name, "is missing") from None
        except OSError as error:
            raise _unreadable(folder / name, error) from error
        if got is None:
            raise Damaged(folder, name, f"has {size:,} bytes, and {wanted['bytes']:,} were written")
        if got != wanted:
            raise Damaged(folder, name, "is altered")
    return found


def _unreadable(path: Path, error: OSError) -> Exception:
    """What cannot be read just now may be as good as ever: nobody may go back for that, or move it away."""
    return Refused(
        [Problem("checkpoint", path, f"cannot be read: {error.strerror or error}.", "mend that, and try again")]
    )


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    with suppress(PermissionError):  # Windows opens no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _folders(folder: Path) -> list[Path]:
    return [*(path for path in folder.rglob("*") if path.is_dir()), folder]


def _digest(path: Path) -> dict:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return {"bytes": stream.tell(), "sha256": digest.hexdigest()}


def _text(values: dict) -> str:
    """The one way in which these values are written, with their own digest first."""
    own = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps({"sha256": own} | values, indent=1, sort_keys=True) + "\n"
