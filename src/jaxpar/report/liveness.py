"""How much memory a traced program takes once compiled, from the trace alone: what is there at once, at its worst.

The kernels are put into the order of XLA's CPU compiler, and their results laid out as it does. A loop or a branch is
looked into once, however often it runs.
"""

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from jax.core import ShapedArray

from jaxpar.core import compat
from jaxpar.report import fusion, kernels, packing, rounding
from jaxpar.report.backends import CPU, Rules
from jaxpar.report.fusion import Kernels
from jaxpar.report.kernels import Graph, Op, add, empty, flatten, jaxprs_of, value
from jaxpar.report.packing import Block

SUMS = {"psum", "psum_invariant", "pmax"}
IN_PLACE = (
    kernels.ELEMENTWISE - {"transpose", "gather", "rev"}
    | kernels.REDUCTIONS
    | {"dynamic_update_slice", "scatter", "scatter-add"}
    | SUMS
)


class Peak(NamedTuple):
    """Bytes of one device while a program runs, besides what it is given.

    Attributes:
        bytes: how much memory it needs, gaps between its blocks included.
        kept: of what forward operations make for backward ones.
        live: what is there when most is there: (bytes, name of the operation that made it), largest first.
    """

    bytes: int
    kept: int
    live: tuple[tuple[int, str], ...]


class Run(NamedTuple):
    """A program as it runs: the blocks that it needs, how many moments it takes, and bytes kept for backward ones."""

    blocks: list[Block]
    length: int
    kept: int


class Moments(NamedTuple):
    """When things are, in moments since the start: of each kernel in order, how long it takes, and of each value."""

    order: list[int]
    start: dict[int, int]
    length: dict[int, int]
    born: dict[int, int]
    dead: dict[int, int]


def peak(
    jaxpr,
    then=None,
    feeds: Sequence[int | None] = (),
    aliases: Sequence[tuple[int, int]] = (),
    rules: Rules = CPU,
) -> Peak:
    """The most memory that a program takes, besides its arguments, as compiled for one device.

    Args:
        jaxpr: a trace with the shapes of one device: of the inside of a `jax.shard_map`.
        then: a trace that goes on where `jaxpr` ends, if there is one.
        feeds: what each argument of `then` is, by number among the results of `jaxpr` and, after them, its arguments;
            None for what is new.
        aliases: (argument, result) of the last trace: the result is written to where the argument lies.
        rules: of the compiler.
    """
    graph = empty(rules)
    given = [value(graph, var.aval) for var in jaxpr.invars]
    results, old = flatten(graph, jaxpr, given), given
    if then is not None:
        linked = [*results, *given]
        given = [value(graph, var.aval) if n is None else linked[n] for n, var in zip(feeds, then.invars, strict=True)]
        results = flatten(graph, then, given, True)
    made = {one for op in graph.ops for one in op.makes}
    homes = {results[result]: given[argument] for argument, result in aliases}
    rounding.narrow(graph, {*old, *given} - made, results)
    run = _run(graph, {*old, *given} - made, results, homes, donated=True)
    blocks = packing.beyond(run.blocks, rules.near)
    when = packing.fullest(blocks)
    live = sorted(((one.size, one.name) for one in blocks if one.born <= when < one.dead), reverse=True)
    return Peak(packing.packed(blocks), run.kept, tuple(live))


