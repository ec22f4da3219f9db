"""Which values a compiler keeps in bfloat16 since only products read them, which it rounds to that in any case."""

from collections.abc import Sequence

from jaxpar.core import compat
from jaxpar.report.kernels import PRODUCTS, STACKED, Graph, Op, empty, flatten, jaxprs_of, value

ROUND = "round"  # our name for rounding an argument before the loop whose products read it
MOVED = {"transpose", "slice", "dynamic_slice", "concatenate", "rev", "copy", "split", "gather", "all_gather"}


def narrow(graph: Graph, given: Sequence[int], results: Sequence[int]) -> None:
    """Halve what is kept in bfloat16, and add a rounded copy of each argument that a loop reads for its products.

    Args:
        graph: to change.
        given: its arguments.
        results: values that others may read in full.
    """
    if not graph.rules.rounded:
        return
    fine, loops = _fine(graph, results, ())
    arguments, copies, ops = {*given}, {}, []
    for number, op in enumerate(graph.ops):
        reads = list(op.reads)
        for position in loops.get(number, ()):
            old = reads[position]
            if old in arguments and _wide(graph, old):
                if old not in copies:
                    graph.sizes.append(graph.sizes[old] // 2)
                    graph.counts.append(graph.counts[old])
                    copies[old] = len(graph.sizes) - 1
                    ops.append(Op(ROUND, (old,), (copies[old],), op.equation, op.backward))
                reads[position] = copies[old]
        ops.append(op._replace(reads=tuple(reads)))
    graph.ops[:] = ops
    for one in fine - arguments:
        if _wide(graph, one):
            graph.sizes[one] //= 2


def _wide(graph: Graph, one: int) -> bool:
    """Whether a value has four bytes a number."""
    return graph.sizes[one] == 4 * graph.counts[one]


def _fine(graph: Graph, results: Sequence[int], stacked: Sequence[int]) -> tuple[set[int], dict[int, list[int]]]:
    """Values that only products read, and for each loop the positions of operands that it reads for nothing else.

    Args:
        graph: the program.
        results: values that others may read in full.
        stacked: results that only products read.
    """
    full, read, loops = {*results}, {*stacked}, {}
    for number in range(len(graph.ops) - 1, -1, -1):
        op = graph.ops[number]
        ok = _reads(graph, op, full, read)
        if op.name in ("scan", "cond"):
            loops[number] = [n for n, fine in enumerate(ok) if fine]
            read.update(_carried(op, loops[number]))
        for one, fine in zip(op.reads, ok, strict=True):
            if fine is not None:
                (read if fine else full).add(one)
    return read - full, loops


def _reads(graph: Graph, op: Op, full: set[int], read: set[int]) -> list[bool | None]:
    """Of each operand whether an operation rounds it; None for one that does not matter."""
    if op.name in PRODUCTS:
        return [True] * len(op.reads)
    if op.name in MOVED:
        return [op.makes[0] in read and op.makes[0] not in full] * len(op.reads)
    if op.name == STACKED:
        return [None] * len(op.reads)
    if op.name == "dynamic_update_slice":
        return [op.makes[0] in read and op.makes[0] not in full, None, *[False] * (len(op.reads) - 2)]
    if op.name not in ("scan", "cond") or op.equation.primitive.name != op.name:
        return [False] * len(op.reads)
    carried = compat.scan_counts(op.equation)[1] if op.name == "scan" else 0
    return _inside(graph, op, [one not in full and (one in read or n < carried) for n, one in enumerate(op.makes)])


def _carried(op: Op, fine: list[int]) -> list[int]:
    """What a loop gives for what it carries in bfloat16, from the positions of such operands."""
    if op.name != "scan":
        return []
    first, carried = compat.scan_counts(op.equation)
    positions = [n for n, var in enumerate(op.equation.invars) if not hasattr(var, "val")]
    carries = [positions[n] - first for n in fine]
    return [op.makes[n] for n in carries if 0 <= n < carried]


def _inside(graph: Graph, op: Op, wanted: list[bool]) -> list[bool | None]:
    """The same of a loop or a switch; `wanted` says of each result whether only products read it, or nobody."""
    literal = [hasattr(var, "val") for var in op.equation.invars]
    if op.name == "scan":
        each = _trip(graph, op, wanted)
    else:
        found = [_body(graph, jaxpr, [False] * len(wanted), len(wanted)) for jaxpr in jaxprs_of(op.equation)]
        used = [[one for one in column if one is not None] for column in zip(*found, strict=True)]
        each = [False, *(all(column) if column else None for column in used)]
    return [one for one, given in zip(each, literal, strict=True) if not given]


def _trip(graph: Graph, op: Op, wanted: list[bool]) -> list[bool | None]:
    """Of a loop: what it carries is kept in bfloat16 if no trip reads it in full, which is first taken to be so."""
    (jaxpr,), (first, carried) = jaxprs_of(op.equation), compat.scan_counts(op.equation)
    kept = list(wanted)
    while True:
        each = _body(graph, jaxpr, kept, carried)
        now = [one and each[first + n] is True if n < carried else one for n, one in enumerate(kept)]
        if now == kept:
            return [one and kept[n - first] if first <= n < first + carried else one for n, one in enumerate(each)]
        kept = now


def _body(graph: Graph, jaxpr, kept: list[bool], carried: int) -> list[bool | None]:
    """Of each argument of a loop's body or a branch whether it is rounded, given which results are."""
    inner = empty(graph.rules)
    given = [value(inner, var.aval) for var in jaxpr.invars]
    results = flatten(inner, jaxpr, given)
    full = [one for one, fine in zip(results, kept, strict=True) if not fine]
    fine, _ = _fine(inner, full, [one for one, fine in zip(results, kept, strict=True) if fine])
    used = {one for each in inner.ops for one in each.reads} | {*results}
    return [one in fine if one in used else None for one in given]
