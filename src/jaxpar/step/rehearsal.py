"""What a timetable needs to be played: who runs which code, what travels, what is kept; found from shapes alone."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.core import compat
from jaxpar.core.timetable import Timetable
from jaxpar.plan import revolve
from jaxpar.plan.context import Settings, context
from jaxpar.plan.layout import PIPE
from jaxpar.step import executor, pieces, stages
from jaxpar.step.executor import Score
from jaxpar.step.messages import Boundary, boundary
from jaxpar.step.pieces import Given, Role
from jaxpar.step.stages import Stage


class Manner(NamedTuple):
    """How a timetable is played.

    Attributes:
        learn: whether to find gradients.
        storage: what F keeps for B: `recompute` or `residual`.
        examples: of one microbatch, over all devices.
        loss: `loss(ctx, logits, labels)`: the device's part of the mean loss.
        scale: what the backward pass begins with.
    """

    learn: bool
    storage: str
    examples: int
    loss: Callable
    scale: Any = 1.0


def score(table: Timetable, cut: Sequence[Stage], settings: Settings, manner: Manner, local: tuple) -> Score:
    """Everything that `executor.play` needs; the arrays are those that it will be given.

    Args:
        table: the timetable.
        cut: what each stage runs.
        settings: with the key of the step.
        manner: how to play.
        local: (params, extra, batch), as for `executor.play`.
    """
    split = manner.learn and "W" in table.kinds
    settings = settings._replace(unroll=True) if split else settings  # a scan finds both gradients at once
    between, takes, loss = _walk(cut, settings, manner, local)
    roles, role_of = _roles(cut, takes)
    empty = Score(table, tuple(cut), roles, role_of, ({},) * len(roles), between, loss, manner.scale)
    works = []
    for number, role in enumerate(roles):
        forward = pieces.forward_of(role, settings, between, manner.examples, manner.loss)
        if not manner.learn:
            works.append(pieces.forward_work(role, forward))
            continue
        like, both = _like(empty, number, local), pieces.back_and_forth(settings, forward)
        if manner.storage == "recompute" and not split:
            works.append(pieces.recomputing(role, forward, both, like))
        else:
            works.append(
                pieces.cutting(
                    role,
                    both,
                    like,
                    residual=manner.storage == "residual",
                    split=split,
                    regather=settings.regather,
                )
            )
    return empty._replace(works=tuple(works))


def shares(table: Timetable, cut: Sequence[Stage], storage: str, device: int) -> Callable[[str, int], list | None]:
    """How often one device of `pipe` takes each branch of the switches that play a timetable, as a share of its ticks.

    Args:
        table, cut, storage: as of `score` and `Manner`.
        device: its place on `pipe`.

    Returns:
        `shares(scope, branches)`: None for a switch that is none of the timetable's; `scope` is where it stands.
    """
    together = branches(table, cut, storage)

    def of(scope: str, count: int) -> list | None:
        taken = together(scope, count)
        return None if taken is None else [float((taken[:, device] == branch).mean()) for branch in range(count)]

    return of


def branches(table: Timetable, cut: Sequence[Stage], storage: str) -> Callable[[str, int], np.ndarray | None]:
    """Which branch of the switches that play a timetable each device of `pipe` takes, `[ticks, devices]`.

    Args:
        table, cut, storage: as of `score` and `Manner`.

    Returns:
        `branches(scope, count)`: None for a switch that is none of the timetable's and reverses no chain by a table
        (`plan.revolve`); `scope` is where it stands.
    """
    roles, role_of = _roles(cut, [None] * len(cut))
    first = [{"F"} if storage == "residual" or not role.last else set() for role in roles]
    columns, rows = executor.columns_of(table, role_of, [one | set(table.kinds[1:]) for one in first])
    found = {}
    for kind in table.kinds:
        taken = rows[..., columns[kind, "role"]]
        known, place = np.unique(taken, return_inverse=True)
        found[kind] = len(known), place.reshape(taken.shape)

    def of(scope: str, count: int) -> np.ndarray | None:
        reversing = revolve.branches(scope, count)
        if reversing is not None:
            return np.repeat(reversing[:, None], table.devices, axis=1)
        kind = re.search(rf"{executor.SCOPE}([FBW])(/cond)?$", scope)
        return found[kind[1]][1] if kind and found[kind[1]][0] == count else None

    return of


def _roles(cut: Sequence[Stage], takes: Sequence) -> tuple[tuple[Role, ...], tuple[int, ...]]:
    """Stages with the same parts and numbers of blocks share a role, but for the first and the last."""
    found: dict[tuple, int] = {}
    roles, role_of = [], []
    for number, stage in enumerate(cut):
        last = number == len(cut) - 1
        key = number == 0, last, tuple((piece.part.name, piece.count) for piece in stage)
        if key not in found:
            found[key] = len(roles)
            roles.append(Role(stage, takes[number], last))
        role_of.append(found[key])
    return tuple(roles), tuple(role_of)


def _like(score: Score, role: int, local: tuple) -> Given:
    """Arrays like those that the work of a role is given."""
    slots = dict.fromkeys(executor.SLOTS, 0) | {"microbatch": jnp.int32(0), "stage": 0}
    stage = score.roles[role].stage
    came = dict.fromkeys(executor.came_of(score, "B"), score.boundary and score.boundary.nothing())
    number = compat.vary(jnp.int32(0), (PIPE,) if score.table.devices > 1 else ())
    firsts = [number for _ in stage]
    given = executor.given_of(score, role, local, came, (slots, [0 for _ in stage], firsts))
    return given._replace(place=(number, tuple(firsts)))


def _walk(cut: Sequence[Stage], settings: Settings, manner: Manner, local: tuple) -> tuple[Boundary | None, list, Any]:
    """The boundary, what each stage takes (None for the first), and what is known of the loss.

    What a stage gives may vary over more axes than what it took, so it is walked through until nothing changes.
    """
    axes: tuple[str, ...] = ()
    while True:
        takes, loss = _shapes(cut, settings, manner, local, axes)
        if len(cut) == 1:
            return None, takes, loss
        found = tuple(sorted({*axes, *(axis for leaf in jax.tree.leaves(takes[1:]) for axis in _axes(leaf))}))
        if found == axes:
            return boundary(takes[1:], axes), takes, loss
        axes = found


def _shapes(cut: Sequence[Stage], settings: Settings, manner: Manner, local: tuple, axes: tuple[str, ...]):
    """What each stage takes, if what it is sent varies over `axes`, and what is known of the loss."""
    params, extra, batch = local
    known: dict = {}
    takes, taken = [None], None

    def zeros(like):
        return compat.vary(jnp.zeros(like.shape, like.dtype), (*axes, *_axes(like)))

    def run(stage, like, number, last):
        x = jax.tree.map(zeros, like) if number else batch[0][0]
        own = stages.params_of(stage, params), stages.extra_of(stage, extra)
        y, _ = stages.apply(stage, *own, x, settings)
        return manner.loss(context(settings), y, batch[1][0]) if last else y

    for number, stage in enumerate(cut):
        last = number == len(cut) - 1
        names = tuple((piece.part.name, piece.count) for piece in stage)
        leaves, structure = jax.tree.flatten(taken)
        key = names, number == 0, last, structure, tuple((leaf.shape, leaf.dtype, _axes(leaf)) for leaf in leaves)
        if key not in known:
            known[key] = jax.eval_shape(partial(run, stage, taken, number, last))
        taken = known[key]
        takes.append(taken)
    return takes[:-1], takes[-1]


def _axes(like) -> tuple[str, ...]:
    return compat.varying_axes(like)
