"""Text as windows of tokens: two arrays of ids become a `Dataset`."""

import numpy as np

from jaxpar.core import order
from jaxpar.core.refuse import Problem, refuse
from jaxpar.core.types import Dataset


def text_windows(
    train: np.ndarray, held_out: np.ndarray, *, batch: int, context: int, seed: int, vocab: int, source: str
) -> Dataset:
    """Next-token prediction on windows of `context + 1` tokens, one every `context` tokens.

    Args:
        train, held_out: token ids `[tokens]` of the two splits, one byte or more each.
        batch: windows per step, over all devices.
        context: tokens per input.
        seed: picks the order of the training windows; the held-out ones stay in order of the text.
        vocab: number of ids; every id must be below it.
        source: one line on what the tokens are.

    Returns:
        Batches of inputs and labels, int32 `[batch, context]`, the labels one token ahead. Windows that fill no whole
        held-out batch, and tokens that fill no window, are left out.

    Raises:
        Refused: if a size is below 1, a split holds fewer windows than a batch, or an id is not below `vocab`.
    """
    refuse(order.wrong(seed, batch=batch, context=context, vocab=vocab))
    refuse([*_too_short(train, held_out, batch, context), *_outside(train, held_out, vocab)])
    train_windows, held_out_windows = _windows(train, context), _windows(held_out, context)
    batches = len(held_out_windows) // batch

    def train_batch(step):
        return _shifted(train_windows[order.example(seed, step, batch, len(train_windows))])

    def held_out_batch(i):
        return _shifted(held_out_windows[order.held_out_rows(i, batch, batches)])

    return Dataset(train_batch, held_out_batch, batches, vocab, (context,), (train, held_out), source)


def _windows(tokens: np.ndarray, context: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context]  # a view: nothing is copied


def _shifted(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return windows[:, :-1].astype(np.int32), windows[:, 1:].astype(np.int32)


def _too_short(train: np.ndarray, held_out: np.ndarray, batch: int, context: int) -> list[Problem]:
    split, tokens = min(("training", train), ("held-out", held_out), key=lambda named: len(named[1]))
    needed, last = batch * context + 1, max(len(tokens) - 1, 0)
    if len(tokens) >= needed:
        return []
    most = {"batch": last // context, "context": last // batch}
    legal = [f"{name} up to {size:,}" for name, size in most.items() if size]
    return [
        Problem(
            "batch",
            batch,
            f"the {split} split is too short for one batch of context = {context}: "
            f"{len(tokens):,} bytes are there and {needed:,} (batch x context + 1) are needed.",
            " or ".join(legal) or "a longer text",
        )
    ]


def _outside(train: np.ndarray, held_out: np.ndarray, vocab: int) -> list[Problem]:
    largest = max((int(tokens.max()) for tokens in (train, held_out) if len(tokens)), default=0)
    if largest < vocab:
        return []
    return [
        Problem(
            "vocab",
            vocab,
            f"the text holds token id {largest}, and ids must be below vocab.",
            f"vocab = {largest + 1} or more; 256 fits every text of bytes",
        )
    ]
