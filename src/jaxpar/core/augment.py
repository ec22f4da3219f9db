"""Random changes of training images: pure functions of the seed and of the place in the stream of examples."""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: the step of Steele's generator
FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def draws(seed: int, positions: np.ndarray) -> np.ndarray:
    """64 random bits for each position: the output of SplitMix64 for the counter, in a stream picked by the seed.

    Made of integer arithmetic alone, so that no version of a library changes them.

    Args:
        seed: of the run.
        positions: whole numbers `[batch]`.

    Returns:
        uint64 `[batch]`.

    Source: Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195 (the constants: its public-domain code).
    """
    start = _mixed(np.array([seed], np.uint64) + GOLDEN)
    return _mixed(start + (np.asarray(positions, np.uint64) + np.uint64(1)) * GOLDEN)


def pad_crop_flip(images: np.ndarray, seed: int, positions: np.ndarray, pad: int = 4) -> np.ndarray:
    """Each image shifted by up to `pad` pixels each way, black coming in at the border, and every other one mirrored.

    What happens to an image depends on the seed and on its position in the run, step x batch + index, alone: not on how
    the run is cut into batches, and it is another in each epoch.

    Args:
        images: uint8 `[batch, height, width, channels]`; not changed.
        seed: of the run.
        positions: of the images, whole numbers `[batch]`.
        pad: pixels.

    Returns:
        uint8, of the same shape.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2, with 4 pixels; Lee et al. 2015, arXiv:1409.5185.
    """
    count, height, width, channels = images.shape
    down, right, mirrored = choices(seed, positions, pad)
    padded = np.zeros((count, height + 2 * pad, width + 2 * pad, channels), np.uint8)
    padded[:, pad : pad + height, pad : pad + width] = images
    rows = padded.reshape(*padded.shape[:2], padded.shape[2] * channels)  # of a window: one run of bytes, copied whole
    windows = np.lib.stride_tricks.sliding_window_view(rows, (height, width * channels), (1, 2))[:, :, ::channels]
    cut = windows[np.arange(count), down, right].reshape(images.shape)
    cut[mirrored] = cut[mirrored, :, ::-1]
    return cut


def choices(seed: int, positions: np.ndarray, pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each position the first row and column of its window, int64 in [0, 2 pad], and whether to mirror."""
    bits, places = draws(seed, positions), np.uint64(2 * pad + 1)
    down, right = (((bits >> np.uint64(shift)) % places).astype(np.int64) for shift in (0, 24))
    return down, right, (bits >> np.uint64(63)).astype(bool)


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * FACTORS[0]
    z = (z ^ (z >> np.uint64(27))) * FACTORS[1]
    return z ^ (z >> np.uint64(31))
