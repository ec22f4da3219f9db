"""Labelled images as uint8 arrays become a `Dataset`."""

from typing import NamedTuple

import numpy as np

from jaxpar.core import order
from jaxpar.core.augment import pad_crop_flip
from jaxpar.core.refuse import Problem, Refused, refuse
from jaxpar.core.types import Dataset


class Colours(NamedTuple):
    """Mean and deviation of each channel over the training images, as published, of pixels in [0, 1]."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


class Images(NamedTuple):
    """Both splits of a dataset, the training images first.

    Attributes:
        pixels: uint8 `[count, height, width, channels]`.
        labels: uint8 `[count]`.
        train: how many of them train; the others are held out.
        source: one line on where they are from.
    """

    pixels: np.ndarray
    labels: np.ndarray
    train: int
    source: str


def normalized(pixels: np.ndarray, colours: Colours) -> np.ndarray:
    """Pixels of uint8 as float32, of mean 0 and deviation 1 over training images: (pixel / 255 - mean) / deviation."""
    deviation = np.array(colours.deviation)
    scale, shift = (1 / (255 * deviation)).astype(np.float32), (np.array(colours.mean) / deviation).astype(np.float32)
    inputs = np.multiply(pixels, scale, dtype=np.float32)
    inputs -= shift
    return inputs


def image_dataset(
    images: Images, colours: Colours, *, batch: int, classes: int, seed: int = 0, augment: bool = False
) -> Dataset:
    """A dataset of images of one size, one label each.

    Args:
        images: both splits.
        colours: of the training images.
        batch: images per step, over all devices.
        classes: number of labels.
        seed: picks the order of the training images, and how each is shifted and mirrored.
        augment: whether training images are (`core/augment.py`); held-out ones never are.

    Returns:
        Inputs float32 `[batch, height, width, channels]`, normalized; labels int32 `[batch]`. The last held-out batch
        is filled up with zeros, grey, of label -1. `splits` are the pixels as they are, uint8.

    Raises:
        Refused: if the seed or the batch is no legal number, or the batch exceeds the held-out images.
    """
    refuse(order.wrong(seed, batch=batch))
    pixels, labels = (
        (array[: images.train], array[images.train :]) for array in (images.pixels, images.labels.astype(np.int32))
    )
    count, held = map(len, labels)
    if batch > held:
        rule = f"only {held:,} of the {count + held:,} images are held out, less than one batch."
        raise Refused([Problem("batch", batch, rule, f"1 to {held}")])
    batches = -(-held // batch)

    def train_batch(step):
        rows = order.example(seed, step, batch, count)
        chosen = pixels[0][rows]
        if augment:
            chosen = pad_crop_flip(chosen, seed, int(step) * batch + np.arange(batch))
        return normalized(chosen, colours), labels[0][rows]

    def held_out_batch(i):
        rows = order.held_out_rows(i, batch, batches)
        inputs = normalized(pixels[1][rows], colours)
        blank = (0, batch - len(inputs))
        return np.pad(inputs, (blank, (0, 0), (0, 0), (0, 0))), np.pad(labels[1][rows], blank, constant_values=-1)

    shape = images.pixels.shape[1:]
    return Dataset(train_batch, held_out_batch, batches, classes, shape, pixels, images.source)
