"""The text that names a member of a family and some of its arguments: `group:groups=8`."""

import functools
import re
from collections.abc import Callable
from typing import Any

from jaxpar.core import family
from jaxpar.core.refuse import Problem, Refused, near_miss

JOINED = re.compile(r"(?<!\d[eE])[+]")  # not the one of 1e+6


def member(folder: str, text: str, field: str, reserved: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The member that `text` names, with the arguments that stand behind its name.

    They are joined by `+`, each NAME=VALUE for an argument that has a default, whose type says how VALUE is read: a
    number, `true` or `false`, or a word.

    Args:
        folder: of the family, such as `"norms"`.
        text: such as `layer`, `online:forward=0.99+control=clamp`, or `path/to/file.py:name`.
        field: of the recipe, for messages.
        reserved: arguments that are the caller's own to give.

    Raises:
        Refused: naming every argument that is unknown, given twice or of the wrong type.
    """
    path, python, rest = text.rpartition(".py:")
    name, colon, items = rest.partition(":")
    found = family.pick(folder, path + python + name, field)
    known = {key: value for key, value in family.defaults(found).items() if key not in reserved}
    fields: dict[str, Any] = {}
    problems = []
    for item in JOINED.split(items) if colon else ():
        key, equals, word = item.partition("=")
        if not equals:
            problems.append(Problem(field, text, f"`{item}` is not NAME=VALUE.", _example(name, known)))
        elif key not in known:
            problems.append(Problem(field, text, f"{name} has no `{key}`.", near_miss(key, known)))
        elif key in fields:
            problems.append(Problem(field, text, f"says `{key}` twice.", f"{name}:{key}={word}"))
        else:
            try:
                fields[key] = _value(word, known[key])
            except ValueError as error:
                legal = f"{name}:{key}={str(known[key]).lower()}"
                problems.append(Problem(field, text, f"`{key}` must be {error}.", legal))
    if problems:
        raise Refused(problems)
    return functools.wraps(found)(functools.partial(found, **fields)) if fields else found


def _value(word: str, default: Any) -> Any:
    """`word` as a value of the type of `default`; raises ValueError that says what it must be."""
    if isinstance(default, bool):
        if word not in ("true", "false"):
            raise ValueError("true or false")
        return word == "true"
    if isinstance(default, str):
        return word
    kind, named = (int, "a whole number") if isinstance(default, int) else (float, "a number")
    try:
        return kind(word)
    except ValueError:
        raise ValueError(named) from None


def _example(name: str, known: dict[str, Any]) -> str:
    return next((f"{name}:{key}={str(value).lower()}" for key, value in known.items()), f"{name}, which takes none")
