"""Handwritten digits, 8 x 8 pixels: the smallest real images, with no download."""

import functools
import gzip
import importlib.util
import zlib
from pathlib import Path

import numpy as np

from jaxpar.core import order
from jaxpar.core.files import wrong_folder
from jaxpar.core.refuse import Problem, Refused, refuse
from jaxpar.core.types import Dataset

HELD_OUT = 0.2


def digits(*, batch: int, seed: int = 0, data_dir: str | None = None) -> Dataset:
    """1797 digits in 10 classes, of which about 20 % are held out, chosen by a hash of the image.

    Args:
        batch: images per step, over all devices.
        seed: picks the order of the training images; it does not move the split.
        data_dir: must be a folder if given; no file of it is used.

    Returns:
        Inputs float32 `[batch, 8, 8, 1]` in [0, 1], labels int32 `[batch]`. The last held-out batch is filled up with
        blank images of label -1.

    Raises:
        Refused: if scikit-learn, which brings the images, is not installed, or the batch exceeds the held-out images.

    Source: `sklearn.datasets.load_digits`; Alpaydin and Kaynak 1998, UCI, doi:10.24432/C50P49 (its test set).
    """
    refuse([*wrong_folder(data_dir), *order.wrong(seed, batch=batch)])
    (x_train, y_train), (x_held, y_held) = _splits()
    if batch > len(x_held):
        rule = f"only {len(x_held)} of the {len(x_train) + len(x_held)} images are held out, less than one batch."
        raise Refused([Problem("batch", batch, rule, f"1 to {len(x_held)}")])
    batches = -(-len(x_held) // batch)

    def train_batch(step):
        rows = order.example(seed, step, batch, len(x_train))
        return x_train[rows], y_train[rows]

    def held_out_batch(i):
        rows = order.held_out_rows(i, batch, batches)
        blank = (0, batch - len(y_held[rows]))
        inputs = np.pad(x_held[rows], (blank, (0, 0), (0, 0), (0, 0)))
        return inputs, np.pad(y_held[rows], blank, constant_values=-1)

    source = f"digits: {len(x_train)} + {len(x_held)} images of scikit-learn's load_digits"
    return Dataset(train_batch, held_out_batch, batches, 10, (8, 8, 1), (x_train, x_held), source)


@functools.lru_cache(maxsize=1)
def _splits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images and labels of the training and of the held-out split, read-only."""
    table = _table()
    images, labels = table[:, :-1], table[:, -1].astype(np.int32)
    held = np.array([order.share(image.tobytes()) < HELD_OUT for image in images])
    inputs = (images / np.float32(16)).reshape(-1, 8, 8, 1)
    splits = tuple((inputs[side], labels[side]) for side in (~held, held))
    for array in (array for split in splits for array in split):
        array.setflags(write=False)  # shared by every dataset of this process
    return splits


def _table() -> np.ndarray:
    """uint8 `[1797, 65]`: 64 pixels of 0 to 16, then the label."""
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.origin:
        rule = "scikit-learn, which brings the images, is not installed."
        raise Refused([Problem("data.name", "digits", rule, "pip install scikit-learn")])
    # The file that load_digits reads: importing scikit-learn for it takes over a second, reading it 0.05.
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split()
        return np.array([line.split(",") for line in lines]).astype(np.uint8).reshape(1797, 65)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        rule = f"{path} cannot be read: {error}."
        raise Refused([Problem("data.name", "digits", rule, "pip install --force-reinstall scikit-learn")]) from error
