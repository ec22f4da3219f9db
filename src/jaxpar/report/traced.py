"""What a traced step sends: the collectives in its jaxpr, as often as its loops run and its timetable says.

Nothing is compiled, and no device is needed. A pipeline is predicted so: which gathers its stages make again, and when,
follows from how their work was cut, which no walk through the layers alone can tell.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod

from jaxpar.core.walk import Shares, visits
from jaxpar.plan.wire import Line
from jaxpar.step.parts import Parts
from jaxpar.step.rehearsal import shares

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


def lines(jaxpr, sizes: Mapping[str, int], shares: Shares) -> Iterator[Line]:
    """One line for each collective in a jaxpr and the jaxprs within it.

    Args:
        jaxpr: traced inside `jax.shard_map`, or around one.
        sizes: mesh axes and their sizes, major first.
        shares: how often each branch of a switch is taken, as of `walk.visits`.
    """
    for equation, times in visits(jaxpr, partial(_bytes, sizes), shares):
        yield from _lines(equation, sizes, times)


def shares_of(parts: Parts) -> list[Shares]:
    """For each device of the axis `pipe`, how often it takes which branch."""
    pipeline = parts.pipeline
    played = pipeline.table, pipeline.division.stages, pipeline.storage
    return [shares(*played, device) for device in range(pipeline.table.devices)]


def _lines(equation, sizes: Mapping[str, int], times: float = 1.0) -> Iterator[Line]:
    name, scope = equation.primitive.name, str(equation.source_info.name_stack)
    if name in KINDS:
        named = equation.params.get("axes", equation.params.get("axis_name"))
        axes = tuple(axis for axis in sizes if axis in ((named,) if isinstance(named, str) else named))
        for operand in equation.invars if axes else ():
            held = operand.aval.size * operand.aval.dtype.itemsize
            yield Line(scope, "", KINDS[name], axes, prod(sizes[axis] for axis in axes), held, times)


def _bytes(sizes: Mapping[str, int], equation) -> float:
    return sum(line.bytes for line in _lines(equation, sizes))
