"""The operations of a traced program, and how often each runs."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxpar.core import compat

STAY = ("optimization_barrier", "scan", "while", "cond")  # XLA takes none of these out of a loop
CALLS = ("jit", "pjit")
Shares = Callable[[str, int], list[float] | None]  # as of `visits`


class Visit(NamedTuple):
    """One operation that holds no others, and how often it runs."""

    equation: Any
    times: float


class Loop(NamedTuple):
    """The loop around a jaxpr.

    Attributes:
        trips: how often it goes round.
        fixed: variables that are the same on every trip.
    """

    trips: int
    fixed: set


NO_LOOP = Loop(1, set())


def visits(
    jaxpr, cost: Callable[[Any], float], shares: Shares | None = None, times: float = 1.0, loop: Loop = NO_LOOP
) -> Iterator[Visit]:
    """Every operation in a jaxpr and the jaxprs within it, in order.

    What is the same on every trip of a loop counts once: XLA does it before the loop.

    Args:
        jaxpr: what to walk through.
        cost: `cost(equation)`: what counts; of a switch of which nothing is known, the branch in which most comes
            together is walked through.
        shares: `shares(scope, branches)`: of a switch under the name scope, how often each branch is taken, as a share
            of all; None if it is not known.
        times: how often the whole runs.
        loop: the loop whose body this is.
    """
    fixed = set(loop.fixed)
    for equation in jaxpr.eqns:
        same = bool(fixed) and equation.primitive.name not in STAY and all(map(_is_in(fixed), equation.invars))
        fixed.update(equation.outvars if same else ())
        inner = [getattr(value, "jaxpr", value) for value in jaxprs(equation)]
        if not inner:
            yield Visit(equation, times / (loop.trips if same else 1))
        elif equation.primitive.name == "cond":
            yield from _branches(equation, inner, cost, shares, times)
        else:
            trips = equation.params["length"] if equation.primitive.name == "scan" else 1
            for one in inner:
                around = _loop_around(equation, one, Loop(loop.trips, fixed))
                yield from visits(one, cost, shares, times * trips, around)


def _branches(equation, inner: list, cost: Callable, shares: Shares | None, times: float) -> Iterator[Visit]:
    known = shares and shares(str(equation.source_info.name_stack), len(inner))
    found = [list(visits(one, cost, shares, times * (known[n] if known else 1))) for n, one in enumerate(inner)]
    if known:
        yield from (visit for branch in found for visit in branch if visit.times)
    else:
        yield from max(found, key=lambda branch: sum(visit.times * cost(visit.equation) for visit in branch))


def _loop_around(equation, inner, loop: Loop) -> Loop:
    """The loop around a jaxpr within an equation that `loop` is around."""
    if equation.primitive.name == "scan":
        return Loop(equation.params["length"], set(inner.invars[: compat.scan_counts(equation)[0]]))
    if equation.primitive.name not in CALLS:
        return NO_LOOP
    given = zip(inner.invars, equation.invars, strict=True)
    return Loop(loop.trips, {own for own, outer in given if _is_in(loop.fixed)(outer)})


def _is_in(fixed: set) -> Callable[[object], bool]:
    return lambda value: hasattr(value, "val") or value in fixed  # a literal, or a variable


def jaxprs(equation) -> list:
    """The jaxprs that an operation holds."""
    return [one for one in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(one)]


def _is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")
