"""How much memory a traced program takes once compiled, from the trace alone: what is there at once, at its worst.

The kernels are put into the order of XLA's CPU compiler, and their results laid out as it does. A loop or a branch is
looked into once, however often it runs.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jax.core import ShapedArray

from jaxpar.report.kernels import ELEMENTWISE, REDUCTIONS, STACKED, Graph, Kernels, Op, add, empty, flatten, jaxprs_of
from jaxpar.report.kernels import kernels as kernels_of
from jaxpar.report.kernels import value

IN_PLACE = ELEMENTWISE | REDUCTIONS | {"dynamic_update_slice", "scatter", "scatter-add", "psum", "psum_invariant", "pmax"}


class Peak(NamedTuple):
    """Bytes of one device while a program runs, besides what it is given.

    Attributes:
        bytes: the most there is at once.
        kept: of what forward operations make for backward ones.
        at: the name of the operation that runs when most is there.
        live: what is there then: (bytes, name of the operation that made it), largest first.
    """

    bytes: int
    kept: int
    at: str
    live: tuple[tuple[int, str], ...]


class Spans(NamedTuple):
    """When values are in memory, in kernels since the start.

    Attributes:
        born: the first kernel of each value's life.
        dead: the first kernel after it.
        extra: bytes that each kernel takes while it runs, beyond what it reads and makes.
    """

    born: dict[int, int]
    dead: dict[int, int]
    extra: list[int]


def peak(jaxpr, then=None, feeds: Sequence[int | None] = (), aliases: Sequence[tuple[int, int]] = ()) -> Peak:
    """The most memory that a program takes, besides its arguments, as compiled for one device.

    Args:
        jaxpr: a trace with the shapes of one device: of the inside of a `jax.shard_map`.
        then: a trace that goes on where `jaxpr` ends, if there is one.
        feeds: what each argument of `then` is, by number among the results of `jaxpr` and, after them, its arguments;
            None for what is new.
        aliases: (argument, result) of the last trace: the result is written to where the argument lies.
    """
    graph = empty()
    given = [value(graph, var.aval) for var in jaxpr.invars]
    results, old = flatten(graph, jaxpr, given), given
    if then is not None:
        linked = [*results, *given]
        given = [value(graph, var.aval) if n is None else linked[n] for n, var in zip(feeds, then.invars, strict=True)]
        results = flatten(graph, then, given, True)
    homes = {results[result]: given[argument] for argument, result in aliases}
    return _peak(graph, {*old, *given}, results, homes)


def _peak(graph: Graph, outside: set[int], results: Sequence[int], homes: dict[int, int]) -> Peak:
    """Of a graph; `outside` is not counted, `homes` says which results are written to where an argument lies."""
    made = kernels_of(graph, set(results))
    order = _order(made)
    within = [_inside(graph.ops[kernel]) for kernel in order]
    spans = _spans(graph, made, order, (outside, results), [extra for extra, _ in within])
    copies = _copies(graph, made, order, spans, homes)
    for one in outside - set(copies.values()):
        spans.born.pop(one, None)
    guests = _guests(graph, spans, homes, copies)
    counted = [one for one in spans.born if one not in guests and one not in homes]
    bytes_, tick = _most(graph, spans, counted)
    names = {one: graph.ops[n].name for one, n in made.made.items()}
    live = sorted(
        ((graph.sizes[one], names.get(one, "copy")) for one in counted if spans.born[one] <= tick < spans.dead[one]),
        reverse=True,
    )
    at = graph.ops[order[tick]].name if order else ""
    kept = _kept(graph, made) + max((kept for _, kept in within), default=0)
    return Peak(bytes_, kept, at, tuple(live))


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


def _spans(graph: Graph, made: Kernels, order: list[int], ends: tuple, extra: list[int]) -> Spans:
    """When each value is there; one that ends where another of its size is made in place of it ends before that."""
    outside, results = ends
    born, last = {}, {}
    for tick, kernel in enumerate(order):
        for one in made.reads[kernel]:
            last[one] = tick
            if one not in made.made:
                born.setdefault(one, 0)
        op = graph.ops[kernel]
        born.update(dict.fromkeys(op.makes, tick))
        if op.name == "scan":  # what each trip adds to is made first of all: as zeros, which wait for nothing
            born.update(dict.fromkeys(op.makes[op.equation.params["num_carry"] :], 0))
    for one in results:
        last[one] = len(order)
        born.setdefault(one, 0)
    dead = {one: last.get(one, at) + 1 for one, at in born.items()}
    for tick, kernel in enumerate(order):
        op = graph.ops[kernel]
        ending = [one for one in made.reads[kernel] if last[one] == tick and one not in outside]
        for one in op.makes if op.name in IN_PLACE else _carried(op):
            same = [old for old in ending if graph.sizes[old] == graph.sizes[one]]
            if same:
                dead[same[0]] = tick
                ending.remove(same[0])
    return Spans(born, dead, extra)


def _carried(op: Op) -> tuple[int, ...]:
    """What a loop carries lies where it lay before the loop."""
    return op.makes[: op.equation.params["num_carry"]] if op.name == "scan" else ()


def _copies(graph: Graph, made: Kernels, order: list[int], spans: Spans, homes: dict[int, int]) -> dict[int, int]:
    """Copies of arguments, by argument, added to the spans.

    XLA copies an argument that is overwritten by a result, unless whatever else reads it comes before in any order.
    As a copy waits for nothing it is made at the start.
    """
    found, at = {}, {kernel: tick for tick, kernel in enumerate(order)}
    for result, argument in homes.items():
        writer = made.made.get(result)
        others = {kernel for kernel in made.numbers if argument in made.reads[kernel]} - {writer}
        if writer is not None and others - _before(made, writer, min(others, default=0)):
            graph.sizes.append(graph.sizes[argument])
            copy = found[argument] = len(graph.sizes) - 1
            spans.born[copy], spans.dead[copy] = 0, 1 + max(at[kernel] for kernel in others | {writer})
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


def _guests(graph: Graph, spans: Spans, homes: dict[int, int], copies: dict[int, int]) -> set[int]:
    """Values that lie where a copied argument lay, until the result that takes its place is made.

    XLA lays out the largest first, each where nothing else lies at the time; in an argument's place never two at once.
    """
    taken = {
        argument: [(spans.born[result], spans.dead[result])] for result, argument in homes.items() if argument in copies
    }
    guests, places = set(), sorted(taken, key=lambda one: graph.sizes[one])
    least = min((graph.sizes[one] for one in taken), default=0)
    for one in sorted(spans.born, key=lambda one: -graph.sizes[one]):
        if one in homes or one in homes.values() or not graph.sizes[one]:
            continue
        born, dead = spans.born[one], spans.dead[one]
        for place in places:
            if graph.sizes[place] >= graph.sizes[one] and all(dead <= b or d <= born for b, d in taken[place]):
                taken[place].append((born, dead))
                guests.add(one)
                break
    return guests


def _most(graph: Graph, spans: Spans, counted: Iterable[int]) -> tuple[int, int]:
    """The most bytes at once, and when."""
    change = [0] * (len(spans.extra) + 2)
    for one in counted:
        change[spans.born[one]] += graph.sizes[one]
        change[min(spans.dead[one], len(change) - 1)] -= graph.sizes[one]
    most, when, now = 0, 0, 0
    for tick, extra in enumerate(spans.extra or [0]):
        now += change[tick]
        if now + extra > most:
            most, when = now + extra, tick
    return most, when


def _kept(graph: Graph, made: Kernels) -> int:
    """Bytes of what a forward kernel makes and a backward one reads."""
    read = {one for kernel in made.numbers if graph.ops[kernel].backward for one in made.reads[kernel]}
    return sum(graph.sizes[one] for one in read if one in made.made and not graph.ops[made.made[one]].backward)


def _inside(op: Op) -> tuple[int, int]:
    """Bytes that a loop or branch takes beyond what it reads and makes, and what it keeps for backward operations."""
    own = op.equation.primitive.name == op.name
    found = [_trip(op.equation)] if op.name == "scan" else [_branch(one) for one in jaxprs_of(op.equation) if own]
    return max((one.bytes for one in found), default=0), max((one.kept for one in found), default=0)


def _branch(jaxpr) -> Peak:
    """Of one branch, less what it gives: that is counted where the branch is taken."""
    graph = empty()
    given = [value(graph, var.aval) for var in jaxpr.invars]
    results = flatten(graph, jaxpr, given)
    found = _peak(graph, set(given), results, {})
    return found._replace(bytes=max(0, found.bytes - sum(graph.sizes[one] for one in {*results} - {*given})))


def _trip(equation) -> Peak:
    """Of one trip of a scan, less what is carried: each operand is cut out of its stack where it is read."""
    jaxpr, consts, carries = (equation.params[name] for name in ("jaxpr", "num_consts", "num_carry"))
    graph, first = empty(), consts + carries
    given = [value(graph, var.aval) for var in jaxpr.jaxpr.invars]
    cut = [
        add(graph, "dynamic_slice", (stack,), equation, False, (var.aval,))[0]
        for stack, var in zip(given[first:], jaxpr.jaxpr.invars[first:], strict=True)
    ]
    results = flatten(graph, jaxpr.jaxpr, [*given[:first], *cut])
    nothing = ShapedArray((0,), "int8")
    ends = [add(graph, STACKED, (one,), equation, False, (nothing,))[0] for one in results[carries:]]
    outside = {*given[:consts], *given[first:]}
    found = _peak(graph, outside, [*results[:carries], *ends], {})
    return found._replace(bytes=max(0, found.bytes - sum(graph.sizes[one] for one in given[consts:first])))
