"""Which operations of a program a compiler computes where they are read, and which end a kernel and lie in memory."""

from typing import NamedTuple

from jaxpar.report.kernels import (
    COSTLY,
    ELEMENTWISE,
    FILLED,
    FUSING,
    JOINED,
    POLYNOMIALS,
    POWERS,
    PRODUCTS,
    REDUCTIONS,
    Graph,
    Op,
)


class Kernels(NamedTuple):
    """What remains of a graph.

    Attributes:
        numbers: the operations that end a kernel, in order.
        reads: the values in memory that each kernel reads.
        made: the operation that made each value.
    """

    numbers: list[int]
    reads: dict[int, list[int]]
    made: dict[int, int]


def kernels(graph: Graph, results: set[int], outermost: bool = True) -> Kernels:
    """Fuse a graph.

    Args:
        graph: the program.
        results: values that must be in memory.
        outermost: whether it stands in no loop and no branch.

    From the last operation to the first, as XLA's `InstructionFusion` does it.
    """
    made = {one: number for number, op in enumerate(graph.ops) for one in op.makes}
    within = _within(graph, results, made, outermost, _heavy(graph, made, None))
    if graph.rules.products:  # how much a chain reads depends on where it begins: at what is in memory
        stored = {number for number, own in enumerate(within) if number in own}
        within = _within(graph, results, made, outermost, _heavy(graph, made, stored))
    numbers = sorted(set().union(*within))
    reads: dict[int, dict[int, None]] = {number: {} for number in numbers}
    for number, op in enumerate(graph.ops):
        for read in op.reads:
            for kernel in within[number]:
                if read not in made or kernel not in within[made[read]]:
                    reads[kernel][read] = None
    return Kernels(numbers, {kernel: list(own) for kernel, own in reads.items()}, made)


def _within(
    graph: Graph, results: set[int], made: dict[int, int], outermost: bool, heavy: list[bool]
) -> list[frozenset[int]]:
    """Of each operation the kernels in which it is computed; one that ends a kernel is in its own.

    An elementwise operation is computed in each kernel that reads it. In memory it must be for what is no kernel of
    that kind (products, collectives, loops); if it is cheap and reads one large array at most, the others still compute
    it themselves. A sum takes in only what nobody else reads.
    """
    ops, readers = graph.ops, {}
    for number, op in enumerate(ops):
        for read in op.reads:
            readers.setdefault(read, set()).add(number)
    within = [frozenset()] * len(ops)
    for number in range(len(ops) - 1, -1, -1):
        op, own = ops[number], frozenset([number])
        using = set().union(*(readers.get(one, ()) for one in op.makes))
        if op.name not in ELEMENTWISE:
            within[number] = _with_reader(graph, within, using, results.isdisjoint(op.makes), number)
            continue
        light = len(using) == 1 or not heavy[number]
        fusing = {n for n in using if ops[n].name in FUSING or _joins(graph, n, light)}
        filled = op.name in FILLED
        if outermost and filled and op.reads and len(using) > 1 and not graph.rules.again:  # not into a batched product
            fusing = {n for n in fusing if not _after_product(graph, made, ops[n])}
        into = frozenset().union(*(within[n] for n in fusing))
        stored = fusing != using or not results.isdisjoint(op.makes)
        sums = {n for n in into if ops[n].name in REDUCTIONS}
        if sums and not filled and (not graph.rules.again or op.name in POWERS) and (stored or len(into) > 1):
            into, stored = into - sums, True
        if graph.rules.again and ((sums and op.name in POWERS) or _rounds(graph, made, op)):
            within[number] = own
        elif not filled and not _cheap(graph, made, op):
            spread = any(ops[n].name == "broadcast_in_dim" for n in using)
            within[number] = own if stored or spread or len(into) > 1 else into
        elif stored:
            within[number] = into | own if filled or _reads_one(graph, made, op) else own
        else:
            within[number] = into
    return within


