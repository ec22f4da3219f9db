"""Which examples are in which batch: pure functions, so that a checkpoint needs no iterator."""

import functools
import hashlib
import operator

import numpy as np

from jaxpar.core.refuse import Problem, Refused, refuse


def example(seed: int, step: int, batch: int, count: int) -> np.ndarray:
    """Indices of the examples in the global training batch of `step`.

    Position p = step * batch + i of the run is example p mod count of the permutation of epoch p // count, so every
    example comes exactly once per epoch, and a batch may straddle two epochs or more.

    Args:
        seed: picks the permutations; the order depends on it and on nothing else of the run.
        step: updates done so far, from 0.
        batch: examples per step, over all devices.
        count: examples in the training split.

    Returns:
        int64 `[batch]`, each in `[0, count)`.

    Raises:
        Refused: if the seed or the step is negative, or a size is below 1.
    """
    refuse([*wrong(seed, batch=batch, count=count), *_at_least(0, step=step)])
    start = operator.index(step) * batch  # a Python int: a step in int32 would overflow
    indices = np.empty(batch, np.int64)
    done = 0
    while done < batch:
        epoch, offset = divmod(start + done, count)
        part = _permutation(seed, epoch, count)[offset : offset + batch - done]
        indices[done : done + len(part)] = part
        done += len(part)
    return indices


def held_out_rows(i: int, batch: int, batches: int) -> slice:
    """Examples of held-out batch `i` of `batches`, in their fixed order.

    Raises:
        Refused: if there is no such batch.
    """
    if not 0 <= i < batches:
        raise Refused([Problem("held-out batch", i, "there is no such batch.", f"0 to {batches - 1}")])
    return slice(i * batch, (i + 1) * batch)


def share(key: bytes) -> float:
    """A number in [0, 1), uniform over keys, that depends on `key` alone: an example's side of a split.

    Other examples, the seed and the version of numpy do not move it, as they would move a shuffle.
    """
    return int.from_bytes(hashlib.sha256(key).digest()[:6], "big") / 2**48


def wrong(seed: int, **sizes: int) -> list[Problem]:
    """One problem if `seed` is not a whole number from 0, and one for each of `sizes` that is not one from 1."""
    return [*_at_least(0, seed=seed), *_at_least(1, **sizes)]


def _at_least(least: int, **fields: int) -> list[Problem]:
    rule = f"must be a whole number, at least {least}."
    return [
        Problem(name, value, rule, f"{name} = {least}")
        for name, value in fields.items()
        if not hasattr(value, "__index__") or operator.index(value) < least
    ]


@functools.lru_cache(maxsize=4)  # at 8 bytes per example: this epoch and the next, of two datasets
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
