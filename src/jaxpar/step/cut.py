"""A traced function cut into pieces that run at different times, from one piece what another needs is kept.

This is how a forward pass is told from its backward pass, and the gradient of a stage's input from that of its weights:
no layer knows of it, nothing is differentiated by hand, and nothing that is kept is computed twice.

Source: Qi et al. 2023 (zero bubble), arXiv:2401.10241, section 2, for the two halves of a backward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxpar.core import compat

CALLS = ("jit", "pjit", "closed_call", "core_call")  # functions within functions: what is in them is cut as well


class Line(NamedTuple):
    """One operation: what it reads and writes are numbers of values, or literals."""

    equation: Any
    reads: tuple
    writes: tuple[int, ...]


class Value(NamedTuple):
    """What is known of a value before there is one.

    Attributes:
        aval: shape, dtype and the axes over which it varies.
        line: the operation that writes it; None for an argument.
        depends: which arguments it depends on, by number.
    """

    aval: Any
    line: Line | None
    depends: frozenset[int]


class Traced(NamedTuple):
    """A function as a list of operations.

    Attributes:
        lines: operations in order, functions within functions written out.
        values: by number; arguments come first.
        outputs: numbers of the results, or literals.
        fixed: values that are known already, by number.
        structure: of the results.
    """

    lines: list[Line]
    values: list[Value]
    outputs: list
    fixed: dict[int, Any]
    structure: Any


class Piece(NamedTuple):
    """A part of a cut function.

    Attributes:
        run: `run(arguments, kept) -> (results, keeps)`: flat arguments of the whole function, those not read may be
            None; `kept` maps numbers to what earlier pieces keep.
        keeps: what is kept for later pieces: numbers of values.
    """

    run: Callable[[Sequence, dict[int, Any]], tuple[list, list]]
    keeps: tuple[int, ...]


def trace(function: Callable, *arguments) -> Traced:
    """`function` as a list of operations, for arguments like these."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    values = [Value(var.aval, None, frozenset([n])) for n, var in enumerate(closed.jaxpr.invars)]
    traced = Traced([], values, [], {}, jax.tree.structure(shapes))
    traced.outputs.extend(_write_out(traced, closed, list(range(len(values)))))
    return traced


def _write_out(traced: Traced, closed, arguments: list) -> list:
    """Append the operations of a jaxpr; what it returns, as numbers or literals."""
    known = dict(zip(closed.jaxpr.invars, arguments, strict=True))
    for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        known[var] = len(traced.values)
        traced.fixed[known[var]] = value
        traced.values.append(Value(var.aval, None, frozenset()))

    def read(atom):
        return atom if hasattr(atom, "val") else known[atom]

    for equation in closed.jaxpr.eqns:
        reads = tuple(map(read, equation.invars))
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if equation.primitive.name in CALLS and hasattr(inner, "consts"):
            written = _write_out(traced, inner, list(reads))
        else:
            first = len(traced.values)
            written = list(range(first, first + len(equation.outvars)))
            line = Line(equation, reads, tuple(written))
            depends = frozenset().union(*(traced.values[one].depends for one in reads if isinstance(one, int)))
            traced.values.extend(Value(var.aval, line, depends) for var in equation.outvars)
            traced.lines.append(line)
        known.update(zip(equation.outvars, written, strict=True))
    return list(map(read, closed.jaxpr.outvars))


def cut(
    traced: Traced, wanted: Sequence[Sequence[int]], keep: Callable[[Value], bool], fleeting: Mapping[int, int]
) -> list[Piece]:
    """Cut a function into pieces, one for each entry of `wanted`, in the order in which they will run.

    Args:
        traced: the function.
        wanted: which of its flat results each piece finds, by number.
        keep: whether the result of an operation may be kept for later pieces, which else compute it again.
        fleeting: arguments, by number, that change once a piece has run, and which piece: it keeps them for later ones.
    """
    home = dict(fleeting)  # in which piece a value is first there, of those that can be kept
    keeps: list[dict[int, None]] = [{} for _ in wanted]
    work = []
    for number, results in enumerate(wanted):
        lines, waiting = {}, [traced.outputs[result] for result in results]
        while waiting:
            value = waiting.pop()
            line = traced.values[value].line if isinstance(value, int) else None
            if isinstance(value, int) and home.get(value, number) < number:
                keeps[home[value]][value] = None
            elif line is not None and line.writes[0] not in lines:
                lines[line.writes[0]] = line
                waiting.extend(line.reads)
        for line in lines.values():
            home.update((value, number) for value in line.writes if value not in home and keep(traced.values[value]))
        work.append([lines[first] for first in sorted(lines)])
    return [
        Piece(_runner(traced, lines, results, tuple(kept)), tuple(kept))
        for lines, results, kept in zip(work, wanted, keeps, strict=True)
    ]


def _runner(traced: Traced, lines: list[Line], results: Sequence[int], keeps: tuple[int, ...]) -> Callable:
    def run(arguments, kept):
        known = dict(traced.fixed) | dict(enumerate(arguments)) | kept

        def read(one):
            return known[one] if isinstance(one, int) else one.val

        for line in lines:
            known.update(zip(line.writes, compat.run(line.equation, list(map(read, line.reads))), strict=True))
        return [read(traced.outputs[result]) for result in results], [known[value] for value in keeps]

    return run
