"""The predicted bill: the same layers walked with a Wire that only writes down what it is asked for."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxpar.core import compat
from jaxpar.core.backward import halves
from jaxpar.core.cost import Cost
from jaxpar.core.policy import plain
from jaxpar.core.scheme import Axes
from jaxpar.plan import layout, padding, zero
from jaxpar.plan.layout import Placement
from jaxpar.plan.wire import Line, cost_of, ledger
from jaxpar.report.traced import lines, shares_of
from jaxpar.step.executor import SCOPE
from jaxpar.step.objective import labelled, nats
from jaxpar.step.parts import Parts
from jaxpar.step.program import traced


def gradient_lines(parts: Parts, trace=None) -> list[Line]:
    """What one device sends for the loss and gradients of one step, line by line, from shapes alone.

    Needs no devices of the plan, nothing is compiled and no array is made.

    Args:
        parts: of the run.
        trace: `traced(parts)`, if it is at hand.

    Source: bytes of ring algorithms, `jaxpar.core.cost.wire_bytes`; which collectives, `jaxpar.plan.matmul.derive`.
    """
    rounded = parts.settings.policy.enter is not plain  # so what travels back has another dtype
    steered = jax.tree.leaves(halves(parts.model.dims[1])[1])  # by rules of their own, whose collectives no walk meets
    other = parts.settings.zero.stage or parts.settings.remat.kind != "none" or rounded or steered
    if not parts.pipeline.plain or other:
        return _from_trace(parts, trace or traced(parts))
    placement, model = parts.settings.placement, parts.model
    book = ledger(placement.scheme.axes)
    settings = parts.settings._replace(wire=book.wire)
    params, extra = local(parts)
    batch = tuple(_microbatch(placement, parts, a) for a in (parts.inputs, parts.labels))
    rows = placement.scheme.inner[0]

    with book.repeated(parts.microbatches):
        jax.eval_shape(lambda *args: nats(model, settings._replace(key=jax.random.key(0)), *args), params, extra, batch)
        for words, leaf in zip(jax.tree.leaves(model.dims[0]), jax.tree.leaves(params), strict=True):
            for part, axes in _meets(placement, words, leaf):
                book.entry(f"gradient of {words}", "backward", "all_reduce", part, axes)
    jax.eval_shape(lambda labels: labelled(settings, labels), batch[1])
    jax.eval_shape(
        lambda tree: parts.reducer.reduce(tree, parts.reducer.init(tree), partial(zero.summed, settings)), params
    )
    book.entry("loss", "forward", "all_reduce", jax.ShapeDtypeStruct((), jnp.float32), rows)
    return book.lines


def _from_trace(parts: Parts, trace) -> list[Line]:
    """What collectives a trace has: which gathers a pipeline makes again, and what is computed again, is known there.

    Of a pipeline the lines of that device which sends most.
    """
    sizes = parts.settings.placement.scheme.axes
    each = [list(lines(trace, sizes, one)) for one in shares_of(parts)]
    return max(each, key=lambda found: sum(line.bytes for line in found))


def pool_bytes(parts: Parts, trace=None) -> int:
    """Bytes of the pools in which one device of a pipeline keeps activations, from tick to tick; 0 if there are none.

    They are what the loop over ticks carries besides gradients, state and loss: as many slots as the timetable names,
    of what was found to be kept.

    Args:
        parts: of the run.
        trace: `traced(parts)`, if it is at hand.
    """
    table = parts.pipeline.table
    loop = next((one for one in _equations(trace or traced(parts)) if _plays(one, table.ticks)), None)
    if loop is None:
        return 0
    others = len(jax.tree.leaves(parts.model.dims)) + 1
    carried = loop.outvars[: compat.scan_counts(loop)[1]][:-others]
    return sum(var.aval.size * var.aval.dtype.itemsize for var in carried)


def _plays(equation, ticks: int) -> bool:
    """Whether an operation of a trace is the loop over the ticks of a timetable."""
    if equation.primitive.name != "scan" or equation.params["length"] != ticks:
        return False
    inside = (str(one.source_info.name_stack) for one in _equations(equation.params["jaxpr"].jaxpr))
    return any(SCOPE in scope for scope in inside)


def _equations(jaxpr):
    """The operations of a jaxpr, and of the functions and `shard_map`s within it."""
    for equation in jaxpr.eqns:
        yield equation
        inner = equation.params.get("jaxpr") if equation.primitive.name in ("jit", "pjit", "shard_map") else None
        if inner is not None:
            yield from _equations(getattr(inner, "jaxpr", inner))


def step_lines(parts: Parts, trace=None) -> list[Line]:
    """`gradient_lines`, with its arguments, and what the optimizer's half of the step sends.

    That half XLA partitions: it sums each leaf's squares once per dim that is split, over the axes of that dim; and
    gathers, once they are new, parameters of which ZeRO has each device update a part.
    """
    placement, (params, _) = parts.settings.placement, local(parts)
    lines = gradient_lines(parts, trace)
    each = zip(jax.tree.leaves(parts.model.dims[0]), parts.settings.zero.leaves(), jax.tree.leaves(params), strict=True)
    for words, rest, leaf in each:
        for axes in filter(None, rest.layout(parts.settings.zero.stage, 1)):
            lines.append(_line(placement, f"norm of {words}", "all_reduce", axes, 4, parts.norms))
        if rest.steps and parts.settings.zero.stage < 3:
            axes = parts.settings.zero.axes
            each = jnp.dtype(parts.master.dtype if parts.master else leaf.dtype).itemsize
            part = leaf.size * each // layout.size(placement.scheme, axes)
            lines.append(_line(placement, f"new {words}", "all_gather", axes, part, 1))
    return lines


def _line(placement: Placement, site: str, kind: str, axes: Axes, operand: int, times: int) -> Line:
    ordered = tuple(axis for axis in placement.scheme.axes if axis in axes)
    return Line(site, "forward", kind, ordered, layout.size(placement.scheme, axes), operand, times)


def local(parts: Parts) -> tuple:
    """Shapes of one device's parts of (params, extra) where layers use them, the vocabulary padded."""
    whole = jax.eval_shape(lambda: parts.model.init(jax.random.key(0)))
    placement = parts.settings.placement
    return tuple(_local(placement, dims, tree) for dims, tree in zip(parts.model.dims, whole, strict=True))


