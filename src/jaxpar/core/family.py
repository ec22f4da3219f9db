"""A folder is a registry: a member of a family is the function that its file is named after."""

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxpar.core.refuse import Problem, Refused, near_miss


def names(family: str) -> list[str]:
    """Names of all members of `family`, such as `"schemes"`, in alphabetical order; imports none of them."""
    folder = Path(__file__).parent.parent / family
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]) if not module.name.startswith("_"))


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


def _from_file(family: str, name: str, field: str) -> Callable[..., Any]:
    path, _, attribute = name.rpartition(":")
    if not Path(path).is_file():
        raise Refused([Problem(field or family, name, f"there is no file {path}.", "path/to/file.py:name")])
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, attribute):
        defined = [public for public in vars(module) if not public.startswith("_")]
        raise Refused(
            [Problem(field or family, name, f"{path} defines no `{attribute}`.", near_miss(attribute, defined))]
        )
    return getattr(module, attribute)


def defaults(member: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a member that have a default, with it."""
    taken = inspect.signature(member).parameters.values()
    return {one.name: one.default for one in taken if one.default is not inspect.Parameter.empty}
