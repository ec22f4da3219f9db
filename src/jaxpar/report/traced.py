"""What a traced step sends: the collectives in its jaxpr, as often as its loops run and its timetable says.

Nothing is compiled, and no device is needed. A pipeline is predicted so: which gathers its stages make again, and when,
follows from how their work was cut, which no walk through the layers alone can tell.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax

from jaxpar.plan.wire import Line

KINDS = {
    "all_gather": "all_gather",
    "all_gather_invariant": "all_gather",
    "all_gather_reduced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "unreduced_reduce_scatter": "reduce_scatter",
    "psum": "all_reduce",
    "psum_invariant": "all_reduce",
    "pmax": "all_reduce",
    "ppermute": "permute",
    "all_to_all": "all_to_all",
}
STAY = ("optimization_barrier", "scan", "while", "cond")  # XLA takes none of these out of a loop
Shares = Callable[[str, int], list[float] | None]


class Loop(NamedTuple):
    """The loop around a jaxpr.

    Attributes:
        trips: how often it goes round.
        fixed: variables that are the same on every trip.
    """

    trips: int
    fixed: set


NO_LOOP = Loop(1, set())


def lines(jaxpr, sizes: Mapping[str, int], shares: Shares, times: float = 1.0, loop: Loop = NO_LOOP) -> Iterator[Line]:
    """One line for each collective in a jaxpr and the jaxprs within it.

    What is the same on every trip of a loop XLA does once, before the loop.

    Args:
        jaxpr: traced inside `jax.shard_map`, or around one.
        sizes: mesh axes and their sizes, major first.
        shares: `shares(scope, branches)`: of a switch under the name scope, how often each branch is taken, as a share
            of all; None if it is not known: then the branch that sends most counts.
        times: how often the whole runs.
        loop: the loop whose body this is.
    """
    fixed = set(loop.fixed)
    for equation in jaxpr.eqns:
        name, scope = equation.primitive.name, str(equation.source_info.name_stack)
        same = bool(fixed) and name not in STAY and all(map(_is_fixed(fixed), equation.invars))
        fixed.update(equation.outvars if same else ())
        if name in KINDS:
            named = equation.params.get("axes", equation.params.get("axis_name"))
            axes = tuple(axis for axis in sizes if axis in ((named,) if isinstance(named, str) else named))
            for operand in equation.invars if axes else ():
                held = operand.aval.size * operand.aval.dtype.itemsize
                yield Line(scope, "", KINDS[name], axes, _group(sizes, axes), held, times / (loop.trips if same else 1))
        elif name == "cond":
            yield from _branches(equation, sizes, shares, times)
        else:
            trips = equation.params["length"] if name == "scan" else 1
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    inner = getattr(inner, "jaxpr", inner)
                    around = _loop_around(equation, inner, Loop(loop.trips, fixed))
                    yield from lines(inner, sizes, shares, times * trips, around)


def _loop_around(equation, inner, loop: Loop) -> Loop:
    """The loop around a jaxpr within an equation that `loop` is around."""
    if equation.primitive.name == "scan":
        return Loop(equation.params["length"], set(inner.invars[: equation.params["num_consts"]]))
    if equation.primitive.name not in ("jit", "pjit"):
        return NO_LOOP
    given = zip(inner.invars, equation.invars, strict=True)
    return Loop(loop.trips, {own for own, outer in given if _is_fixed(loop.fixed)(outer)})


def _is_fixed(fixed: set) -> Callable[[object], bool]:
    return lambda value: hasattr(value, "val") or value in fixed  # a literal, or a variable


def _branches(equation, sizes: Mapping[str, int], shares: Shares, times: float) -> Iterator[Line]:
    branches = equation.params["branches"]
    known = shares(str(equation.source_info.name_stack), len(branches))
    found = [
        list(lines(branch.jaxpr, sizes, shares, times * (known[n] if known else 1)))
        for n, branch in enumerate(branches)
    ]
    if known:
        yield from (line for branch in found for line in branch if line.times)
    else:
        yield from max(found, key=lambda branch: sum(line.bytes for line in branch))


def _group(sizes: Mapping[str, int], axes) -> int:
    product = 1
    for axis in axes:
        product *= sizes[axis]
    return product


def _is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")
