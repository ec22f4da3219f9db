"""Does a byte-level GPT learn real text under 2.5-D tensor parallelism?

Expect: yes. On the standard library's sources, its held-out loss ends well under that of a byte bigram model fitted on
the same files, on 8 simulated devices as on one. Two to three minutes on 2 cores.

    python -m experiments.lm
    python -m experiments.lm --plan tensor=three_d:2x2x2 --name cube
    python -m experiments.lm --data.name tiny_shakespeare --data-dir FOLDER --name shakespeare
"""

import math

from jaxpar import Data, Model, Plan, Recipe
from jaxpar.cli import runner

BASE = Recipe(
    model=Model("gpt", layers=4, width=128, heads=4, hidden=512, context=64, activation="gelu_tanh"),
    data=Data("stdlib_text"),
    plan=Plan.parse("tensor=two_half_d:2x2x2"),
    batch=16,
    steps=600,
    learning_rate=4e-3,
    warmup=40,
    evaluate_batches=32,
)


def main(recipe, fit):
    """Train a byte-level GPT on real text, and compare it with a byte bigram model."""
    from jaxpar.report import bigram, bill, pictures
    from jaxpar.step.generate import sample

    run = fit(recipe)
    baseline = bigram.nats(*run.dataset.splits)
    _, nats = run.held_out[-1]
    print(f"\n{bill.table(run.bill)}\n")
    for name, value in (("byte bigram model", baseline), ("this model", nats)):
        print(f"held out, {name:<18} {value:.4f} nats, {value / math.log(2):.4f} bits per byte")
    print("\n" + sample(run, prompt="def ", count=240) + "\n")
    title = f"{recipe.model.name} on {recipe.data.name}, {recipe.plan}"
    picture = pictures.losses(run.folder / "loss.png", run.losses, run.held_out, {"byte bigram": baseline}, title)
    print(f"loss picture: {picture}\neverything else: {run.folder}")


if __name__ == "__main__":
    runner(BASE, main)
