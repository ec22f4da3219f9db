"""What a batch must be before it goes to the devices: checked on the host, where it costs almost nothing."""

import numpy as np

from jaxpar.core.types import Dataset
from jaxpar.step.parts import Parts


def checked(batch, parts: Parts, dataset: Dataset, name: str):
    """The (inputs, labels) `batch`, if the compiled step can take it and all its values mean something.

    On a device an id or a label out of range reads another entry, and a wrong shape compiles a second program: neither
    says so.

    Args:
        batch: numpy (inputs, labels) of one step.
        parts: of the run; its shapes are those that were compiled.
        dataset: for the number of classes.
        name: of the batch, for the message.

    Raises:
        ValueError: naming the batch, what was got and what is needed.
    """
    got, compiled = _described(batch), _described((parts.inputs, parts.labels))
    if got != compiled:
        raise ValueError(
            f"{name} of {dataset.source}:\n  got      {got}\n  compiled {compiled}\n"
            "The step is compiled once, for the shapes of batch 0, and every batch must have them. Fill a short one up "
            "with examples of label -1, which count nothing."
        )
    inputs, labels = batch
    if np.issubdtype(inputs.dtype, np.floating):
        if not np.isfinite(inputs).all():
            where = np.argwhere(~np.isfinite(inputs))[0]
            raise ValueError(f"{name} of {dataset.source}: input {tuple(map(int, where))} is not a finite number.")
    elif inputs.shape == labels.shape:  # text: ids are of the same kind as labels
        _within(f"{name} of {dataset.source}: ids", inputs, 0, dataset.classes)
    _within(f"{name} of {dataset.source}: labels", labels, None, dataset.classes)
    return batch


def _described(batch) -> str:
    inputs, labels = (f"{np.dtype(a.dtype).name}{list(a.shape)}" for a in batch)
    return f"inputs {inputs}, labels {labels}"


def _within(name: str, values: np.ndarray, least: int | None, classes: int) -> None:
    low, high = int(values.min()), int(values.max())
    if high >= classes or (least is not None and low < least):
        wrong = high if high >= classes else low
        bounds = f"below {classes}" if least is None else f"in {least} to {classes - 1}"
        raise ValueError(
            f"{name} must lie {bounds}, got {wrong} at {tuple(map(int, np.argwhere(values == wrong)[0]))}."
        )
