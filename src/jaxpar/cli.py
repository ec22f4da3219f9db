"""The command line: a recipe as typed flags, one message for bad input, and `python -m jaxpar`.

Nothing here imports jax before the flags are read, so that `--help` and a misspelt flag are answered at once.
"""

import ast
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxpar.core import family
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Problem, Refused, near_miss

PACKAGE = Path(__file__).parent
OVERVIEW = """\
jaxpar: write a model once; choose by name how it is laid out over devices; get the same numbers.

  python -m jaxpar train [flags]     train a model: a small GPT on Python's own source, if no flag says otherwise
  python -m jaxpar list [family]     what there is to choose from: models, datasets, schemes, norms, ...
  python -m experiments.NAME         one question per file, answered by runs

Each takes --help. The same from Python: from jaxpar import Recipe, Plan, fit"""


@dataclass(frozen=True)
class Options:
    """The flags of a run: those of its recipe, and where it is kept.

    Attributes:
        recipe: every choice of the run.
        name: folder of this run in --runs-dir; one that is there goes on from its last checkpoint.
        devices: simulated CPU devices; as many as the plan needs, which is also the default.
        runs_dir: folder of all runs.
        data_dir: folder with the files of the dataset; by default the dataset's own.
        overwrite: delete the run that has this name, and start anew.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    name: str
    devices: int | None = None
    runs_dir: str = "runs"
    data_dir: str | None = None
    overwrite: bool = False


def runner(base: Recipe, main: Callable, *, name: str = "", argv: Sequence[str] | None = None) -> None:
    """Run `main` under the flags of the command line.

    Args:
        base: the recipe, whose fields the flags change.
        main: `main(recipe, fit)`, with `jaxpar.fit` bound to --name, --runs-dir, --data-dir and --overwrite.
        name: default of --name; by default that of the file that defines `main`.
        argv: flags; by default those of this process.

    Raises:
        SystemExit: 2 for bad input, 77 if the run was stopped and saved, 78 if a loss was no number.
    """
    with exit_codes():
        options = parse(base, main, name or Path(main.__code__.co_filename).stem, argv)
        main(options.recipe, ready(options))


def parse(base: Recipe, main: Callable, name: str, argv: Sequence[str] | None) -> Options:
    """The flags as values; imports no jax.

    Raises:
        SystemExit: 0 after --help, 2 with a message on stderr for a flag or value that is none.
    """
    description = main.__doc__ or sys.modules[main.__module__].__doc__ or ""
    with _plans():
        return tyro.cli(
            Options,
            args=argv,
            prog=_program(),
            description=description.partition("\n\n")[0],
            default=Options(base, name),
            config=(tyro.conf.FlagCreatePairsOff,),
        )


def ready(options: Options) -> Callable:
    """`jaxpar.fit` with its flags, once jax is imported and set up: simulated devices and a compile cache.

    Raises:
        Refused: if --devices is not what the plan needs.
    """
    from jaxpar.train.lock import refuse_held

    refuse_held(Path(options.runs_dir).expanduser() / options.name)  # at once: importing jax takes seconds
    from jaxpar.plan import mesh
    from jaxpar.train.cache import use_cache
    from jaxpar.train.fit import fit

    plan, needed = options.recipe.plan, mesh.needed(options.recipe.plan)
    if needed and options.devices not in (None, needed):
        legal = f"{needed}, or no --devices; or a plan for {options.devices}"
        raise Refused([Problem("devices", options.devices, f"the plan {plan} needs {needed}.", legal)])
    mesh.simulate(needed or 1)
    if warning := use_cache():
        print(f"warning: {warning}", file=sys.stderr)
    keywords = {field: getattr(options, field) for field in ("name", "runs_dir", "data_dir", "overwrite")}
    return functools.partial(fit, **keywords)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn what a user can mend, and what a scheduler must know, into one message on stderr and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped at once; nothing was saved since the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read stdout has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        code = getattr(error, "exit_code", 2 if _is_bad_input(error) else None)
        if code is None:
            raise
        print(error, file=sys.stderr)
        sys.exit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m jaxpar train|list`."""
    command, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if command in ("-h", "--help"):
        print(OVERVIEW)
    elif command == "train":
        runner(Recipe(), train, name="train", argv=rest)
    elif command == "list":
        with exit_codes():
            list_members(rest)
    else:
        print(f"there is no command {command!r}: {near_miss(command, ['train', 'list'])}", file=sys.stderr)
        sys.exit(2)


def train(recipe: Recipe, fit: Callable) -> None:
    """Train a model on data, under a plan."""
    run = fit(recipe)
    for step, nats in run.held_out[-1:]:
        print(f"held-out loss {nats:.4f} nats after {step} steps")
    print(f"training loss {run.losses[-1]:.4f} nats; everything is in {run.folder}")


def list_members(wanted: Sequence[str]) -> None:
    """Print each family, or those in `wanted`, with what each member says of itself; imports no member.

    Raises:
        Refused: for a family that there is not.
    """
    families = sorted(folder.name for folder in PACKAGE.glob("*s") if folder.is_dir())  # plural folder = family
    for unknown in [name for name in wanted if name not in families]:
        raise Refused([Problem("family", unknown, "there is no such family.", near_miss(unknown, families))])
    for name in wanted or families:
        print(f"{name}: {_said(PACKAGE / name / '__init__.py')}")
        for member in family.names(name):
            print(f"  {member:<18}{_said(PACKAGE / name / f'{member}.py')}")


def _said(path: Path) -> str:
    """First line of the docstring of a file, which is read and not run."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.is_file() else None
    return (doc or "").partition("\n")[0]


def _plans() -> tyro.constructors.ConstructorRegistry:
    """How tyro reads and writes a Plan: as its string."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo):
        if info.type is not Plan:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PLAN",
            instance_from_str=lambda words: Plan.parse(words[0]),
            is_instance=lambda value: isinstance(value, Plan),
            str_from_instance=lambda plan: [str(plan)],
        )

    return registry


def _program() -> str:
    """What was typed to start this process, as `python -m experiments.lm`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return Path(sys.argv[0]).name
    started = f"python -m {spec.name.removesuffix('.__main__')}"
    return f"{started} train" if spec.name.startswith("jaxpar") else started


def _is_bad_input(error: Exception) -> bool:
    """Whether jaxpar itself raised a ValueError, which it does for what a caller can mend.

    Other errors are somebody's bug and keep their traceback; so do those that passed through jax, which leaves a note.
    """
    if isinstance(error, Refused):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and PACKAGE in Path(frames[-1].filename).parents
    return isinstance(error, ValueError) and ours and not getattr(error, "__notes__", ())
