"""Encoded images in parquet files, as hubs of datasets publish them."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from jaxpar.core import family
from jaxpar.core.refuse import Problem, Refused
from jaxpar.core.waiting import waiting

FORMATS = ("JPEG", "PNG")
MOST = 1 << 30  # bytes of all files of a split, packed or not
EXTRA = "images"  # of pyproject.toml: what reads such files


def encoded_images(
    paths: list[Path], count: int, shape: tuple[int, int, int], column: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Decode `count` images, in the order of the files and of their rows.

    Args:
        paths: parquet files with a column `img` (or `image`) of {bytes, path}, and one of labels.
        count: images that they must hold together.
        shape: (height, width, channels) that each must have.
        column: name of the column of labels, whole numbers.
        name: of the dataset, for messages.

    Returns:
        uint8 `[count, *shape]`, and the labels, int64 `[count]`.

    Raises:
        Refused: if pyarrow or pillow is not installed, or naming the file and the row of what is wrong.
    """
    parquet = family.needed("pyarrow.parquet", "pyarrow", EXTRA, ("data.name", name))
    pillow = family.needed("PIL.Image", "pillow", EXTRA, ("data.name", name))
    pixels, labels, at = np.empty((count, *shape), np.uint8), np.empty(count, np.int64), 0
    done = waiting(f"{name}: decoding {paths[0].name.partition('-')[0]} images, once", count, "images")
    for path in paths:
        encoded, own = _table(parquet, path, column, name)
        if at + len(own) > count:
            raise _refusal(name, path, f"brings more than the {count:,} images that there are")
        for row, data in enumerate(encoded):
            pixels[at + row] = _decoded(pillow, data, shape, partial(_refusal, name, path, row=row))
            done(at + row + 1)
        labels[at : at + len(own)] = own
        at += len(own)
    if at != count:
        shards = ", ".join(path.name for path in paths)
        raise _refusal(name, paths[0].parent, f"holds {at:,} of {count:,} images in {shards}: a file is missing")
    return pixels, labels


def _table(parquet, path: Path, column: str, name: str) -> tuple[list[bytes | None], np.ndarray]:
    """The encoded images of a file and their labels."""
    try:
        with parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
            if max(path.stat().st_size, sum(group.total_byte_size for group in groups)) > MOST:
                raise ValueError(f"is more than {MOST:,} bytes")
            table = file.read()
        image = next(one for one in ("img", "image") if one in table.column_names)
        encoded = [row["bytes"] for row in table[image].to_pylist()]
        labels = np.array(table[column].to_pylist())
    except StopIteration:
        raise _refusal(name, path, "has no column `img`") from None
    except Exception as error:  # of a foreign decoder, on bytes that may be anything
        said = str(error).partition("\n")[0] or type(error).__name__
        raise _refusal(
            name, path, f"cannot be read as parquet with the columns `img` and `{column}`: {said}"
        ) from error
    if labels.dtype.kind not in "iu":
        raise _refusal(name, path, f"has labels of type {labels.dtype}, and they must be whole numbers")
    return encoded, labels


def _decoded(pillow, data, shape: tuple[int, int, int], refusal: Callable[[str], Refused]) -> np.ndarray:
    """One image; its size is looked at before its pixels are made."""
    if not isinstance(data, bytes):
        raise refusal("is no encoded image")
    try:
        image = pillow.open(io.BytesIO(data), formats=FORMATS)
        found = (*image.size[::-1], len(image.getbands()))
        pixels = np.asarray(image) if found == shape else None
    except Exception as error:  # as above
        raise refusal(f"cannot be decoded as {' or '.join(FORMATS)}: {type(error).__name__}") from error
    if pixels is None or pixels.shape != shape:
        raise refusal(f"is of {' x '.join(map(str, found))}, and {' x '.join(map(str, shape))} is needed")
    return pixels


def _refusal(name: str, path: Path, rule: str, row: int | None = None) -> Refused:
    where = f"{path}" if row is None else f"{path}: row {row}"
    return Refused([Problem("data.name", name, f"{where} {rule}.", "the files as they were published")])
