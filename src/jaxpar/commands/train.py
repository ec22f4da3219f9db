"""Train a model: a small GPT on Python's own source unless told otherwise.

python -m jaxpar train --plan tensor=two_d:2x4 --steps 100
python -m jaxpar train --model.name convnet --data.name digits --model.width 16 --plan data=8 --name digits
python -m jaxpar train --model.name my_models.py:mlp2 --data.name digits
python -m jaxpar train recipe.json --seed 1 --name again
python -m jaxpar train runs/digits/recipe.json
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxpar import cli
from jaxpar.core.recipe import Recipe
from jaxpar.train import folder, record


def train(argv: Sequence[str]) -> None:
    """Train what the flags say, beginning with a recipe in a JSON file if the first word is the path of one.

    The recipe.json of a run resumes that run; another file gives its name to a new one.

    Raises:
        SystemExit: as of `cli.runner`.
    """
    base, where = Recipe(), {"name": "train"}
    if argv and argv[0].endswith(".json") and not argv[0].startswith("-"):
        path, argv = Path(argv[0]), argv[1:]
        base, where = record.recipe(path), {"name": path.stem}
        if path.name == folder.RECIPE and (path.parent / folder.PLAN).is_file():
            run = Path(os.path.abspath(path.parent))
            where = {"name": run.name, "runs_dir": os.path.relpath(run.parent)}
    cli.runner(base, _trained, argv=argv, **where)


def _trained(recipe: Recipe, fit: Callable) -> None:
    """Train a model on data, under a plan; a RECIPE.json may stand before the flags, which then change it."""
    run = fit(recipe)
    for step, nats in run.held_out[-1:]:
        print(f"held-out loss {nats:.4f} nats after {step} steps")
    for nats in run.losses[-1:]:
        print(f"training loss {nats:.4f} nats; everything is in {run.folder}")
