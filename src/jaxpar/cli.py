"""The command line: a recipe as typed flags, one message for bad input, and `python -m jaxpar`.

Nothing here imports jax before the flags are read, so that `--help` and a misspelt flag are answered at once.
"""

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from jaxpar.core import family
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Problem, Refused, near_miss

PACKAGE = Path(__file__).parent
HEAD = "jaxpar: write a model once; choose by name how it is laid out over devices; get the same numbers."
TAIL = "Each takes --help. The same from Python: from jaxpar import Recipe, Plan, fit"
_bare = tyro.conf.arg(prefix_name=False)


@dataclass(frozen=True)
class Kept:
    """Where the run is kept and who watches it; none of this changes what is learned.

    Attributes:
        name: folder of this run in --runs-dir; one that is there goes on from its last checkpoint.
        devices: simulated CPU devices; as many as the plan needs, which is also the default.
        runs_dir: folder of all runs.
        data_dir: folder with the files of the dataset; by default the dataset's own.
        overwrite: delete the run that has this name, and start anew.
        watchdog: seconds in which something must be finished, else end with exit code 76 and say where it hangs.
        sinks: further places for metrics, of csv, tensorboard and wandb, with commas between.
    """

    name: Annotated[str, _bare]
    devices: Annotated[int | None, _bare] = None
    runs_dir: Annotated[str, _bare] = "runs"
    data_dir: Annotated[str | None, _bare] = None
    overwrite: Annotated[bool, _bare] = False
    watchdog: Annotated[float | None, _bare] = None
    sinks: Annotated[str, _bare] = ""


@dataclass(frozen=True)
class Options(Kept):
    """The flags of a run: where it is kept, and those of its recipe.

    Attributes:
        recipe: every choice of the run.
    """

    recipe: Recipe = field(default_factory=Recipe)


@dataclass(frozen=True)
class _Groups:
    """The same as --help shows them."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    run: Kept


def runner(
    base: Recipe, main: Callable, *, name: str = "", argv: Sequence[str] | None = None, runs_dir: str = "runs"
) -> None:
    """Run `main` under the flags of the command line.

    Args:
        base: the recipe, whose fields the flags change.
        main: `main(recipe, fit)`, with `jaxpar.fit` bound to --name, --runs-dir, --data-dir and the like.
        name: default of --name; by default that of the file that defines `main`.
        argv: flags; by default those of this process.
        runs_dir: default of --runs-dir.

    Raises:
        SystemExit: 2 for bad input, 76 if a step hung, 77 if the run was stopped and saved, 78 if a loss was no number.
    """
    with exit_codes():
        options = parse(base, main, name or Path(main.__code__.co_filename).stem, argv, runs_dir)
        main(options.recipe, ready(options))


def parse(base: Recipe, main: Callable, name: str, argv: Sequence[str] | None, runs_dir: str = "runs") -> Options:
    """The flags as values, arguments as of `runner`; imports no jax.

    Raises:
        SystemExit: 0 after --help, 2 with a message on stderr for a flag or value that is none.
    """
    module = sys.modules[main.__module__].__doc__ or ""
    default = _Groups(base, Kept(name, runs_dir=runs_dir))
    found = flags(_Groups, argv, "\n\n".join([main.__doc__ or "", module]).strip(), default)
    return Options(**vars(found.run), recipe=found.recipe)


def flags(wanted: Callable, argv: Sequence[str] | None, doc: str, default=None):
    """What `wanted` makes of its arguments, which are read from the flags `argv`.

    Args:
        wanted: a function or dataclass; each argument is a flag.
        argv: flags; by default those of this process.
        doc: what --help says: its first paragraph above the flags, its lines that begin with `python -m` below them.
        default: what the fields are unless a flag says otherwise.

    Raises:
        SystemExit: 0 after --help, 2 with a message on stderr for a flag or value that is none.
    """
    given = {} if default is None else {"default": default}
    config, about = (tyro.conf.FlagCreatePairsOff,), doc.partition("\n\n")[0]
    try:
        with _plans():
            return tyro.cli(wanted, args=argv, prog=_program(), description=about, config=config, **given)
    except SystemExit as stopped:
        lines = [f"  {line.strip()}" for line in doc.splitlines() if line.strip().startswith("python -m ")]
        if not stopped.code and lines:  # after --help
            print("\n".join(["examples:", *lines]))
        raise


def ready(options: Options) -> Callable:
    """`jaxpar.fit` with its flags, once jax is imported and set up: simulated devices and a compile cache.

    Raises:
        Refused: if --devices is not what the plan needs, or another flag cannot be.
    """
    from jaxpar.train.lock import refuse_held

    refuse_held(Path(os.path.expanduser(options.runs_dir)) / options.name)  # at once: importing jax takes seconds
    from jaxpar.plan import mesh
    from jaxpar.train.cache import use_cache
    from jaxpar.train.fit import fit

    needed = check_devices(options.recipe.plan, options.devices)
    names = tuple(filter(None, (name.strip() for name in options.sinks.split(","))))
    mesh.simulate(needed or 1)
    if warning := use_cache():
        print(f"warning: {warning}", file=sys.stderr)
    keywords = {key: getattr(options, key) for key in ("name", "runs_dir", "data_dir", "overwrite", "watchdog")}
    return functools.partial(fit, **keywords, **({"sinks": names} if names else {}))


def check_devices(plan: Plan, devices: int | None) -> int:
    """How many devices `plan` needs; 0 for one that will be refused.

    Raises:
        Refused: if --devices says another number.
    """
    from jaxpar.plan import mesh

    needed = mesh.needed(plan)
    if needed and devices not in (None, needed):
        legal = f"{needed}, or no --devices; or a plan for {devices}"
        raise Refused([Problem("devices", devices, f"the plan {plan} needs {needed}.", legal)])
    return needed


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
    """Run `python -m jaxpar COMMAND`: the member of `commands/` of that name, with the words after it.

    Raises:
        SystemExit: with what the command returns, unless that is None or 0; 2 for bad input.
    """
    command, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    with exit_codes():
        if command in ("-h", "--help"):
            print(overview())
            return
        if command not in family.names("commands"):
            legal = near_miss(command, family.names("commands"))
            raise Refused([Problem("command", command, "there is no such command.", legal)])
        if code := family.pick("commands", command)(rest):
            sys.exit(code)


def overview() -> str:
    """What there is, a line per command, in the words of its file, which is read and not run."""
    lines = [(f"jaxpar {name}", family.said("commands", name)) for name in family.names("commands")]
    lines.append(("experiments.NAME", "One question per file, answered by runs."))
    return "\n".join([HEAD, "", *(f"  python -m {name:<18}{said}" for name, said in lines), "", TAIL])


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
    """What was typed to start this process, as `python -m experiments.lm` or `python -m jaxpar train`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    started = f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    command = [word for word in sys.argv[1:2] if word in family.names("commands")]
    return " ".join([started, *command]) if Path(started.split()[-1]).stem == "jaxpar" else started


def _is_bad_input(error: Exception) -> bool:
    """Whether jaxpar itself raised a ValueError, which it does for what a caller can mend.

    Other errors are somebody's bug and keep their traceback; so do those that passed through jax, which leaves a note.
    """
    if isinstance(error, Refused):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and PACKAGE in Path(frames[-1].filename).parents
    return isinstance(error, ValueError) and ours and not getattr(error, "__notes__", ())
