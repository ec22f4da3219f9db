"""Say what a plan costs before it runs: flops, bytes, memory, idle time.

First as predicted from formulas, then as read from the step, compiled for devices that need not be there: those that
--topology describes, else simulated ones.

python -m jaxpar plan experiments.lm --plan data=4,tensor=three_d:2x4x2
python -m jaxpar plan --model.name mlp --data.name digits --plan pipe=4,microbatches=8 --timetable
python -m jaxpar plan experiments.lm --plan tensor=fsdp:8 --topology v5e:2x4
python -m jaxpar plan runs/digits/recipe.json --json --predict
python -m jaxpar plan experiments.lm --plan pipe=4,schedule=zero_bubble_h1,microbatches=8 --picture timetable.png
"""

import dataclasses
import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from jaxpar import cli
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Problem, Refused, refuse
from jaxpar.train import record


@dataclass(frozen=True)
class Shown:
    """What is printed.

    Attributes:
        topology: devices to compile for, such as v5e:4x4, v5p:4x4x4, v5e:4x4*2 (slices) or h100:1x8x8; with the extra
            `jaxpar[aot-tpu]` or `jaxpar[aot-cuda12]`.
        predict: stop before anything is compiled.
        explain: also the formula that gave each predicted figure.
        timetable: also the pipeline's timetable, a row per device; backward takes twice as long as forward.
        picture: write it as PNG, with what devices hold meanwhile.
        roofline: write the ceilings of arithmetic, memory and communication on the topology, and the plan, as PNG.
        layout: also which device holds what.
        layout_picture: write that as PNG.
        json: print one JSON object instead.
    """

    topology: Annotated[str | None, arg(prefix_name=False)] = None
    predict: Annotated[bool, arg(prefix_name=False)] = False
    explain: Annotated[bool, arg(prefix_name=False)] = False
    timetable: Annotated[bool, arg(prefix_name=False)] = False
    picture: Annotated[str | None, arg(prefix_name=False, metavar="FILE.png")] = None
    roofline: Annotated[str | None, arg(prefix_name=False, metavar="FILE.png")] = None
    layout: Annotated[bool, arg(prefix_name=False)] = False
    layout_picture: Annotated[str | None, arg(prefix_name=False, metavar="FILE.png")] = None
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
        Refused: for a first word that names no recipe, and for all that `sketch` refuses.
        SystemExit: as of `cli.flags`.
    """
    base = Recipe()
    if argv and not argv[0].startswith("-"):
        base, argv = _named(argv[0]), argv[1:]
    asked = cli.flags(Asked, argv, __doc__, Asked(base, Shown(), cli.Kept("train")))
    cli.check_devices(asked.recipe.plan, asked.run.devices)
    import jax

    from jaxpar.plan import mesh
    from jaxpar.report import forecast, topology
    from jaxpar.step.parts import sketch
    from jaxpar.step.program import traced

    jax.config.update("jax_platforms", "cpu")  # a run may hold the accelerators of this machine
    plan, shown, say = asked.recipe.plan, asked.shown, _nothing if asked.shown.json else _printed
    pictures = ("picture", "layout_picture", "roofline")
    refuse(problem for field in pictures for problem in _unwritable(field, getattr(shown, field)))
    where = None if shown.topology is None else topology.parse(shown.topology)
    if where and mesh.needed(plan) not in (0, where.count):
        rule = f"has {where.count} devices, and the plan {plan} takes {mesh.needed(plan)}."
        raise Refused([Problem("topology", where.word, rule, "a topology and a plan for as many devices")])
    compile_it = not shown.predict and (where or mesh.needed(plan) <= MOST_COMPILED)
    mesh.simulate(mesh.needed(plan) if compile_it and not where else 1)
    parts = sketch(asked.recipe, asked.run.data_dir)
    trace = traced(parts) if parts.partition == "manual" else None
    found = forecast.forecast(plan, parts, where, trace)
    more = _ceilings(found, parts, where, trace, shown) | _more(found["memory"]["predicted"], plan, parts, trace, shown)
    say("\n\n".join([forecast.text(found), *map(str, more.values())]))
    if not compile_it and not shown.predict:
        say(f"\nnot compiled: that is done for {MOST_COMPILED} simulated devices at most, or for a --topology")
    if compile_it:
        say(f"\ncompiling for {where.word if where else str(found['devices']) + ' simulated devices'} ...\n")
        found = _with_compiled(found, parts, where)
        say(forecast.text(found))
    if found["fits"] is False:
        helps = _remedies(asked, found, parts, where)
        more |= {"remedies": helps[0]}
        say(helps[1])
    if shown.json:
        print(json.dumps(found | more))


MOST_COMPILED = 64  # simulated devices that a step is compiled for unasked


def _printed(words: str) -> None:
    print(words, flush=True)


def _nothing(words: str) -> None:
    pass


def _with_compiled(found: dict, parts, where) -> dict:
    """The forecast, and what the step says that was compiled for a topology or for simulated devices."""
    from jaxpar.report import compiled, forecast
    from jaxpar.step.program import program

    if where:
        try:
            return forecast.with_compiled(found, compiled.compile_for(parts, where))
        except compiled.DoesNotFit as error:
            return forecast.without_room(found, error)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    made = program(parts)
    lowered, began = made.step.lower(made.shapes, made.batch), time.perf_counter()
    step = lowered.compile()
    return forecast.with_compiled(found, compiled.read(parts, made, step, time.perf_counter() - began))


def _remedies(asked: Asked, found: dict, parts, where) -> tuple[list[dict], str]:
    """What would make the plan fit the topology: as plain values, and as words."""
    from jaxpar.report import remedies
    from jaxpar.step.parts import sketch

    def remake(plan):
        return sketch(dataclasses.replace(asked.recipe, plan=plan), asked.run.data_dir)

    plan, room = asked.recipe.plan, found["room"]
    need = remedies.Need(plan, parts, remake, room, where.platform, where.chip)
    helps, problem = remedies.answer(need, "it does not fit.", functools.partial(print, file=sys.stderr, flush=True))
    return [one._asdict() for one in helps], str(problem)


def _ceilings(found: dict, parts, where, trace, shown: Shown) -> dict:
    """What bounds the step on the topology, if there is one."""
    from jaxpar.report import ceilings

    if where is None or trace is None:
        if shown.roofline:
            rule = "needs devices of a known kind, and a plan that is not partition=auto."
            raise Refused([Problem("roofline", shown.roofline, rule, "--topology v5e:2x4")])
        return {}
    roof = ceilings.roof(found, parts, where, trace)
    made = {"ceilings": ceilings.as_json(roof) if shown.json else ceilings.text(roof)}
    if shown.roofline:
        from jaxpar.report import roofline

        drawn = functools.partial(roofline.picture, roofs=[roof])
        made["roofline"] = _drawn("roofline", shown.roofline, drawn)
    return made


def _more(held: dict, plan, parts, trace, shown: Shown) -> dict:
    """What was asked for besides the figures: text, or where a picture lies."""
    from jaxpar.report import forecast

    order, axes, made = parts.pipeline.table.order, parts.settings.placement.scheme.axes or {"data": 1}, {}
    if shown.explain:
        from jaxpar.report import explain

        found = explain.rows(parts, trace, forecast.TIMES, held)
        made["explain"] = explain.as_json(found) if shown.json else explain.text(found)
    if shown.timetable or shown.picture:
        from jaxpar.report import timetables
    if shown.layout or shown.layout_picture:
        from jaxpar.report import layouts
    if shown.timetable:
        made["timetable"] = timetables.text(order, forecast.TIMES)
    if shown.layout:
        made["layout"] = layouts.text(axes, layouts.arrays(parts))
    if shown.picture:
        orders = {plan.schedule.partition(":")[0]: order}
        drawn = functools.partial(timetables.picture, orders=orders, times=forecast.TIMES)
        made["picture"] = _drawn("picture", shown.picture, drawn)
    if shown.layout_picture:
        drawn = functools.partial(layouts.picture, axes=axes, shown=layouts.arrays(parts))
        made["layout_picture"] = _drawn("layout_picture", shown.layout_picture, drawn)
    return made


def _unwritable(field: str, word: str | None) -> Iterator[Problem]:
    """One problem if a picture cannot go by this name."""
    if word is not None and (not word.lower().endswith(".png") or Path(os.path.expanduser(word)).is_dir()):
        yield Problem(field, word, "is no name of a picture.", "a file that ends in .png")


def _drawn(field: str, word: str, draw) -> str:
    """Where a picture was written."""
    path = Path(os.path.expanduser(word))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(draw(path))
    except (OSError, ValueError) as error:
        raise Refused([Problem(field, path, f"cannot be written: {error}.", "a file that ends in .png")]) from error


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
