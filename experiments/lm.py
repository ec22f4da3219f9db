"""Does a byte-level GPT learn real text under 2.5-D tensor parallelism?

Expect: yes. On the standard library's sources its held-out loss ends well under that of a byte bigram model fitted on
the same files, on 8 simulated devices as on one. Two to three minutes on 2 cores.

    python -m experiments.lm
    python -m experiments.lm --plan tensor=three_d:2x2x2 --name cube
    python -m experiments.lm --data.name tiny_shakespeare --data-dir FOLDER --name shakespeare
"""

import math

import numpy as np

from jaxpar import Data, Model, Plan, Recipe
from jaxpar.cli import runner

BASE = Recipe(
    model=Model("gpt", layers=4, width=128, heads=4, hidden=512, context=64, activation="gelu_tanh"),
    data=Data("stdlib_text"),
    plan=Plan.parse("tensor=two_half_d:2x2x2"),
    batch=16,
    steps=600,
    learning_rate=4e-3,
    evaluate_batches=64,
)


def bigram(train: np.ndarray, held_out: np.ndarray) -> float:
    """Nats per byte of `held_out` under the frequencies of byte pairs in `train`, each pair counted 0.01 times more."""
    pairs = np.full((256, 256), 0.01)
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    likely = pairs / pairs.sum(axis=1, keepdims=True)
    return float(-np.log(likely[held_out[:-1], held_out[1:]]).mean())


def main(recipe, fit):
    """Train a byte-level GPT on real text, and compare it with a byte bigram model."""
    from jaxpar import losses_picture, sample, table

    run = fit(recipe)
    baseline, (_, nats) = bigram(*run.dataset.splits), run.held_out[-1]
    print(f"\n{table(run.bill)}\n" if run.bill else "")
    for name, value in (("byte bigram model", baseline), ("this model", nats)):
        print(f"held out, {name:<18}{value:.4f} nats, {value / math.log(2):.4f} bits per byte")
    print(f"\n{sample(run, 'def ', count=240)}\n")
    title = f"{recipe.model.name} on {recipe.data.name}, {recipe.plan}"
    picture = losses_picture(run.folder / "loss.png", run.losses, run.held_out, {"byte bigram": baseline}, title)
    print(f"loss picture: {picture}\neverything else: {run.folder}")


if __name__ == "__main__":
    runner(BASE, main)
