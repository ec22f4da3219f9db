"""Which activations to keep if they may take so many bytes: those that save most work, block by block.

What a block may keep is found in its trace; which block keeps what is a knapsack with several choices for each block.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.core import compat, products
from jaxpar.core.refuse import Problem, Refused
from jaxpar.core.walk import jaxprs, visits

MOST_NAMES = 10  # of one block: 2^10 sets of them are tried
MOST_CHOICES = 12  # of one block, out of those sets
MOST_POINTS = 4096  # of a front
CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")


class Choice(NamedTuple):
    """What one block may keep.

    Attributes:
        what: names of activations; or `dots`, or `everything` but what was gathered.
        bytes: of one device, the block's input included.
        work: what the backward pass makes again: flops of products, and one for each number that others make.
    """

    what: tuple[str, ...] | str
    bytes: int
    work: float


def choose(choices: Sequence[Sequence[tuple[float, float]]], limit: float) -> list[int]:
    """For each block the number of its choice, such that all keep at most `limit` bytes and do least work.

    Fronts of what no other combination beats are merged block by block. A front of more than MOST_POINTS is thinned
    out, which may cost a little of the optimum, and never exceeds the limit.

    Args:
        choices: for each block the (bytes, work) of what it may keep.
        limit: bytes.

    Raises:
        ValueError: if not even the fewest bytes of each block are within the limit.

    Source: multiple-choice knapsack by dominance: Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, chapter 11.
    """
    fewest = [min(held for held, _ in block) for block in choices]
    if sum(fewest) > limit:
        raise ValueError(f"the blocks keep at least {sum(fewest)} bytes, more than {limit}.")
    held, work, trail = np.zeros(1), np.zeros(1), []
    for number, block in enumerate(choices):
        own = np.asarray(block, float)
        sums, works = (held[:, None] + own[:, 0]).ravel(), (work[:, None] + own[:, 1]).ravel()
        order = np.lexsort((works, sums))
        order = order[sums[order] + sum(fewest[number + 1 :]) <= limit]
        best = np.minimum.accumulate(works[order])
        order = order[np.concatenate([[True], works[order][1:] < best[:-1]])]
        if len(order) > MOST_POINTS:  # of those in one step of bytes, the one with the least work: the last
            step = (sums[order] - sums[order[0]]) // ((sums[order[-1]] - sums[order[0]]) / (MOST_POINTS - 1))
            last = np.concatenate([step[1:] != step[:-1], [True]])
            last[0] = True
            order = order[last]
        held, work = sums[order], works[order]
        trail.append(np.divmod(order, len(block)))
    found, at = [], int(np.argmin(work))
    for before, chosen in reversed(trail):
        found.append(int(chosen[at]))
        at = int(before[at])
    return found[::-1]


def runs(chosen: Sequence[int], everything: int) -> list[tuple[int, int]]:
    """(choice, blocks) of each run of equal blocks, those that keep least first: what is kept last is let go first.

    A block alone is run once and keeps everything, as of `remat.scan`; so it joins one that keeps less, or is joined.

    Args:
        chosen: the choice of each block; a smaller number keeps less.
        everything: the choice that keeps everything.
    """
    counts = {choice: list(chosen).count(choice) for choice in sorted(set(chosen))}
    for choice in sorted(counts, reverse=True)[:-1]:
        if counts[choice] == 1 and choice != everything:
            counts[max(lower for lower in counts if lower < choice)] += counts.pop(choice)
    first, *others = counts
    if counts[first] == 1 and first != everything and others:
        taken = 1 if counts[others[0]] > 2 or others[0] == everything else counts[others[0]]
        counts[first] += taken
        counts[others[0]] -= taken
    return [(choice, count) for choice, count in counts.items() if count]


def choices_of(body: Callable, carry, xs, policies: Mapping[str, Callable]) -> list[Choice]:
    """What one step of a chain may keep, those first that keep least; choices that others beat are left out.

    Found in the trace of the step forward and back: what the backward pass reads is kept, or made again from what is.

    Args:
        body, carry: as of `jax.lax.scan`.
        xs: of one step.
        policies: further choices by name, as of `jax.checkpoint`.
    """
    graph, own = _graph(body, carry, xs), sum(map(_size, jax.tree.leaves(carry)))
    nothing, saved = _kept(graph, lambda line: False), {}
    for name in dict.fromkeys(line.name for line in graph.made.values() if line.name):
        held, again = _kept(graph, lambda line, name=name: line.name == name)
        if again < nothing[1]:
            saved[name] = (nothing[1] - again) / held
    names = sorted(saved, key=saved.get, reverse=True)[:MOST_NAMES]
    sets = itertools.chain.from_iterable(itertools.combinations(names, count) for count in range(1, len(names) + 1))
    found = [((), *nothing), *((some, *_kept(graph, lambda line, some=some: line.name in some)) for some in sets)]
    for name, policy in policies.items():
        found.append((name, *_kept(graph, lambda line, policy=policy: policy(line.primitive))))
    front: list[Choice] = []
    for what, held, again in sorted(found, key=lambda one: one[1:]):
        if not front or again < front[-1].work:
            front.append(Choice(what, own + held, again))
    ends = 0, len(front) - 1
    step = max(1, math.ceil(len(front) / MOST_CHOICES))
    return [one for number, one in enumerate(front) if number in ends or number % step == 0]


def kept_bytes(step: Callable, carry, xs) -> int:
    """Bytes that a step keeps for its backward pass besides its parameters, as jax differentiates it."""

    def forward(carry, xs):
        return jax.tree.leaves(jax.vjp(step, carry, xs)[1])

    jaxpr, own = jax.make_jaxpr(forward)(carry, xs).jaxpr, len(jax.tree.leaves(carry))
    given = {*jaxpr.invars[own:], *jaxpr.constvars}
    kept = {var for var in jaxpr.outvars if not hasattr(var, "val") and var not in given}
    return sum(_size(var.aval) for var in kept | {*jaxpr.invars[:own]})


def refused(limit: int, blocks: int, least: int) -> Refused:
    """The answer to a budget that is too small."""
    rule = f"a device keeps at least {least} bytes of {blocks} blocks, the input of each."
    return Refused([Problem("plan.remat", f"budget:{limit}", rule, f"budget:{least} or more; or remat=sqrt")])


class Line(NamedTuple):
    """One operation: its primitive, the activation that it names, if it does, what it reads and makes, and its work."""

    primitive: Any
    name: str | None
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    work: float


class Graph(NamedTuple):
    """A step forward and back, values by number.

    Attributes:
        made: of each value the operation that makes it; none for an argument.
        sizes: bytes of each value.
        roots: what of the forward pass the backward pass reads.
    """

    made: dict[int, Line]
    sizes: list[int]
    roots: list[int]


def _graph(body: Callable, carry, xs) -> Graph:
    made = jax.eval_shape(body, carry, xs)
    real = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(made)]
    seeds = [
        compat.vary(jnp.zeros(leaf.shape, leaf.dtype), compat.varying_axes(leaf))
        for leaf, one in zip(jax.tree.leaves(made), real, strict=True)
        if one
    ]

    def both(carry, xs, seeds):
        made, pull = jax.vjp(body, carry, xs)
        left, leaves = iter(seeds), jax.tree.leaves(made)
        none = (np.zeros(leaf.shape, jax.dtypes.float0) for leaf, one in zip(leaves, real, strict=True) if not one)
        found = pull(jax.tree.unflatten(jax.tree.structure(made), [next(left if one else none) for one in real]))
        return [leaf for leaf in jax.tree.leaves(found) if leaf.dtype != jax.dtypes.float0]

    jaxpr = compat.without_dead_code(jax.make_jaxpr(both)(carry, xs, seeds).jaxpr)
    lines, sizes = [], []
    given = [_new(sizes, var) for var in jaxpr.invars]
    _write_out(jaxpr, given, lines, sizes)
    late, needed = {*given[len(given) - len(seeds) :]}, {}  # what comes after the seeds is of the backward pass
    for line in lines:
        if not late.isdisjoint(line.reads):
            late.update(line.makes)
            needed.update(dict.fromkeys(line.reads))
    return Graph({one: line for line in lines for one in line.makes}, sizes, [one for one in needed if one not in late])


def _kept(graph: Graph, keep: Callable[[Line], bool]) -> tuple[int, float]:
    """Bytes of what is kept of what the backward pass needs, and the work to make the rest again."""
    held, work, todo, seen = 0, 0.0, list(graph.roots), set()
    while todo:
        one = todo.pop()
        line = graph.made.get(one)
        if one in seen or line is None:
            continue
        if keep(line):
            held += graph.sizes[one]
        elif line.makes[0] not in seen:
            work += line.work
            todo += line.reads
        seen.update([one] if keep(line) else line.makes)
    return held, work


def _new(sizes: list[int], var) -> int:
    sizes.append(_size(var.aval))
    return len(sizes) - 1


def _write_out(jaxpr, given: Sequence[int], lines: list[Line], sizes: list[int]) -> list[int]:
    """Append the operations of a jaxpr, and of functions within it; the numbers of its results, -1 for a literal."""
    known = dict(zip(jaxpr.invars, given, strict=True)) | {var: _new(sizes, var) for var in jaxpr.constvars}
    for equation in jaxpr.eqns:
        reads = [-1 if hasattr(var, "val") else known[var] for var in equation.invars]
        inner = equation.params.get("jaxpr") if equation.primitive.name in CALLS else None
        if inner is not None:
            makes = _write_out(getattr(inner, "jaxpr", inner), reads, lines, sizes)
        else:
            makes = [_new(sizes, var) for var in equation.outvars]
            name = equation.params["name"] if equation.primitive.name == "name" else None
            read = tuple(one for one in reads if one >= 0)
            lines.append(Line(equation.primitive, name, read, tuple(makes), _all_work(equation)))
        known.update(zip(equation.outvars, makes, strict=True))
    return [-1 if hasattr(var, "val") else known[var] for var in jaxpr.outvars]


def _size(aval) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8)


def _work(equation) -> float:
    return products.of(equation) or float(sum(math.prod(var.aval.shape) for var in equation.outvars))


def _all_work(equation) -> float:
    """Of an operation and what it holds, as often as that runs."""
    inner = [getattr(one, "jaxpr", one) for one in jaxprs(equation)]
    if not inner:
        return _work(equation)
    trips = equation.params["length"] if equation.primitive.name == "scan" else 1
    return trips * sum(visit.times * _work(visit.equation) for one in inner for visit in visits(one, _work))
