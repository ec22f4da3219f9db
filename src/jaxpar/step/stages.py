"""A model cut into pipeline stages: where, and who holds which parameters.

A model with one stack of at least as many blocks as stages is cut inside the stack: each device holds only the blocks
of its own stages, and what stands before and after the stack runs on the first and the last. Any other chain is cut
between its parts so that the slowest stage is as fast as possible; each device then holds all parameters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.core import products
from jaxpar.core.refuse import Problem, Refused
from jaxpar.core.types import Layer, Part, Tree
from jaxpar.plan.context import context
from jaxpar.plan.product import Settings
from jaxpar.plan.zero import fetched, owned


class Piece(NamedTuple):
    """What a stage runs of one part of the chain.

    Attributes:
        part: the part.
        count: how many blocks of it, one after the other; 0 for a part that is no stack.
        first: the number of the first of them in the model.
        row: the row of the device's own leaves in which the first of them lies.
    """

    part: Part
    count: int = 0
    first: int = 0
    row: int = 0


Stage = tuple[Piece, ...]


class Division(NamedTuple):
    """A model in stages.

    Attributes:
        stages: what each stage runs, first stage first.
        stack: which block lies at each place of the `layers` dim over the axis `pipe`, -1 for none (`Placement.stack`);
            empty if each device holds all of them.
    """

    stages: tuple[Stage, ...]
    stack: tuple[int, ...] = ()


def divide(model: Layer, place: Sequence[int], name: str, costs) -> Division:
    """Cut `model` into one stage for each entry of `place`.

    Args:
        model: a chain.
        place: the device of each stage, first stage first.
        name: of the model, for messages.
        costs: `costs() -> [cost]` of each of `items(model)`, asked for only if it matters.

    Raises:
        Refused: if there is nothing to cut, or too little.
    """
    if not model.parts and len(place) > 1:
        rule = "is not a chain of parts, so a pipeline cannot cut it."
        raise Refused([Problem("model.name", name, rule, "a model built by jaxpar.core.parts.chain; or pipe=1")])
    stacks = [part for part in model.parts if part.layer.blocks]
    if len(place) == 1:
        return Division(
            (tuple(Piece(part, part.layer.blocks) for part in model.parts) or (Piece(Part("", model, "")),),)
        )
    if len(stacks) == 1 and stacks[0].layer.blocks >= len(place):
        return _inside(model, stacks[0], place)
    return _between(model, place, costs)


def _inside(model: Layer, stack: Part, place: Sequence[int]) -> Division:
    """Cut the one stack; if it does not divide, the last and the first stage get fewer blocks: they have the rest."""
    stages, blocks = len(place), stack.layer.blocks
    room = -(-blocks // stages)
    counts = [room] * stages
    short = [stages - 1, 0, *range(stages - 2, 0, -1)]
    for stage in short[: room * stages - blocks]:
        counts[stage] -= 1
    chunks = stages // (max(place) + 1)
    rows = [-1] * (stages * room)
    parts, at, cut = list(model.parts), model.parts.index(stack), []
    for stage, count in enumerate(counts):
        chunk = sum(device == place[stage] for device in place[:stage])
        first, start = sum(counts[:stage]), (place[stage] * chunks + chunk) * room
        rows[start : start + count] = range(first, first + count)
        before = parts[:at] if stage == 0 else []
        after = parts[at + 1 :] if stage == stages - 1 else []
        own = Piece(stack, count, first, chunk * room)
        cut.append((*map(Piece, before), own, *map(Piece, after)))
    return Division(tuple(cut), tuple(rows))


def items(model: Layer) -> list[Piece]:
    """What cannot be cut any further: parts, and single blocks."""
    return [
        piece
        for part in model.parts
        for piece in ([Piece(part, 1, n, n) for n in range(part.layer.blocks)] or [Piece(part)])
    ]


def _between(model: Layer, place: Sequence[int], costs) -> Division:
    """Cut between parts, so that the largest sum of costs is as small as it can be."""
    pieces, stages = items(model), len(place)
    if len(pieces) < stages:
        rule = f"makes {stages} stages, and the model has {len(pieces)} parts to share out among them."
        raise Refused([Problem("plan.pipe", max(place) + 1, rule, f"pipe times chunks of at most {len(pieces)}")])
    ends = balanced(costs(), stages)
    return Division(tuple(_joined(pieces[start:end]) for start, end in zip([0, *ends], ends, strict=False)))


def balanced(costs: Sequence[float], groups: int) -> list[int]:
    """Where each of `groups` runs of consecutive items ends, none empty and the costliest as cheap as can be."""
    count, best = len(costs), {(0, 0): (0.0, 0)}
    for group in range(1, groups + 1):
        for end in range(group, count + 1):
            choices = [
                (max(best[group - 1, start][0], sum(costs[start:end])), start)
                for start in range(group - 1, end)
                if (group - 1, start) in best
            ]
            best[group, end] = min(choices)
    ends, end = [], count
    for group in range(groups, 0, -1):
        ends.append(end)
        end = best[group, end][1]
    return ends[::-1]


def _joined(pieces: Sequence[Piece]) -> Stage:
    """Single blocks of the same stack, one after the other, as one piece."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and piece.count and joined[-1].part == piece.part:
            joined[-1] = joined[-1]._replace(count=joined[-1].count + 1)
        else:
            joined.append(piece)
    return tuple(joined)


