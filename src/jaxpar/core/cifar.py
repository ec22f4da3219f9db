"""CIFAR's images, from whatever a folder holds of them: the published archive, its unpacked files, or parquet."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxpar.core.archive import contents
from jaxpar.core.decoded import decoded
from jaxpar.core.files import File, verified, wrong_folder
from jaxpar.core.images import Images
from jaxpar.core.parquet import encoded_images
from jaxpar.core.refuse import Problem, Refused, refuse

SHAPE = 32, 32, 3
PIXELS = 32 * 32 * 3
MOST = 1 << 28  # bytes of one file; the whole of CIFAR is less, unpacked


class Kind(NamedTuple):
    """What differs between CIFAR-10 and CIFAR-100.

    Attributes:
        file: the published archive.
        folder: where the files lie within it.
        files: names of the files of the training and of the held-out split.
        counts: images of both.
        classes: number of labels.
        heading: bytes before the pixels of each record, of which the last is the label.
        column: of labels in parquet files.
    """

    file: File
    folder: str
    files: tuple[tuple[str, ...], tuple[str, ...]]
    counts: tuple[int, int]
    classes: int
    heading: int
    column: str


def cifar_images(kind: Kind, data_dir: str | None = None) -> Images:
    """Both splits.

    Args:
        kind: which of the two.
        data_dir: folder that holds the archive, its unpacked files (or their folder), or parquet files, `train-*` and
            `test-*`; None: the archive in the cache, downloaded once.

    Raises:
        Refused: if none of it is there, or something in it is not what it should be.
    """
    refuse(wrong_folder(data_dir))
    folder = None if data_dir is None else Path(os.path.expanduser(data_dir))
    if folder is None or any(os.path.lexists(folder / name) for name in kind.file.names):
        return _of_archive(kind, data_dir)
    for found in (folder, folder / kind.folder):
        if all((found / name).is_file() for name in _all(kind)):
            return _of_files(kind, found, data_dir)
    splits = [sorted(folder.glob(f"{split}-*.parquet")) for split in ("train", "test")]
    if not all(splits):
        rule = f"{folder} holds none of: {kind.file.names[0]}, its files ({', '.join(_all(kind))}), parquet files "
        rule += "(train-*.parquet and test-*.parquet)."
        legal = f"save {kind.file.url} there, or leave out --data-dir to download it"
        raise Refused([Problem("data_dir", data_dir, rule, legal)])
    return _of_parquet(kind, splits, data_dir)


def records(kind: Kind, data: list[bytes], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels `[count, 32, 32, 3]` and labels `[count]`, uint8, of the contents of binary files.

    A record is its labels, then 1024 bytes each of red, green and blue, row by row.

    Raises:
        Refused: naming the file of which the length or a label is wrong.

    Source: Krizhevsky 2009, cs.toronto.edu/~kriz/cifar.html, section Binary version.
    """
    width, arrays = kind.heading + PIXELS, []
    for one, name, count in zip(data, names, _expected(kind), strict=True):
        if len(one) != count * width:
            raise _refusal(kind, f"{name} has {len(one):,} bytes, and {count:,} images are {count * width:,}.")
        arrays.append(np.frombuffer(one, np.uint8).reshape(count, width))
        _known(kind, arrays[-1][:, kind.heading - 1], name)
    table = np.concatenate(arrays)
    pixels = table[:, kind.heading :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels), table[:, kind.heading - 1].copy()


def _of_archive(kind: Kind, data_dir: str | None) -> Images:
    data = None if data_dir is None else verified(kind.file, data_dir)  # a wrong one is never passed over

    def make():
        most = sum(kind.counts) * (kind.heading + PIXELS) + (1 << 20)
        names = [f"{kind.folder}/{name}" for name in _all(kind)]
        found = contents(Path(kind.file.names[0]), data or verified(kind.file), names, files=64, size=most)
        return records(kind, [found[name] for name in names], names)

    key, where = kind.file.checksum.partition(":")[2], data_dir or "the cache"
    return _images(kind, key, make, f"{kind.file.checksum[:19]}, from {where}")


def _of_files(kind: Kind, folder: Path, data_dir: str) -> Images:
    data = [_bytes(kind, folder / name) for name in _all(kind)]
    key = hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in data)).hexdigest()
    told = f"sha256:{key[:12]}, of unpacked files in {data_dir}"
    return _images(kind, key, lambda: records(kind, data, _all(kind)), told)


def _of_parquet(kind: Kind, splits: list[list[Path]], data_dir: str) -> Images:
    digests = [hashlib.sha256(_bytes(kind, path)).digest() for paths in splits for path in paths]
    key = hashlib.sha256(b"".join(digests)).hexdigest()

    def make():
        pixels, labels = np.empty((sum(kind.counts), *SHAPE), np.uint8), np.empty(sum(kind.counts), np.uint8)
        places = slice(0, kind.counts[0]), slice(kind.counts[0], None)
        for paths, count, place in zip(splits, kind.counts, places, strict=True):
            pixels[place], found = encoded_images(paths, count, SHAPE, kind.column, kind.file.dataset)
            labels[place] = _known(kind, found, f"{paths[0].parent}: `{kind.column}`")
        return pixels, labels

    return _images(kind, key, make, f"sha256:{key[:12]}, of encoded images in {data_dir}")


def _images(kind: Kind, key: str, make, told: str) -> Images:
    pixels, labels = decoded(kind.file.dataset, key, (sum(kind.counts), *SHAPE), make)
    train, held_out = kind.counts
    return Images(pixels, labels, train, f"{kind.file.dataset}: {train:,} + {held_out:,} images, {told}")


def _known(kind: Kind, labels: np.ndarray, name: str) -> np.ndarray:
    """The labels, if each is one of a class."""
    wrong = np.flatnonzero((labels < 0) | (labels >= kind.classes))
    if len(wrong):
        rule = f"{name}: image {wrong[0]} has the label {labels[wrong[0]]}, and they go from 0 to {kind.classes - 1}."
        raise _refusal(kind, rule)
    return labels


def _expected(kind: Kind) -> list[int]:
    """Images in each file."""
    return [count // len(names) for names, count in zip(kind.files, kind.counts, strict=True) for _ in names]


def _all(kind: Kind) -> list[str]:
    return [name for names in kind.files for name in names]


def _bytes(kind: Kind, path: Path) -> bytes:
    try:
        if not path.is_file():
            raise _refusal(kind, f"{path} is not a regular file.")
        if path.stat().st_size > MOST:
            raise _refusal(kind, f"{path} is more than {MOST:,} bytes.")
        return path.read_bytes()
    except OSError as error:
        raise _refusal(kind, f"{path} cannot be read ({error.strerror or error}).") from error


def _refusal(kind: Kind, rule: str) -> Refused:
    return Refused([Problem("data.name", kind.file.dataset, rule, f"the files of {kind.file.url}")])
