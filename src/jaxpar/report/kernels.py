"""The kernels that XLA makes of a traced program: which operations it computes where they are read, and which it keeps.

Nothing is compiled. The rules are those of XLA's CPU compiler, found by comparing with what it writes of itself
(`--xla_dump_to`); each is stated where it is applied. Values and operations go by number, in the order of the trace.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxpar.core.walk import jaxprs
from jaxpar.report.backends import CPU, Rules

VIEWS = {  # the result is the operand, under another shape or type
    *("reshape", "squeeze", "expand_dims", "pcast", "pvary", "copy", "copy_p", "stop_gradient", "name"),
    *("random_wrap", "random_unwrap", "sharding_constraint", "optimization_barrier", "bitcast_convert_type"),
}
CALLS = {"jit", "pjit", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint", "closed_call", "shard_map"}
CHEAP = {  # computed again in each kernel that reads the result
    *("add", "sub", "mul", "neg", "max", "min", "and", "or", "not", "xor", "eq", "ne", "lt", "le", "gt", "ge"),
    *("select_n", "convert_element_type", "broadcast_in_dim", "iota", "sign", "abs", "floor", "ceil", "round"),
    *("is_finite", "clamp", "integer_pow", "square", "shift_left", "shift_right_logical", "shift_right_arithmetic"),
    *("slice", "pad", "dynamic_slice", "rev", "concatenate", "transpose", "gather", "add_any", "real", "split"),
    *("stack", "unstack", "empty", "full", "reduce_precision"),
}
COSTLY = {  # computed once if more than one kernel reads the result
    *("exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "erf", "erf_inv", "rsqrt", "sqrt", "cbrt", "div"),
    *("pow", "rem", "sin", "cos", "tan", "atan2"),
}
ONE_HOT = "one_hot"  # our name for a scatter of one number into each row of zeros
ELEMENTWISE = CHEAP | COSTLY | {"erfc", ONE_HOT}
FILLED = {"broadcast_in_dim", "iota", "full", "empty", ONE_HOT}
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax", "argmin"}
STACKED = "stacked"  # our name for writing a result of one trip of a loop among those of the others

FUSING = ELEMENTWISE | REDUCTIONS | {STACKED}
PRODUCTS = {"dot_general", "conv_general_dilated"}
POWERS = {"exp", "exp2"}
POLYNOMIALS = {"erf", "erfc", "erf_inv"}
JOINED = PRODUCTS | {"scatter-add"}  # may end in the kernel of what reads them


class Op(NamedTuple):
    """One operation: its name, the values it reads and makes, its equation, and whether it is of the backward pass."""

    name: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    equation: Any
    backward: bool


class Graph(NamedTuple):
    """A program without calls and views.

    Attributes:
        ops: the operations, in order.
        sizes: bytes of each value.
        counts: numbers in each value.
        known: what an operation made, by all that it depends on: what is asked for twice is made once.
        rules: of the compiler.
    """

    ops: list[Op]
    sizes: list[int]
    counts: list[int]
    known: dict[tuple, tuple[int, ...]]
    rules: Rules


def empty(rules: Rules = CPU) -> Graph:
    """A graph without operations."""
    return Graph([], [], [], {}, rules)


def value(graph: Graph, aval) -> int:
    """A new value of a shape and type; one on the host takes no memory of the device."""
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    key = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
    here = dtype is not None and getattr(aval, "memory_space", None) != jax.memory.Space.Host
    graph.sizes.append(math.prod(shape) * (8 if key else dtype.itemsize) if here else 0)
    graph.counts.append(math.prod(shape))
    return len(graph.sizes) - 1


def flatten(graph: Graph, jaxpr, given: Sequence[int], backward: bool = False) -> list[int]:
    """Add the operations of a jaxpr, and of what it calls, to a graph.

    Args:
        graph: to add to.
        jaxpr: what to add.
        given: its arguments.
        backward: whether all of it is of the backward pass; otherwise its name scopes say so.

    Returns:
        Its results.
    """
    env = dict(zip(jaxpr.invars, given, strict=True))
    env.update({var: value(graph, var.aval) for var in jaxpr.constvars})

    def of(var):
        if not hasattr(var, "val"):
            return env[var]
        key = "literal", str(var.val), str(var.aval)
        if key not in graph.known:
            graph.known[key] = (value(graph, var.aval),)
        return graph.known[key][0]

    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, jaxprs_of(equation)
        back = backward or "transpose(" in str(equation.source_info.name_stack)
        if name in CALLS:
            found = flatten(graph, inner[0], [of(var) for var in equation.invars], back)
        elif name in VIEWS or _same(name, equation):
            found = [of(var) for var in equation.invars[: len(equation.outvars)]]
        else:
            reads = [None if hasattr(var, "val") else env[var] for var in equation.invars]
            found = _lowered(graph, name, reads, equation, back)
        env.update(zip(equation.outvars, found, strict=True))
    return [of(var) for var in jaxpr.outvars]


def jaxprs_of(equation) -> list:
    """The jaxprs within an operation, open."""
    return [getattr(one, "jaxpr", one) for one in jaxprs(equation)]


def _same(name: str, equation) -> bool:
    """Whether a broadcast only adds dims of size 1, or a conversion keeps the type."""
    old, new = (getattr(one[0], "aval", None) if one else None for one in (equation.invars, equation.outvars))
    if name == "broadcast_in_dim":
        return math.prod(old.shape) == math.prod(new.shape) and not hasattr(equation.invars[0], "val")
    return name == "convert_element_type" and old.dtype == new.dtype and not hasattr(equation.invars[0], "val")


def _lowered(graph: Graph, name: str, reads: list, equation, backward: bool) -> tuple[int, ...]:
    """Add an operation, and those that XLA puts before it."""
    out = equation.outvars[0].aval if equation.outvars else None
    if jaxprs_of(equation):
        return add(graph, name, tuple(read for read in reads if read is not None), equation, backward)
    if name in ELEMENTWISE - FILLED and len(reads) > 1:  # dims of size 1 are broadcast by an operation of their own
        wide = math.prod(out.shape)
        reads = [
            read
            if read is None or name in MOVES or graph.counts[read] in (1, wide)
            else add(graph, "broadcast_in_dim", (read,), equation, backward, (out,), str(out.shape))[0]
            for read in reads
        ]
    if name == "scatter-add" and graph.rules.again and equation.params["dimension_numbers"].operand_batching_dims:
        name = ONE_HOT
    if name == "dot_general" and not graph.rules.products:
        reads = [_in_order(graph, read, side, equation, backward) for side, read in enumerate(reads)]
    own = tuple(read for read in reads if read is not None)
    if (
        _across(equation) and not graph.rules.products
    ):  # parts are joined and shared out along the outermost dim: copied into that order and back
        own = tuple(
            add(graph, "transpose", (read,), equation, backward, (var.aval,), "in")[0]
            for read, var in zip(own, equation.invars, strict=True)
        )
        (made,) = add(graph, name, own, equation, backward, None, str(equation.params))
        return add(graph, "transpose", (made,), equation, backward, (out,), "out")
    if name == "erfc" and not graph.rules.again:  # two quotients and an exponential, each read twice by a polynomial
        own += tuple(add(graph, part, own, equation, backward, (out,), part)[0] for part in ("exp", "log", "log1p"))
    literals = tuple(str(var.val) if hasattr(var, "val") else "" for var in equation.invars)
    return add(graph, name, own, equation, backward, None, literals, str(equation.params))


def _across(equation) -> bool:
    """Whether an operation joins or shares out the parts of a dim that is not the outermost."""
    dim = equation.params.get("all_gather_dimension", equation.params.get("scatter_dimension", 0))
    return math.prod(equation.invars[0].aval.shape[:dim]) > 1 if equation.invars and dim else False


MOVES = {"gather", "dynamic_slice", "concatenate", "pad", "select_n", "split", "stack"}


def add(graph: Graph, name: str, reads: tuple, equation, backward: bool, avals=None, *same) -> tuple[int, ...]:
    """Add one operation, unless it is there already; what it makes.

    Args:
        graph: to add to.
        name, reads, equation, backward: as of `Op`.
        avals: shapes of what it makes; by default those of the results of the equation.
        same: all else that it depends on; without it, it is added in any case.
    """
    avals = [var.aval for var in equation.outvars] if avals is None else avals
    key = (name, reads, *same, *map(str, avals))
    if not same or key not in graph.known:
        makes = tuple(value(graph, aval) for aval in avals)
        for one in makes if name == "scan" and graph.rules.widened else ():
            graph.sizes[one] *= 2 if graph.sizes[one] == 2 * graph.counts[one] else 1
        graph.ops.append(Op(name, reads, makes, equation, backward))
        graph.known[key] = makes
        return makes
    return graph.known[key]


def _in_order(graph: Graph, read: int | None, side: int, equation, backward: bool) -> int | None:
    """An operand of a batched product, its dims as the CPU's kernels take them: batch, rows, columns."""
    contracted, batch = (dims[side] for dims in equation.params["dimension_numbers"])
    aval = equation.invars[side].aval
    free = [dim for dim in range(aval.ndim) if dim not in (*contracted, *batch)]
    order = [*batch, *free, *contracted] if side == 0 else [*batch, *contracted, *free]
    if read is None or not batch or order == [*range(aval.ndim)]:
        return read
    return add(graph, "transpose", (read,), equation, backward, (aval,), str(order))[0]