def costs_of(model: Layer, settings: Settings, inputs) -> list[float]:
    """What each of `items(model)` costs forward on one device: flops of products, and a few per number it makes.

    Args:
        settings: of one device that holds all.
        inputs: `jax.ShapeDtypeStruct` of the inputs of a batch.
    """
    params, extra = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    found, x = [], inputs
    for piece in items(model):

        def run(x, params, extra, stage=(piece,)):
            own = params_of(stage, params), extra_of(stage, extra)
            return apply(stage, *own, x, settings._replace(train=False))[0]

        traced, x = jax.make_jaxpr(run, return_shape=True)(x, params, extra)
        found.append(products.flops(traced.jaxpr) + 4.0 * sum(leaf.size for leaf in jax.tree.leaves(x)))
    return found


def apply(stage: Stage, params: Tree, extra: Tree, x, settings: Settings, firsts: Sequence | None = None):
    """Run a stage: `(y, new extra)`, with params and extra by the names of its parts.

    Args:
        firsts: the number in the model of the first block of each piece; by default `Piece.first`.
    """
    new = {}
    for number, piece in enumerate(stage):
        first = piece.first if firsts is None else firsts[number]
        name, layer, _ = piece.part
        here = settings._replace(first_layer=first)
        own = params[name] if piece.count else fetched(here, params[name])  # a stack fetches block by block
        x, new[name] = layer.apply(own, extra[name], x, context(here))
    return x, new


def params_of(stage: Stage, params: Tree, rows: Sequence | None = None) -> dict[str, Tree]:
    """What each part of a stage reads of a device's parameters, by the name of the part.

    Args:
        rows: own row of the first block of each piece; by default `Piece.row`.
    """
    return {
        piece.part.name: _rows(params[piece.part.reads], piece, row)
        for piece, row in zip(stage, _own(stage, rows), strict=True)
    }


def extra_of(stage: Stage, extra: Tree, rows: Sequence | None = None) -> dict[str, Tree]:
    """The same of its state without gradient; nothing for a part that reads what another holds."""
    return {
        piece.part.name: _rows(extra.get(piece.part.name, {}), piece, row)
        for piece, row in zip(stage, _own(stage, rows), strict=True)
    }


def add(stage: Stage, total: Tree, found: dict[str, Tree], rows: Sequence | None = None) -> Tree:
    """`total`, laid out as the device's parameters, with what was found for some parts of a stage added.

    Gradients of what several parts read are summed before ZeRO scatters them.
    """
    total, whole = dict(total), {}
    for piece, row in zip(stage, _own(stage, rows), strict=True):
        name, reads = piece.part.name, piece.part.reads
        if name in found and not piece.count:
            whole[reads] = jax.tree.map(jnp.add, whole[reads], found[name]) if reads in whole else found[name]
        elif name in found:

            def one(leaf, more, piece=piece, row=row):
                return leaf + more if _all(leaf, piece) else _added(leaf, more, row)

            total[reads] = jax.tree.map(one, total[reads], found[name])
    for reads, more in whole.items():
        total[reads] = jax.tree.map(jnp.add, total[reads], owned(total[reads], more))
    return total


def put(stage: Stage, extra: Tree, new: dict[str, Tree], rows: Sequence | None = None) -> Tree:
    """`extra`, laid out as on the device, with the new state of a stage's parts in its place."""
    extra = dict(extra)
    for piece, row in zip(stage, _own(stage, rows), strict=True):
        name = piece.part.name
        if name in extra and name in new:

            def one(leaf, now, piece=piece, row=row):
                if _all(leaf, piece):
                    return now
                return lax.dynamic_update_slice_in_dim(leaf, now, row, 0)

            extra[name] = jax.tree.map(one, extra[name], new[name])
    return extra


def _added(leaf, more, row):
    now = lax.dynamic_slice_in_dim(leaf, row, more.shape[0], 0)
    return lax.dynamic_update_slice_in_dim(leaf, now + more, row, 0)


def _own(stage: Stage, rows: Sequence | None) -> Sequence:
    return [piece.row for piece in stage] if rows is None else rows


def _all(leaf, piece: Piece) -> bool:
    return not piece.count or leaf.shape[0] == piece.count


def _rows(tree: Tree, piece: Piece, row) -> Tree:
    return jax.tree.map(
        lambda leaf: leaf if _all(leaf, piece) else lax.dynamic_slice_in_dim(leaf, row, piece.count, 0), tree
    )
