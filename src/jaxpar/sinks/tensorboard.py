"""Metrics for TensorBoard: the folder tensorboard/ of the run; needs tensorboardX."""

import json
from pathlib import Path

from tensorboardX import SummaryWriter

from jaxpar.core.types import Sink


def tensorboard(folder: Path, recipe: dict, lines: list[dict]) -> Sink:
    """A scalar per name; see them by `tensorboard --logdir runs`.

    Args:
        folder: of the run.
        recipe: is shown as text.
        lines: those before the checkpoint from which the run goes on; what was written after them is hidden.
    """
    step = max((line["step"] for line in lines), default=0)
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
    if not lines:
        writer.add_text("recipe", f"```json\n{json.dumps(recipe, indent=2)}\n```", 0)

    def write(line: dict) -> None:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):  # null: an update that was skipped
                writer.add_scalar(name, value, line["step"])

    return Sink(write, writer.close)
