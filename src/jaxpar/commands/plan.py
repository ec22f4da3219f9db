"""Say what a plan costs before it runs: mesh, bytes, memory, idle time.

The devices need not be there, and nothing is compiled.

python -m jaxpar plan experiments.lm --plan data=4,tensor=three_d:2x4x2
python -m jaxpar plan --model.name mlp --data.name digits --plan pipe=4,microbatches=8 --timetable
python -m jaxpar plan runs/digits/recipe.json --json
python -m jaxpar plan experiments.lm --plan pipe=4,schedule=zero_bubble_h1,microbatches=8 --picture timetable.png
"""

import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from jaxpar import cli
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Problem, Refused
from jaxpar.train import record


@dataclass(frozen=True)
class Shown:
    """What is printed.

    Attributes:
        timetable: also the pipeline's timetable, a row per device; backward takes twice as long as forward.
        picture: write it as PNG, with what devices hold meanwhile.
        json: print one JSON object instead.
    """

    timetable: Annotated[bool, arg(prefix_name=False)] = False
    picture: Annotated[str | None, arg(prefix_name=False, metavar="FILE.png")] = None
    json: Annotated[bool, arg(prefix_name=False)] = False


@dataclass(frozen=True)
class Asked:
    """The flags: those of `python -m jaxpar train`, so that its words can be had a forecast of as they are."""

    recipe: Annotated[Recipe, arg(name="")]
    shown: Shown
    run: cli.Kept


def plan(argv: Sequence[str]) -> None:
    """Print the forecast of a recipe: of flags, of a JSON file, or the `BASE` of a module, changed by flags.

    Raises:
        Refused: for a first word that names no recipe, and for all that `prepare` refuses.
        SystemExit: as of `cli.flags`.
    """
    base = Recipe()
    if argv and not argv[0].startswith("-"):
        base, argv = _named(argv[0]), argv[1:]
    asked = cli.flags(Asked, argv, __doc__, Asked(base, Shown(), cli.Kept("train")))
    cli.check_devices(asked.recipe.plan, asked.run.devices)
    import jax

    from jaxpar.report import forecast, timetables
    from jaxpar.step.parts import prepare

    jax.config.update("jax_platforms", "cpu")  # a run may hold the accelerators of this machine
    parts, _ = prepare(asked.recipe, asked.run.data_dir)
    found, order = forecast.forecast(asked.recipe.plan, parts), parts.pipeline.table.order
    shown = {"timetable": timetables.text(order, forecast.TIMES)} if asked.shown.timetable else {}
    if asked.shown.picture:
        path, title = Path(os.path.expanduser(asked.shown.picture)), asked.recipe.plan.schedule.partition(":")[0]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shown["picture"] = str(timetables.picture(path, {title: order}, forecast.TIMES))
        except (OSError, ValueError) as error:
            problem = Problem("picture", path, f"cannot be written: {error}.", "a file that ends in .png")
            raise Refused([problem]) from error
    print(json.dumps(found | shown) if asked.shown.json else "\n\n".join([forecast.text(found), *shown.values()]))


def _named(word: str) -> Recipe:
    """The recipe in a JSON file, or the `BASE` of a module such as `experiments.lm`."""
    if word.endswith(".json"):
        return record.recipe(Path(word))
    if "" not in sys.path and os.getcwd() not in sys.path:  # as an installed script is started
        sys.path.insert(0, os.getcwd())
    legal = "a module with a `BASE = Recipe(...)`, such as experiments.lm; a recipe's JSON file; or flags alone"
    name = word.removesuffix(".py").replace("/", ".")
    try:
        module = importlib.import_module(name) if all(map(str.isidentifier, name.split("."))) else None
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # something that the module itself imports
            raise
        module = None
    if module is None:
        raise Refused([Problem("recipe", word, "there is no such module.", legal)])
    base = getattr(module, "BASE", None)
    if not isinstance(base, Recipe):
        raise Refused([Problem("recipe", word, "this module has no recipe called BASE.", legal)])
    return base
