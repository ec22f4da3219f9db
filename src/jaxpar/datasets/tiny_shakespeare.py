"""The 1.1 MB of Shakespeare that char-rnn made common."""

import numpy as np

from jaxpar.core import order
from jaxpar.core.files import File, verified
from jaxpar.core.refuse import refuse
from jaxpar.core.types import Dataset
from jaxpar.core.windows import text_windows

FILES = (
    File(
        dataset="tiny_shakespeare",
        names=("tinyshakespeare.txt", "input.txt"),
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        size=1_115_394,
        checksum="sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        instead="stdlib_text",
    ),
)


def tiny_shakespeare(
    *, batch: int, context: int, seed: int = 0, vocab: int = 256, data_dir: str | None = None
) -> Dataset:
    """Bytes of tiny Shakespeare; the first 90 % train, the rest is held out.

    Args:
        batch: windows per step, over all devices.
        context: bytes per input.
        seed: picks the order of the training windows.
        vocab: number of ids; the text is ASCII, so 128 is enough.
        data_dir: folder with `tinyshakespeare.txt` or `input.txt`; None: the cache, filled by one download.

    Returns:
        Inputs and labels, int32 `[batch, context]`, the labels one byte ahead.

    Raises:
        Refused: if the exact file cannot be had (no other text takes its place), or the sizes do not fit it.

    Source: Karpathy 2015, github.com/karpathy/char-rnn; the split is that of nanoGPT.
    """
    refuse(order.wrong(seed, batch=batch, context=context, vocab=vocab))
    (file,) = FILES
    tokens = np.frombuffer(verified(file, data_dir), np.uint8)
    cut = len(tokens) * 9 // 10
    source = f"tiny_shakespeare: {len(tokens):,} bytes, {file.checksum[:19]}, from {data_dir or 'the cache'}"
    return text_windows(tokens[:cut], tokens[cut:], batch=batch, context=context, seed=seed, vocab=vocab, source=source)
