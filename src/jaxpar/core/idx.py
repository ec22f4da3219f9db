"""The idx format of MNIST: a magic number, sizes, then bytes."""

import gzip
import hashlib
import io
import math
import struct
import zlib

import numpy as np

from jaxpar.core.decoded import decoded
from jaxpar.core.files import File, verified
from jaxpar.core.images import Images
from jaxpar.core.refuse import Problem, Refused


def idx(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The unsigned bytes of an idx file, packed by gzip.

    Args:
        data: the file.
        shape: that it must have.

    Returns:
        uint8 array of that shape.

    Raises:
        ValueError: saying what it is instead.

    Source: LeCun, Cortes and Burges, THE MNIST DATABASE, section FILE FORMATS.
    """
    header, size = 4 + 4 * len(shape), math.prod(shape)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            plain = stream.read(header + size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot be unpacked: {error}") from error
    expected = struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape)  # 08: unsigned bytes
    if plain[:header] != expected:
        raise ValueError(f"begins with {plain[:header].hex()}, and idx of shape {shape} with {expected.hex()}")
    if len(plain) != header + size:
        raise ValueError(f"holds {'more' if len(plain) > header + size else 'less'} than {size:,} bytes")
    return np.frombuffer(plain, np.uint8, offset=header).reshape(shape)


def idx_images(files: tuple[File, ...], counts: tuple[int, int], side: int, data_dir: str | None = None) -> Images:
    """Grey images of 10 classes, of four published files: training images and labels, then the held-out ones.

    Args:
        files: in that order.
        counts: images that train, and that are held out.
        side: pixels.
        data_dir: folder that holds the files; None: the cache, filled by downloads.

    Raises:
        Refused: if a file cannot be had or is not the published one.
    """
    name = files[0].dataset
    key = hashlib.sha256(" ".join(file.checksum for file in files).encode()).hexdigest()
    given = (
        None if data_dir is None else [verified(file, data_dir) for file in files]
    )  # wrong ones are never passed over

    def make():
        data = given or [verified(file) for file in files]
        shapes = [shape for count in counts for shape in ((count, side, side), (count,))]
        arrays = [_read(file, one, shape) for file, one, shape in zip(files, data, shapes, strict=True)]
        for file, labels in zip(files[1::2], arrays[1::2], strict=True):
            if labels.max() > 9:
                raise _refusal(file, f"holds the label {labels.max()}, and there are 10 classes")
        return np.concatenate(arrays[::2])[..., None], np.concatenate(arrays[1::2])

    pixels, labels = decoded(name, key, (sum(counts), side, side, 1), make)
    told = f"{name}: {counts[0]:,} + {counts[1]:,} images, {files[0].checksum[:19]}, from {data_dir or 'the cache'}"
    return Images(pixels, labels, counts[0], told)


def _read(file: File, data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return idx(data, shape)
    except ValueError as error:
        raise _refusal(file, str(error)) from error


def _refusal(file: File, rule: str) -> Refused:
    return Refused([Problem("data.name", file.dataset, f"{file.names[-1]} {rule}.", f"the file of {file.url}")])
