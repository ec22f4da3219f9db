"""What a trained byte-level language model writes."""

import jax
import numpy as np

from jaxpar.plan import padding
from jaxpar.step.generate import Trained, generate
from jaxpar.train.run import Run


def sample(run: Run, prompt: str, *, count: int = 200, temperature: float = 0.8, seed: int = 0) -> str:
    """Continue `prompt` by `count` bytes, on one device whatever the plan of the run.

    Args:
        run: of a model of bytes, from `fit`.
        prompt: at least one character.
        count: bytes to add.
        temperature: what logits are divided by, above 0.
        seed: of the draws.

    Raises:
        ValueError: if the data of the run is not text, or the prompt is empty.
    """
    if len(run.parts.labels.shape) != 2 or run.dataset.classes > 256:
        raise ValueError(f"sample needs a model of bytes; this run was trained on {run.dataset.source}.")
    if not prompt:
        raise ValueError("sample needs a prompt of at least one character, such as prompt='def '.")
    like = run.program.unpadded
    params, extra = (
        padding.unpad(jax.tree.map(np.asarray, tree), to)
        for tree, to in ((run.state.params, like.params), (run.state.extra, like.extra))
    )
    trained = Trained(run.parts.model, run.parts.settings, params, extra)
    window = run.parts.inputs.shape[1]
    ids = generate(trained, [*prompt.encode()], count=count, window=window, temperature=temperature, seed=seed)
    return bytes(ids.astype(np.uint8)).decode(errors="replace")
