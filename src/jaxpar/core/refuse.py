"""Bad input is answered once: every wrong field, its value, the rule and the nearest legal values."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """One violated rule: `field` (dotted name), the `value` that was got, the `rule`, and what to write instead."""

    field: str
    value: Any
    rule: str
    legal: str = ""

    def __str__(self) -> str:
        return f"{self.field} = {self.value}: {self.rule}" + (f" Legal: {self.legal}." if self.legal else "")


class Refused(ValueError):
    """Input that a user can mend; `problems` holds every violation that was found, not only the first."""

    def __init__(self, problems: Iterable[Problem], done: str = "nothing was started"):
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__("\n".join([f"{head}, {done}:", *(f"  - {problem}" for problem in self.problems)]))


def refuse(problems: Iterable[Problem]) -> None:
    """Raise `Refused` if there is any problem."""
    found = tuple(problems)
    if found:
        raise Refused(found)


def near_miss(name: str, names: Iterable[str]) -> str:
    """The legal names as one phrase, with the likeliest first: "did you mean `two_d`? Any of ..."."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    listed = ", ".join(known)
    return f"did you mean `{close[0]}`? Any of {listed}" if close else listed


class Collector(NamedTuple):
    """Problems found so far, so that they can be told all at once."""

    problems: list[Problem]

    def attempt(self, build: Callable, *args, **fields):
        """What `build` returns; None if it refused, its problems kept."""
        try:
            return build(*args, **fields)
        except Refused as refused:
            self.problems.extend(problem for problem in refused.problems if problem not in self.problems)
            return None