def _rounds(graph: Graph, made: dict[int, int], op: Op) -> bool:
    """Whether a product's result is rounded here, which is done before it is written."""
    product = op.name == "convert_element_type" and op.reads and op.reads[0] in made
    if not product or graph.ops[made[op.reads[0]]].name not in PRODUCTS:
        return False
    return graph.sizes[op.makes[0]] < graph.sizes[op.reads[0]]


def _joins(graph: Graph, reader: int, light: bool) -> bool:
    """Whether a reader is a product, or a scatter, that computes what it reads itself."""
    return graph.rules.products and graph.ops[reader].name in JOINED and light


def _heavy(graph: Graph, made: dict[int, int], stored: set[int] | None) -> list[bool]:
    """Of each operation whether a product rather reads its result than makes it.

    So it is if that means an error function, which is a long polynomial, or reading more than one large array; `stored`
    are the operations whose results are in memory, None if that is not known yet.
    """
    deep: list[bool] = []
    sources: list[dict[int, int]] = []  # how many numbers each kernel that ends here reads of what is in memory
    for op in graph.ops:
        made_of = max((graph.counts[one] for one in op.makes), default=0)
        before = {read: made[read] for read in op.reads if read in made and graph.ops[made[read]].name in ELEMENTWISE}
        own: dict[int, int] = {}
        for read in op.reads:
            through = read in before and stored is not None and before[read] not in stored
            for source, count in (sources[before[read]] if through else {read: graph.counts[read]}).items():
                if source not in made or graph.ops[made[source]].name not in FILLED:
                    own[source] = max(own.get(source, 0), min(count, made_of))
        sources.append(own)
        deep.append(op.name in POLYNOMIALS or any(deep[number] for number in before.values()))
    return [
        op.name in ELEMENTWISE and (deep[n] or _reads_more(graph, op, sources[n])) for n, op in enumerate(graph.ops)
    ]


def _reads_more(graph: Graph, op: Op, sources: dict[int, int]) -> bool:
    """Whether more than one of the arrays that are read is as large as the result."""
    return sum(count >= max(graph.counts[one] for one in op.makes) for count in sources.values()) > 1


def _with_reader(graph: Graph, within: list, using: set[int], free: bool, number: int) -> frozenset[int]:
    """The kernel of an operation that is not elementwise: its own, or of a product that of its only reader."""
    own = frozenset([number])
    if not (graph.rules.products and graph.ops[number].name in JOINED and free and len(using) == 1):
        return own
    (reader,) = using
    into = within[reader]
    if graph.ops[reader].name not in ELEMENTWISE or len(into) != 1:
        return own
    taken = any(graph.ops[n].name in JOINED and into == within[n] for n in range(number + 1, len(within)))
    return own if taken else into


def _after_product(graph: Graph, made: dict[int, int], op: Op) -> bool:
    """Whether an operation reads a product with batch dims."""
    found = [graph.ops[made[read]] for read in op.reads if read in made]
    return any(one.name == "dot_general" and one.equation.params["dimension_numbers"][1][0] for one in found)


def _cheap(graph: Graph, made: dict[int, int], op: Op) -> bool:
    """Whether an operation is computed again rather than kept; to divide by what is broadcast is to multiply."""
    if graph.rules.again:
        return True
    if op.name == "div" and op.equation.primitive.name == "div":
        if len(op.reads) < 2:  # none, where both are constants, as the inverse of a static loss scale
            return hasattr(op.equation.invars[1], "val")
        return op.reads[1] in made and graph.ops[made[op.reads[1]]].name == "broadcast_in_dim"
    return op.name not in COSTLY


def _reads_one(graph: Graph, made: dict[int, int], op: Op) -> bool:
    """Whether computing an operation again reads at most one array as large as what it makes."""
    size = max(graph.counts[one] for one in op.makes)
    large = [read for read in op.reads if graph.counts[read] >= size]
    return sum(read not in made or graph.ops[made[read]].name not in FILLED for read in large) <= 1