def predicted(parts: Parts, trace=None) -> Cost:
    """Bytes of a whole step: the sum of `step_lines`, with its arguments."""
    return cost_of(step_lines(parts, trace))


def _local(placement: Placement, dims, tree):
    """Shapes of one device's parts of a tree of parameters, the vocabulary padded."""

    def one(words, leaf):
        sizes = padding.shape(placement, words, leaf.shape)
        parts = [layout.size(placement.scheme, axes) for axes in layout.weight(placement, words)]
        return jax.ShapeDtypeStruct(tuple(size // n for size, n in zip(sizes, parts, strict=True)), leaf.dtype)

    return jax.tree.map(one, dims, tree)


def _microbatch(placement: Placement, parts: Parts, a) -> jax.ShapeDtypeStruct:
    share = parts.microbatches * layout.size(placement.scheme, layout.rows(placement, "batch", "-"))
    return jax.ShapeDtypeStruct((a.shape[0] // share, *a.shape[1:]), a.dtype)


def _meets(placement: Placement, words: str, leaf) -> list[tuple[jax.ShapeDtypeStruct, tuple[str, ...]]]:
    """Over which axes the gradient of a bias, a gain or a table of positions is summed.

    They are those over which the activation that it meets varies and it does not. A table of positions is summed as the
    part that a device uses, then whole over the axes on the context. Matrices are marked, and written down, where they
    are multiplied.
    """
    named = words.split()
    if len(named) > 1 and named[-2] not in ("layers", *layout.ROWS):
        return []
    met = layout.axes_of(getattr(placement.scheme, layout.side(named[-1])))
    own = (*layout.axes_of(layout.weight(placement, words)), *layout.replicas(placement))
    axes = tuple(axis for axis in met if axis not in own)
    if "context" not in named or not placement.on_context:
        return [(leaf, axes)]
    used = leaf.shape[0] // layout.size(placement.scheme, placement.on_context)
    part = jax.ShapeDtypeStruct((used, *leaf.shape[1:]), leaf.dtype)
    return [(part, tuple(axis for axis in axes if axis not in placement.on_context)), (leaf, placement.on_context)]
