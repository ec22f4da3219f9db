"""Plain values held to what a record of settings declares: nothing is guessed, cast or dropped."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

from jaxpar.core.refuse import Problem, Refused, near_miss

MOST_BYTES = 1 << 20  # of one file of settings
LEGAL = {int: "8", float: "0.1", bool: "true"}
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}


def mistyped(record: Any, above: str = "") -> Iterator[Problem]:
    """One problem for each field of a dataclass, also of those inside it, whose value is not of the declared type.

    A whole number is a number, but true is none, and "8" is text. Numbers of numpy are refused: JSON has no word for
    them.

    Args:
        record: a dataclass of plain values, optional ones, and such dataclasses.
        above: dotted name of the record, with a dot at its end.
    """
    hints = typing.get_type_hints(type(record))
    for field in dataclasses.fields(record):
        value, wanted = getattr(record, field.name), typing.get_args(hints[field.name]) or (hints[field.name],)
        name = f"{above}{field.name}"
        if dataclasses.is_dataclass(value) and type(value) in wanted:
            yield from mistyped(value, f"{name}.")
        elif type(value) not in wanted and not (type(value) is int and float in wanted):
            words = " or ".join(WORDS.get(kind, kind.__name__) for kind in wanted)
            default = field.default if field.default is not dataclasses.MISSING else None
            legal = _shown(default) if default is not None else LEGAL.get(wanted[0], "")
            yield Problem(name, repr(value), f"must be {words}, got {type(value).__name__}.", legal)


def parsed(text: str, what: str, problems: list[Problem]) -> dict:
    """The one JSON object that `text` is.

    Args:
        text: JSON.
        what: it is, for the message, such as `recipe`.
        problems: gains one for every key that is given twice, and for NaN and infinities, which are not JSON.

    Raises:
        Refused: if it is no JSON object; naming the line of an error.
    """
    if len(text) > MOST_BYTES:
        raise Refused([Problem(what, f"{len(text):,} bytes", f"is more than {MOST_BYTES:,} bytes long.")])
    try:
        found = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise Refused([Problem(what, _begun(text), f"is not JSON: {error}.", "the recipe.json of a run")]) from error
    if not isinstance(found, _Pairs):
        raise Refused([Problem(what, _begun(text), "must be one JSON object.", '{"steps": 100}')])
    return _plain(found, "", problems)


class _Pairs(tuple):
    """The (key, value) pairs of a JSON object, as they stand there."""


def _plain(value: Any, name: str, problems: list[Problem]) -> Any:
    """`value` with objects as dicts; what is wrong in it is added to `problems`, by its dotted name."""
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(Problem(name, value, "is not a finite number.", "a finite number"))
    if isinstance(value, list):
        return [_plain(one, name, problems) for one in value]
    if not isinstance(value, _Pairs):
        return value
    found = {}
    for key, inner in value:
        dotted = f"{name}.{key}" if name else key
        if key in found:
            given = [_shown(other) for twice, other in value if twice == key]
            problems.append(Problem(dotted, " and ".join(given), "is given twice.", f"{dotted}, once"))
        found[key] = _plain(inner, dotted, problems)
    return found


def unknown(values: dict, kind: type, above: str = "") -> list[Problem]:
    """One problem for each key that is no field of the dataclass `kind`."""
    known = [field.name for field in dataclasses.fields(kind)]
    return [
        Problem(f"{above}{name}", _begun(str(value)), "there is no such field.", near_miss(name, known))
        for name, value in values.items()
        if name not in known
    ]


def _begun(text: str) -> str:
    text = " ".join(text.split()) or "(nothing)"
    return text if len(text) <= 40 else f"{text[:40]}..."


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
