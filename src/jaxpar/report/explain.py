"""Which formula gave each figure of a forecast: the terms of a figure add up to it."""

import math
from collections import Counter
from typing import Any, NamedTuple

import jax

from jaxpar.core import products
from jaxpar.core.makespan import Times, makespan
from jaxpar.plan import layout, padding
from jaxpar.report import account, flops
from jaxpar.report.columns import aligned
from jaxpar.report.traced import shares_of
from jaxpar.step.parts import Parts

SHARES = {  # of an operand, as `wire_bytes` counts: of a ring of n devices
    "all_gather": "(n-1)",
    "reduce_scatter": "(n-1)/n",
    "all_reduce": "2 (n-1)/n",
    "all_to_all": "(n-1)/n",
    "permute": "1",
}


class Row(NamedTuple):
    """One term of a figure.

    Attributes:
        figure: of which, such as `comm row`.
        what: it counts.
        formula: with the numbers in it.
        value: what that comes to.
    """

    figure: str
    what: str
    formula: str
    value: float


def rows(parts: Parts, trace, times: Times, held: dict[str, int]) -> list[Row]:
    """The terms of all predicted figures.

    Args:
        parts: of the run.
        trace: `traced(parts)`; None where XLA decides the collectives.
        times: that each kind of work takes, for the idle time.
        held: bytes by category, as a forecast has them.
    """
    traced = [] if trace is None else [*_flops(parts, trace), *_sent(parts, trace)]
    return [_model(parts), *traced, *_parameters(parts), *_held(parts, held), *_idle(parts, times)]


def as_json(found: list[Row]) -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [row._asdict() for row in found]


def text(found: list[Row]) -> str:
    """The rows as a table, the largest terms first; (n-1)/n and the like are what a ring of n devices sends."""
    order = {figure: number for number, figure in enumerate(dict.fromkeys(row.figure for row in found))}
    lines = sorted(found, key=lambda row: (order[row.figure], -row.value))
    cells = [(row.figure, row.what, row.formula, _number(row.value)) for row in lines]
    return aligned(("figure", "term", "formula", "value"), cells, ("value",))


def _model(parts: Parts) -> Row:
    count, total = math.prod(parts.settings.placement.scheme.axes.values()), flops.of_model(parts)
    what = "products once forward, and once back per operand that a parameter comes into"
    return Row("flops model", what, f"{total:,.0f} / {count} devices", total / count)


def _held(parts: Parts, found: dict[str, int]) -> list[Row]:
    """All that is held besides parameters, each category as one term."""
    own, opt = found["parameters"], found["optimizer"]
    shapes = " and ".join(f"{_by(one.shape)} x {one.dtype.itemsize} bytes" for one in (parts.inputs, parts.labels))
    how = {
        "gradients": ("one per parameter", f"1 x {own:,}"),
        "optimizer": ("its state", f"{opt // own if own else 0} x {own:,} + {opt % own if own else opt:,}"),
        "state": ("without gradient", "as parameters, or whole where nothing splits it"),
        "batch": ("inputs and labels", f"({shapes}) / devices that split rows"),
        "activations": ("kept from forward to backward operations", "the fullest moment of the trace"),
        "transient": ("whatever else is there", "the fullest moment of the trace"),
    }
    return [Row(f"memory {name}", *how[name], float(found[name])) for name in how if name in found]


def _flops(parts: Parts, trace) -> list[Row]:
    """Of the device that does most."""
    each = max((products.each(trace, one) for one in shares_of(parts)), key=_total)
    return [
        Row("flops executed", "product", f"2 x {_by(out)} x {_by(over)}, {times:g} times", times * _one(out, over))
        for (out, over), times in each.items()
    ]


def _one(out, over) -> float:
    return 2.0 * math.prod(out) * math.prod(over)


def _total(each: Counter) -> float:
    return sum(times * _one(*shape) for shape, times in each.items())


def _sent(parts: Parts, trace) -> list[Row]:
    found: Counter = Counter()
    for line in account.step_lines(parts, trace):
        found[line._replace(times=1)] += line.times
    made = []
    for line, times in found.items():
        site = f"{line.site} {line.phase}".strip()
        what = f"{line.kind}, {'timetable' if '(' in site or not site else site}"  # transforms name no place
        share = SHARES[line.kind].replace("n", str(line.group)) if line.bytes else "0"
        formula = f"{share} x {line.operand:,} bytes, {times:g} times"
        made.append(Row(f"comm {'+'.join(line.axes)}", what, formula, times * line.bytes))
    return made


def _parameters(parts: Parts) -> list[Row]:
    placement, dims, zero = parts.settings.placement, parts.model.dims[0], parts.settings.zero
    shapes = jax.eval_shape(lambda: parts.model.init(jax.random.key(0))[0])
    made = []
    named = jax.tree_util.tree_leaves_with_path(dims)
    for (path, words), leaf, rest in zip(named, jax.tree.leaves(shapes), zero.leaves(), strict=True):
        over = layout.axes_of(rest.layout(zero.stage, 3))
        whole, count = padding.shape(placement, words, leaf.shape), layout.size(placement.scheme, over)
        formula = f"{_by(whole)} x {leaf.dtype.itemsize} bytes" + (f" / {count} over {'+'.join(over)}" if over else "")
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        held = math.prod(whole) * leaf.dtype.itemsize // count
        made.append(Row("memory parameters", f"{name} [{words}]", formula, held))
    return made


def _idle(parts: Parts, times: Times) -> list[Row]:
    table = parts.pipeline.table
    if table.stages == 1:
        return []
    found = makespan(table.order, table.at, times)
    work = (1 - found.bubble) * found.span
    return [Row("bubble", "idle / span", f"1 - {work:g} / {found.span:g}", found.bubble)]


def _by(sizes) -> str:
    return " x ".join(map(str, sizes)) or "1"


def _number(value: float) -> str:
    return f"{value:.4g}" if value < 1 else f"{value:,.0f}"