def _run(graph: Graph, outside: set[int], results: Sequence[int], homes: dict[int, int], donated: bool = False) -> Run:
    """Of a graph; `outside` takes no memory, `homes` says which results are written to where an argument lies."""
    made = fusion.kernels(graph, set(results), donated)
    inside = {kernel: _inside(graph.ops[kernel], graph.rules) for kernel in made.numbers}
    when = _moments(graph, made, inside, (outside, results))
    copies = _copies(graph, made, when, homes) if graph.rules.copies else {}
    names, copied = {one: graph.ops[n].name for one, n in made.made.items()}, {*copies.values()}
    blocks = [
        Block(graph.sizes[one], born, when.dead[one], names.get(one, "copy"))
        for one, born in when.born.items()
        if one not in homes and (one not in outside or one in copied)
    ]
    for kernel, run in inside.items():
        blocks += [
            one._replace(born=one.born + when.start[kernel], dead=one.dead + when.start[kernel]) for one in run.blocks
        ]
    places = {
        argument: (graph.sizes[argument], [(when.born[result], when.dead[result])])
        for result, argument in homes.items()
        if argument in copies and donated
    }
    blocks = packing.without_guests([block for block in blocks if block.size and block.dead > block.born], places)
    length = sum(when.length.values())
    return Run(blocks, length, _kept(graph, made) + max((run.kept for run in inside.values()), default=0))


def _order(made: Kernels) -> list[int]:
    """Kernels breadth first: each as soon as all that it reads is there, first come, first served.

    So does XLA's CPU compiler (`xla_cpu_enable_concurrency_optimized_scheduler`), that its threads have work: what only
    the backward pass reads may be made at the very start.
    """
    needs = {kernel: {made.made[one] for one in made.reads[kernel] if one in made.made} for kernel in made.numbers}
    users: dict[int, list[int]] = {kernel: [] for kernel in made.numbers}
    for kernel, own in needs.items():
        for one in own:
            users[one].append(kernel)
    missing = {kernel: len(own) for kernel, own in needs.items()}
    ready, order = deque(kernel for kernel, count in missing.items() if not count), []
    while ready:
        order.append(ready.popleft())
        for user in users[order[-1]]:
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    return order


def _moments(graph: Graph, made: Kernels, inside: dict[int, Run], ends: tuple) -> Moments:
    """When each value is there; one that ends where another of its size is made in place of it ends before that."""
    (outside, results), order = ends, _order(made) if graph.rules.breadth else made.numbers
    length = {kernel: 1 + inside[kernel].length for kernel in order}
    start = dict(zip(order, accumulate((length[kernel] for kernel in order), initial=0), strict=False))
    born, last = dict.fromkeys(results, 0), {}
    for kernel in order:
        for one in made.reads[kernel]:
            last[one] = start[kernel] + length[kernel]
            if one not in made.made:
                born.setdefault(one, 0)
        op = graph.ops[kernel]
        born.update(dict.fromkeys(op.makes, start[kernel]))
        last.update(dict.fromkeys(op.makes, start[kernel] + length[kernel]))
        if op.name == "cond":  # until then, what it gives is counted inside
            born.update(dict.fromkeys(op.makes, start[kernel] + length[kernel] - 1))
        if op.name == "scan" and graph.rules.filled:  # what each trip adds to is made as zeros, which wait for nothing
            born.update(dict.fromkeys(op.makes[compat.scan_counts(op.equation)[1] :], 0))
    last.update(dict.fromkeys(results, sum(length.values()) + 1))
    dead = {one: last[one] for one in born}
    for kernel in order:
        op, end = graph.ops[kernel], start[kernel] + length[kernel]
        ending = [one for one in made.reads[kernel] if last.get(one) == end and one not in outside]
        for one in op.makes if _over(graph, op) else _carried(op):
            same = [old for old in ending if graph.sizes[old] == graph.sizes[one]]
            if same:
                dead[same[0]] = start[kernel]
                ending.remove(same[0])
    return Moments(order, start, length, born, dead)


def _over(graph: Graph, op: Op) -> bool:
    """Whether what an operation makes is written over what it reads."""
    return op.name in IN_PLACE and (graph.rules.summed or op.name not in SUMS)


def _carried(op: Op) -> tuple[int, ...]:
    """What a loop carries lies where it lay before the loop."""
    return op.makes[: compat.scan_counts(op.equation)[1]] if op.name == "scan" else ()


