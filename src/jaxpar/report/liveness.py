"""How much memory a traced program will take once XLA has compiled it: its operations, fused, ordered and laid out.

Nothing is compiled. What is assumed of XLA stands with each rule below; the rules are those of its CPU compiler, whose
choices can be read from its dumps (`--xla_dump_to`). A loop or branch is looked into once, however often it runs.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

# Names that change nothing in memory: the result is the operand.
VIEWS = {
    *("reshape", "squeeze", "expand_dims", "pcast", "pvary", "copy", "copy_p", "stop_gradient", "reduce_precision"),
    *("random_wrap", "random_unwrap", "sharding_constraint", "optimization_barrier", "bitcast_convert_type"),
}
CALLS = {"jit", "pjit", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint", "closed_call", "shard_map"}
# Loops over one index that take in what they read: made anew in each reader rather than kept, if that is cheap.
CHEAP = {
    *("add", "sub", "mul", "neg", "max", "min", "and", "or", "not", "xor", "eq", "ne", "lt", "le", "gt", "ge"),
    *("select_n", "convert_element_type", "broadcast_in_dim", "iota", "sign", "abs", "floor", "ceil", "round"),
    *("is_finite", "clamp", "integer_pow", "square", "shift_left", "shift_right_logical", "shift_right_arithmetic"),
    *("slice", "pad", "dynamic_slice", "rev", "concatenate", "transpose", "gather", "add_any", "real", "split"),
    *("stack", "unstack", "empty", "full"),
}
COSTLY = {
    *("exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "erf", "erf_inv", "rsqrt", "sqrt", "cbrt", "div"),
    *("pow", "rem", "sin", "cos", "tan", "atan2"),
}
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax", "argmin"}
IN_PLACE = {"dynamic_update_slice", "scatter", "scatter-add", "scatter_add", "psum", "psum_invariant", "pmax"}


class Peak(NamedTuple):
    """Bytes of one device while a program runs, besides what it is given.

    Attributes:
        bytes: the most there is at once.
        kept: of what goes from forward to backward operations.
        at: the operation at which the most is there, and what is there then: (bytes, name of the operation).
    """

    bytes: int
    kept: int
    at: tuple[str, tuple[tuple[int, str], ...]]


class Op(NamedTuple):
    """One operation: its name, the numbers of the values it reads and makes, and where it stands."""

    name: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    equation: Any
    backward: bool


class Graph(NamedTuple):
    """A program without calls and views.

    Attributes:
        ops: in the order of the trace.
        sizes: bytes of each value.
        counts: numbers in each value.
        known: the op of each (name, operands, parameters): what is there twice is made once.
    """

    ops: list[Op]
    sizes: list[int]
    counts: list[int]
    known: dict[tuple, Op]


def peak(jaxpr, then=None, feeds: Sequence[int | None] = (), aliases: Sequence[tuple[int, int]] = ()) -> Peak:
    """The most memory that a program takes, besides its arguments, as compiled for one device.

    Args:
        jaxpr: a trace whose shapes are those of one device: of the inside of a `jax.shard_map`.
        then: a trace that goes on where `jaxpr` ends, if there is one.
        feeds: what each argument of `then` is, by number among the results of `jaxpr` and, after them, its arguments;
            None for what is new.
        aliases: (argument, result) of the last trace: the result is written to where the argument lies.
    """
    graph = Graph([], [], [], {})
    given = [_value(graph, var.aval) for var in jaxpr.invars]
    results = _flatten(graph, jaxpr, given, False)
    if then is not None:
        linked = [*results, *given]
        given = [
            linked[feed] if feed is not None else _value(graph, var.aval)
            for feed, var in zip(feeds, then.invars, strict=True)
        ]
        results = _flatten(graph, then, given, True)
    pairs = [(given[one], results[other]) for one, other in aliases]
    made = {value for op in graph.ops for value in op.makes}
    return _peak(graph, [v for v in range(len(graph.sizes)) if v not in made], results, pairs)


def _value(graph: Graph, aval) -> int:
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    extended = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
    graph.sizes.append(math.prod(shape) * (8 if extended else dtype.itemsize) if dtype is not None else 0)
    graph.counts.append(math.prod(shape))
    return len(graph.sizes) - 1


def _flatten(graph: Graph, jaxpr, given: Sequence[int], backward: bool) -> list[int]:
    """Add the operations of a jaxpr to a graph; what they read is by number, None for a literal."""
    env = dict(zip(jaxpr.invars, given, strict=True))
    for var in jaxpr.constvars:
        env[var] = _value(graph, var.aval)

    def of(var):
        return _value(graph, var.aval) if hasattr(var, "val") else env[var]

    for equation in jaxpr.eqns:
        name = equation.primitive.name
        back = backward or "transpose(" in str(equation.source_info.name_stack)
        if name in CALLS:
            inner = jaxprs_of(equation)[0]
            reads = [of(var) for var in equation.invars]
            found = _flatten(graph, inner, reads, back)
        elif name in VIEWS:
            found = [of(var) for var in equation.invars[: len(equation.outvars)]]
        else:
            reads = tuple(env[var] for var in equation.invars if not hasattr(var, "val"))
            found = _added(graph, name, reads, equation, back)
        env.update(zip(equation.outvars, found, strict=True))
    return [of(var) for var in jaxpr.outvars]


def _added(graph: Graph, name: str, reads: tuple, equation, backward: bool) -> Sequence[int]:
    inner = jaxprs_of(equation)
    key = (name, *map(str, equation.invars), str(equation.params)) if False else None
    if not inner:
        lits = tuple(str(v.val) if hasattr(v, "val") else "" for v in equation.invars)
        key = (name, reads, lits, str(equation.params), tuple(str(v.aval) for v in equation.outvars))
        if key in graph.known:
            return graph.known[key].makes
    if name == "erfc":
        x = reads
        z = _plain(graph, "exp", x, equation, backward)
        y = _plain(graph, "log", x, equation, backward)
        q = _plain(graph, "log1p", x, equation, backward)
        name, reads = "erfc_", (*x, z, y, q)
    if name == "dot_general":
        reads = tuple(_laid(graph, r, v, n, equation, backward) for n, (r, v) in enumerate(zip(reads, equation.invars)))
    makes = tuple(_value(graph, var.aval) for var in equation.outvars)
    op = Op(name, reads, makes, equation, backward)
    graph.ops.append(op)
    if key:
        graph.known[key] = op
    return makes


def _laid(graph, read, var, side, equation, backward):
    contract, batch = equation.params["dimension_numbers"]
    c, b = contract[side], batch[side]
    if not b:
        return read
    rank = var.aval.ndim
    free = [d for d in range(rank) if d not in c and d not in b]
    order = [*b, *free, *c] if side == 0 else [*b, *c, *free]
    other = [*b, *c, *free] if side == 0 else [*b, *free, *c]
    if order == list(range(rank)):
        return read
    key = ("laid", read, tuple(order))
    if key not in graph.known:
        v = _value(graph, var.aval)
        graph.known[key] = Op("transpose", (read,), (v,), equation, backward)
        graph.ops.append(graph.known[key])
    return graph.known[key].makes[0]


def _plain(graph, name, reads, equation, backward):
    key = (name, reads, "part")
    if key not in graph.known:
        v = _value(graph, equation.outvars[0].aval)
        graph.known[key] = Op(name, reads, (v,), equation, backward)
        graph.ops.append(graph.known[key])
    return graph.known[key].makes[0]


def jaxprs_of(equation) -> list:
    """The jaxprs within an operation."""
    found = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
    return [getattr(one, "jaxpr", one) for one in found if _is_jaxpr(one)]


def _is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


ELEMENT = CHEAP | COSTLY | {"erfc_"}


def _cheap(graph, op, producers):
    if op.name == "div":
        # by a scalar or by what is broadcast: times the inverse
        if len(op.reads) == 1:
            return hasattr(op.equation.invars[1], "val")
        p = producers.get(op.reads[1])
        return p is not None and p.name == "broadcast_in_dim"
    return op.name not in COSTLY


def _fused(graph: Graph, results: set) -> dict[int, set]:
    """for each op index: the indices of ops whose kernels include it."""
    ops = graph.ops
    producers = {v: op for op in ops for v in op.makes}
    readers: dict[int, list[int]] = {}
    for n, op in enumerate(ops):
        for v in op.reads:
            readers.setdefault(v, []).append(n)
    within: list[frozenset] = [frozenset()] * len(ops)
    for n in range(len(ops) - 1, -1, -1):
        op = ops[n]
        using = [r for v in op.makes for r in readers.get(v, ())]
        own = frozenset([n])
        if op.name not in ELEMENT or any(v in results for v in op.makes):
            within[n] = own
            continue
        if not using:
            continue
        stop = False
        for r in using:
            u = ops[r]
            if u.name in ELEMENT or u.name == "stacked":
                if u.name == "broadcast_in_dim" and not _cheap(graph, op, producers):
                    stop = True
                continue
            if u.name in REDUCTIONS:
                if len(set(using)) > 1:
                    stop = True
                continue
            stop = True
        if op.name in("iota","full", "empty") or (op.name=="broadcast_in_dim" and not op.reads):
            stop = False
        into = frozenset().union(*(within[r] for r in using))
        if not _cheap(graph, op, producers) and len(into) > 1:
            stop = True
        within[n] = own if stop else into
    return within


def _peak(graph: Graph, given, results, pairs, inside=False) -> Peak:
    ops = graph.ops
    out = set(results)
    within = _fused(graph, out)
    kernels = sorted(set().union(*within)) if ops else []
    made_by = {v: n for n, op in enumerate(ops) for v in op.makes}
    # sources of each kernel
    reads: dict[int, list[int]] = {k: [] for k in kernels}
    for n, op in enumerate(ops):
        for v in op.reads:
            m = made_by.get(v)
            if m is None or m in within[m]:
                for k in within[n]:
                    reads[k].append(v)
    reads = {k: list(dict.fromkeys(v)) for k, v in reads.items()}
    order = _ordered(kernels, reads, made_by)
    last: dict[int, int] = {}
    for t, k in enumerate(order):
        for v in reads[k]:
            last[v] = t
    end = len(order)
    for v in out:
        last[v] = end
    live: dict[int, int] = {}
    now = best = 0
    at = None
    fixed = set(given) if not inside else set()
    if inside:
        for v in given:
            live[v] = graph.sizes[v]
            now += graph.sizes[v]
        best = now
    dying: dict[int, list[int]] = {}
    for v, t in last.items():
        dying.setdefault(t, []).append(v)
    # results that take over the place of an argument, and arguments copied
    homes = {}
    for a, r in pairs:
        if r in made_by:
            k = made_by[r]
            others = [j for j in kernels if a in reads[j] and j != k]
            homes[r] = a
            if any(not _before(j, k, reads, made_by, order) for j in others) :
                now += graph.sizes[a]
                live[("copy", a)] = graph.sizes[a]
    base = now
    best = max(best, now)
    kept = 0
    for t, k in enumerate(order):
        op = ops[k]
        new = 0
        for v in op.makes:
            if v in live or v in homes:
                continue
            live[v] = graph.sizes[v]
            new += graph.sizes[v]
        extra, shared = _inside(graph, op, last, t, fixed, live)
        now += new
        if now + extra - shared > best:
            best = now + extra - shared
            at = (t, op, extra, shared, dict(live))
        for v in [*dying.get(t, ()), *(v for v in op.makes if v not in last)]:
            if v in live and v not in fixed:
                now -= live.pop(v)
    owner = {v: ops[made_by[v]].name if isinstance(v, int) and v in made_by else str(v) for v in (at[4] if at else ())}
    what = tuple(sorted(((s, owner[v]) for v, s in (at[4] if at else {}).items()), reverse=True))
    for v, n in made_by.items():
        if not ops[n].backward and n in within[n] and any(ops[k].backward for k in kernels if v in reads[k]):
            kept += graph.sizes[v]
    return Peak(best, kept, (at and (at[1].name, str(at[1].equation.source_info.name_stack), at[2], at[3]), what))


def _before(j, k, reads, made_by, order):
    """whether kernel j is before kernel k by what k reads"""
    seen, todo = set(), [k]
    while todo:
        x = todo.pop()
        if x == j:
            return True
        for v in reads[x]:
            m = made_by.get(v)
            if m is not None and m not in seen and m >= j:
                seen.add(m)
                todo.append(m)
    return False


def _ordered(kernels, reads, made_by):
    need = {k: {made_by[v] for v in reads[k] if v in made_by} for k in kernels}
    users: dict[int, list[int]] = {k: [] for k in kernels}
    for k in kernels:
        for n in need[k]:
            users[n].append(k)
    count = {k: len(need[k]) for k in kernels}
    queue = deque(k for k in kernels if not count[k])
    order = []
    while queue:
        k = queue.popleft()
        order.append(k)
        for u in users[k]:
            count[u] -= 1
            if not count[u]:
                queue.append(u)
    return order


def _inside(graph, op, last, t, fixed, live):
    """(bytes more while it runs, bytes that results share with operands that end here)"""
    extra = shared = 0
    dies = [v for v in op.reads if v in live and v not in fixed and last.get(v) == t]
    if op.name == "scan":
        extra = _body(op.equation)
        nc, k = op.equation.params["num_consts"], op.equation.params["num_carry"]
        carried = op.equation.invars[nc : nc + k]
        lits = [hasattr(v, "val") for v in op.equation.invars]
        reads = iter(op.reads)
        all_reads = [None if l else next(reads) for l in lits]
        for v in set(all_reads[nc : nc + k]) & set(dies):
            shared += graph.sizes[v]
    elif op.name in ("cond", "while"):
        for inner in jaxprs_of(op.equation):
            found = _alone(inner)
            extra = max(extra, found.bytes - sum(_size(v.aval) for v in inner.outvars))
    elif op.name in ELEMENT | IN_PLACE | REDUCTIONS:
        for m in op.makes:
            for v in dies:
                if graph.sizes[v] == graph.sizes[m]:
                    shared += graph.sizes[m]
                    dies.remove(v)
                    break
    return max(extra, 0), shared


def _size(aval):
    g = Graph([], [], [], {})
    return g.sizes[_value(g, aval)]


def _alone(jaxpr):
    graph = Graph([], [], [], {})
    given = [_value(graph, v.aval) for v in jaxpr.invars]
    results = _flatten(graph, jaxpr, given, False)
    return _peak(graph, given, results, [])


def _body(equation):
    p = equation.params
    jaxpr, nc, k = p["jaxpr"].jaxpr, p["num_consts"], p["num_carry"]
    graph = Graph([], [], [], {})
    given = [_value(graph, v.aval) for v in jaxpr.invars]
    consts, carry, xs = given[:nc], given[nc : nc + k], given[nc + k :]
    sliced = []
    for x, v in zip(xs, jaxpr.invars[nc + k :]):
        y = _value(graph, v.aval)
        graph.ops.append(Op("dynamic_slice", (x,), (y,), equation, False))
        sliced.append(y)
    for x in (*consts, *xs):
        graph.sizes[x] = 0
    results = _flatten(graph, jaxpr, [*consts, *carry, *sliced], False)
    ends = results[:k]
    for y in results[k:]:
        z = _value(graph, jax.core.ShapedArray((), "float32"))
        graph.sizes[z] = 0
        graph.ops.append(Op("stacked", (y,), (z,), equation, False))
        ends.append(z)
    found = _peak(graph, carry, ends, [], inside=True)
    return found.bytes - sum(graph.sizes[c] for c in carry)
