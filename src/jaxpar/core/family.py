"""A folder is a registry: a member of a family is the function that its file is named after."""

import ast
import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxpar.core.refuse import Problem, Refused, near_miss

PACKAGE = Path(__file__).parent.parent
MADE = {  # names of types, since importing them here would make `--help` wait for numpy
    "models": "Layer",
    "norms": "Layer",
    "datasets": "Dataset",
    "schemes": "Scheme",
    "schedules": "Order",
    "policies": "Policy",
    "reducers": "Reducer",
    "loss_scales": "LossScale",
    "sinks": "Sink",
}


def families() -> list[str]:
    """Names of all families, in alphabetical order: a plural folder is one."""
    return sorted(folder.name for folder in PACKAGE.glob("*s") if folder.is_dir())


def said(family: str, name: str = "__init__") -> str:
    """The first line of the docstring of a member's file, or of the family's own, which is read and not run."""
    path = PACKAGE / family / f"{name}.py"
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.is_file() else None
    return (doc or "").partition("\n")[0]


def names(family: str) -> list[str]:
    """Names of all members of `family`, such as `"schemes"`, in alphabetical order; imports none of them."""
    return sorted(
        module.name for module in pkgutil.iter_modules([str(PACKAGE / family)]) if not module.name.startswith("_")
    )


def pick(family: str, name: str, field: str = "") -> Callable[..., Any]:
    """The member of `family` called `name`, or a user's own as `path/to/file.py:name`.

    Raises:
        Refused: if there is no such member; the message names `field` and the likeliest name.
    """
    if ".py:" in name:
        return _from_file(family, name, field)
    if name not in names(family):
        rule = f"there is no such file in {family}/."
        raise Refused([Problem(field or family, name, rule, near_miss(name, names(family)))])
    return getattr(importlib.import_module(f"jaxpar.{family}.{name}"), name)


def parameters(member: Callable[..., Any]) -> list[str]:
    """Names of the arguments of a member, in order."""
    return list(inspect.signature(member).parameters)


def accepted(member: Callable[..., Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `fields` that `member` takes as arguments; None, "not set", is left out."""
    wanted = parameters(member)
    return {name: value for name, value in fields.items() if name in wanted and value is not None}


def defaults(member: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a member that have a default, with it."""
    taken = inspect.signature(member).parameters.values()
    return {one.name: one.default for one in taken if one.default is not inspect.Parameter.empty}


def constant(member: Callable[..., Any], name: str, default: Any) -> Any:
    """What the file that defines `member` calls `name`; `default` if it does not say."""
    return getattr(inspect.unwrap(member), "__globals__", {}).get(name, default)


def needed(module: str, package: str, extra: str, asked: tuple[str, Any]) -> ModuleType:
    """A module of a package that jaxpar does without until something asks for it.

    Args:
        module: its dotted name.
        package: what installs it.
        extra: of jaxpar, that names the package.
        asked: the field and its value that ask for it.

    Raises:
        Refused: with the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        rule = f"{package} is needed for it and cannot be imported: {error}."
        raise Refused([Problem(*asked, rule, f'pip install "jaxpar[{extra}]", or pip install {package}')]) from error


def _from_file(family: str, name: str, field: str) -> Callable[..., Any]:
    """The function that a user's file defines, which says what is wrong with it instead of a traceback."""
    path, _, attribute = name.rpartition(":")

    def refusal(rule: str, legal: str = "") -> Refused:
        return Refused([Problem(field or family, name, rule, legal)])

    if not Path(path).is_file():
        raise refusal(f"there is no file {path}.", "path/to/file.py:name")
    try:
        module = _run(path, Path(path).stat().st_mtime_ns)
    except SyntaxError as error:
        where = path if _same(error.filename, path) else error.filename
        raise refusal(f"{where}:{error.lineno}: {type(error).__name__}: {error.msg}.") from error
    except (Exception, SystemExit) as error:
        inside = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if _same(frame.filename, path)]
        line = inside[-1] if inside else 1
        raise refusal(f"{path}:{line}: {type(error).__name__}: {error}.") from error
    if not hasattr(module, attribute):
        defined = [
            public for public, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
        ]
        raise refusal(f"{path} defines no `{attribute}`.", near_miss(attribute, defined))
    member = getattr(module, attribute)
    if not inspect.isfunction(member):
        raise refusal(
            f"`{attribute}` in {path} is of type {type(member).__name__}.", f"a function: def {attribute}(...)"
        )
    where = f"{path}:{inspect.unwrap(member).__code__.co_firstlineno}"
    return _guarded(member, where, MADE.get(family, ""), refusal)


def _same(one: str | None, other: str) -> bool:
    return bool(one) and os.path.abspath(one) == os.path.abspath(other)


@functools.lru_cache(maxsize=64)
def _run(path: str, changed: int) -> ModuleType:
    """The module in `path`, run once per version of it: the one place where jaxpar runs code that it is given."""
    spec = importlib.util.spec_from_file_location(f"jaxpar_user_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


def _guarded(member: Callable, where: str, made: str, refusal: Callable[..., Refused]) -> Callable:
    """`member`, refused if it does not take what it is called with, or returns something else than its family does."""

    @functools.wraps(member)
    def call(*args, **fields):
        try:
            inspect.signature(member).bind(*args, **fields)
        except TypeError as error:
            given = ", ".join([*(["positional ones"] if args else []), *fields])
            rule = f"{where}: `{member.__name__}` cannot be called: {error}; its arguments are {given or 'none'}."
            raise refusal(rule, "those arguments, and a default for every other") from error
        found = member(*args, **fields)
        if made and type(found).__name__ != made:
            rule = f"{where}: `{member.__name__}` returned a value of type {type(found).__name__}."
            raise refusal(rule, f"return {made}(...)")
        return found

    return call