def _copies(graph: Graph, made: Kernels, when: Moments, homes: dict[int, int]) -> dict[int, int]:
    """Copies of arguments, by argument, added to the moments.

    XLA copies an argument that is overwritten by a result, unless whatever else reads it comes before in any order.
    As a copy waits for nothing it is made at the start.
    """
    found: dict[int, int] = {}
    for result, argument in homes.items():
        writer = made.made.get(result)
        others = {kernel for kernel in made.numbers if argument in made.reads[kernel]} - {writer}
        if writer is not None and others - _before(made, writer, min(others, default=0)):
            graph.sizes.append(graph.sizes[argument])
            copy = found[argument] = len(graph.sizes) - 1
            when.born[copy] = 0
            when.dead[copy] = max(when.start[kernel] + when.length[kernel] for kernel in others | {writer})
    return found


def _before(made: Kernels, kernel: int, first: int) -> set[int]:
    """The kernels, from number `first` on, that one waits for."""
    seen, todo = set(), [kernel]
    while todo:
        for one in made.reads[todo.pop()]:
            number = made.made.get(one, -1)
            if number >= first and number not in seen:
                seen.add(number)
                todo.append(number)
    return seen


def _kept(graph: Graph, made: Kernels) -> int:
    """Bytes of what a forward kernel makes and a backward one reads."""
    read = {one for kernel in made.numbers if graph.ops[kernel].backward for one in made.reads[kernel]}
    return sum(graph.sizes[one] for one in read if one in made.made and not graph.ops[made.made[one]].backward)


def _inside(op: Op, rules: Rules) -> Run:
    """What a loop or branch takes beyond what it reads and makes: the branches of a switch one after the other."""
    if op.name == "threefry2x32":  # itself a loop, that carries two words and three keys and makes one more
        size = 3 * sum(var.aval.size * var.aval.dtype.itemsize for var in op.equation.outvars)
        return Run([Block(size, 0, 1, op.name)], 1, 0)
    if op.equation.primitive.name != op.name:
        return Run([], 0, 0)
    found = (
        [_trip(op.equation, rules)] if op.name == "scan" else [_branch(one, rules) for one in jaxprs_of(op.equation)]
    )
    blocks, length = [], 0
    for run in found:
        for one in run.blocks:
            blocks.append(one._replace(born=one.born + length, dead=min(one.dead, run.length) + length))
        length += run.length
    return Run(blocks, length, max((run.kept for run in found), default=0))


def _branch(jaxpr, rules: Rules) -> Run:
    """Of one branch; what is added to an operand is written over it."""
    graph = empty(rules)
    given = [value(graph, var.aval) for var in jaxpr.invars]
    results = flatten(graph, jaxpr, given)
    rounding.narrow(graph, (), results)
    made, homes = {one: op for op in graph.ops for one in op.makes}, {}
    for one in results:
        if one in made and made[one].name in IN_PLACE:
            free = [old for old in made[one].reads if old in given and old not in homes.values()]
            if free and graph.sizes[free[0]] == graph.sizes[one]:
                homes[one] = free[0]
    return _run(graph, {*given}, results, homes)


def _trip(equation, rules: Rules) -> Run:
    """Of one trip of a scan: each operand is cut out of its stack where it is read, each result written into one.

    What is carried is written to where it lies, from a copy if the old is still read.
    """
    jaxpr, graph, (consts, carries) = equation.params["jaxpr"], empty(rules), compat.scan_counts(equation)
    given, first = [value(graph, var.aval) for var in jaxpr.jaxpr.invars], consts + carries
    cut = [
        add(graph, "dynamic_slice", (stack,), equation, False, (var.aval,))[0]
        for stack, var in zip(given[first:], jaxpr.jaxpr.invars[first:], strict=True)
    ]
    results = flatten(graph, jaxpr.jaxpr, [*given[:first], *cut])
    nothing = ShapedArray((0,), "int8")
    ends = [add(graph, kernels.STACKED, (one,), equation, False, (nothing,))[0] for one in results[carries:]]
    rounding.narrow(graph, (), [*results[:carries], *ends])
    homes = {new: old for new, old in zip(results, given[consts:first], strict=False) if new != old}
    return _run(graph, {*given}, [*results[:carries], *ends], homes)
