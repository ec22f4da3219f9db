"""Plays any timetable: one program for all devices of the axis `pipe`, inside the one `jax.shard_map`.

Each tick a device does the F, B and W that its row of the timetable says, on what lies in its pools; then every device
sends, whether it has something to send or not, so that no collective over `pipe` ever stands in a branch. Parameters
vary over `pipe` and the data axes from the start: no gradient is summed in a branch either.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.core import compat
from jaxpar.core.cells import KINDS
from jaxpar.core.timetable import Timetable
from jaxpar.core.types import Tree
from jaxpar.plan.layout import PIPE
from jaxpar.step import stages
from jaxpar.step.messages import Boundary
from jaxpar.step.pieces import Given, Role, Work, halves, merged
from jaxpar.step.pools import KEEPS, Shelves, empty, shelved, taken, written


class Score(NamedTuple):
    """A timetable and what there is to play.

    Attributes:
        table: the timetable.
        stages: what each stage runs.
        roles: what differs between stages; those that run the same code share one.
        role_of: the role of each stage.
        works: of each role, its work by kind; a kind without work takes its tick and does nothing.
        boundary: what travels; None if there is one stage.
        loss: shape, dtype and axes of the device's part of the loss.
        scale: its gradient, with which the backward pass begins.
    """

    table: Timetable
    stages: tuple[stages.Stage, ...]
    roles: tuple[Role, ...]
    role_of: tuple[int, ...]
    works: tuple[dict[str, Work], ...]
    boundary: Boundary | None
    loss: Any
    scale: Any = 1.0


class Carry(NamedTuple):
    """What goes from tick to tick.

    Attributes:
        pools: arrays with a leading dim of slots: `x` and `seed`, one per array of a message; `kept` and `between`,
            one per shelf.
        total: gradients so far, laid out as the parameters; None where nothing is learned.
        extra: state without gradient.
        loss: the device's part so far.
    """

    pools: dict[str, list]
    total: Tree
    extra: Tree
    loss: Any


SCOPE = "timetable_"  # what the switch over a kind of work is called in a program, before the kind


def play(score: Score, params: Tree, extra: Tree, batch: tuple, total: Tree) -> Carry:
    """Loss, gradients and new state, each as this device found it.

    Args:
        score: what to play.
        params, extra: local parts, varying over `pipe`.
        batch: local (inputs, labels), each `[microbatches, examples, ...]`, varying over `pipe`.
        total: gradients before there is any; None where nothing is learned.
    """
    shelves = {kind: shelved(score.works, kind) for kind in KEEPS}
    columns, rows = columns_of(score.table, score.role_of, [set(work) for work in score.works])
    loss = compat.vary(jnp.zeros(score.loss.shape, score.loss.dtype), compat.varying_axes(score.loss))
    carry = Carry(empty(score.boundary, shelves, _slots(columns, rows)), total, extra, loss)
    active = {kind: np.unique(rows[..., columns[kind, "role"]]).tolist() for kind in score.table.kinds}

    def tick(carry, row):
        here = row[lax.axis_index(PIPE)] if score.table.devices > 1 else row[0]
        sent = {}
        for kind in score.table.kinds:
            if active[kind] != [0]:
                at = {name: here[column] for (of, name), column in columns.items() if of == kind}
                came = {name: tuple(taken(carry.pools[name], at[name])) for name in came_of(score, kind)}
                branches = [_branch(score, kind, role - 1, shelves, params, batch) for role in active[kind]]
                with jax.named_scope(SCOPE + kind):
                    done = _chosen(active[kind], branches, at, came, carry)
                carry, sent[kind] = _noted(carry, kind, done, at)
        for (kind, shift), pairs in _channels(score.table).items():
            message = [lax.ppermute(one, PIPE, pairs) if shift else one for one in sent[kind]]
            pool, slot = "x" if kind == "F" else "seed", here[columns[kind, f"receive {shift}"]]
            carry = carry._replace(pools=carry.pools | {pool: written(carry.pools[pool], message, slot)})
        return carry, None

    return tick(carry, rows[0])[0] if len(rows) == 1 else lax.scan(tick, carry, jnp.asarray(rows))[0]


def columns_of(table: Timetable, role_of, has) -> tuple[dict[tuple[str, str], int], np.ndarray]:
    """The timetable as numbers, `rows[tick, device, column]`, and the column of each (kind, name).

    `role` is 0 where there is nothing to do, else one more than the role; slots of what is not there are the dummy one.

    Args:
        table: the timetable.
        role_of: the role of each stage.
        has: the kinds of work that each role has.
    """
    names = [(kind, name) for kind in table.kinds for name in ("role", "microbatch", "stage", *SLOTS)]
    names += [(kind, f"receive {shift}") for kind, shift in table.channels]
    columns = {name: number for number, name in enumerate(names)}
    rows = np.zeros((table.ticks, table.devices, len(names)), np.int32)
    pools = {name: getattr(table, pool) for name, pool in SLOTS.items()}
    for kind, name in names:
        pool = pools.get(name) or (pools["x" if kind == "F" else "seed"] if name.startswith("receive") else None)
        rows[..., columns[kind, name]] = pool.count if pool else 0
    for cell, tick in table.at.items():
        kind, stage, microbatch = cell
        device, role = table.order.place[stage], role_of[stage]
        found = {"role": role + 1 if kind in has[role] else 0, "microbatch": microbatch, "stage": stage}
        found |= {name: pool.of[stage, microbatch] for name, pool in pools.items() if (stage, microbatch) in pool.of}
        for name, value in found.items():
            rows[tick, device, columns[kind, name]] = value
        following = stage + {"F": 1, "B": -1, "W": table.stages}[kind]
        if 0 <= following < table.stages:
            to = table.order.place[following]
            pool = pools["x" if kind == "F" else "seed"]
            rows[tick, to, columns[kind, f"receive {(to - device) % table.devices}"]] = pool.of[following, microbatch]
    return columns, rows


SLOTS = {"x": "activations", "seed": "cotangents", "kept": "kept", "between": "between"}


def _channels(table: Timetable) -> dict[tuple[str, int], list[tuple[int, int]]]:
    """The pairs of devices between which each channel carries something."""
    found = {channel: set() for channel in table.channels}
    for stage, device in enumerate(table.order.place[:-1]):
        after = table.order.place[stage + 1]
        for kind, start, end in (("F", device, after), ("B", after, device)):
            if kind in table.kinds:
                found[kind, (end - start) % table.devices].add((start, end))
    return {channel: sorted(pairs) for channel, pairs in found.items()}


def _slots(columns, rows) -> dict[str, int]:
    """How many slots of each pool the timetable names, the dummy ones included."""
    return {name: 1 + max(int(rows[..., at].max()) for (_, of), at in columns.items() if of == name) for name in SLOTS}


def _chosen(active: list[int], branches: list[Callable], at: dict, came: dict, carry: Carry) -> dict:
    """What the branch of this device's role does."""
    if len(branches) == 1:
        return branches[0](carry, at, came)
    index = jnp.asarray(np.searchsorted(active, np.arange(active[-1] + 1)))[at["role"]]
    return lax.switch(index, branches, carry, at, came)


def _noted(carry: Carry, kind: str, done: dict, at: dict) -> tuple[Carry, Any]:
    """The carry with what was done in a tick, and the message to send; pools change outside of branches, in place."""
    done = dict(done)
    keeps, message = done.pop("keeps"), done.pop("message", None)
    if keeps:
        pool = KEEPS[kind]
        carry = carry._replace(pools=carry.pools | {pool: written(carry.pools[pool], keeps, at[pool])})
    return carry._replace(**done), message


def _branch(score: Score, kind: str, role: int, shelves: dict[str, Shelves], params: Tree, batch: tuple) -> Callable:
    """What a device of one role, or of none (-1), does in a tick: `branch(carry, at, came) -> changes`."""
    makes = frozenset().union(*(works[kind].makes for works in score.works if kind in works))
    own_shelves = shelves.get(kind, Shelves([], []))

    def idle(carry: Carry) -> dict:
        done = {"keeps": [compat.vary(jnp.zeros(shape, dtype), axes) for shape, dtype, axes in own_shelves.arrays]}
        done |= {"message": score.boundary.nothing()} if score.boundary and makes & {"y", "x"} else {}
        done |= {"total": carry.total} if "own" in makes else {}
        done |= {"loss": carry.loss} if "loss" in makes else {}
        return done | ({"extra": carry.extra} if makes & {"forward", "backward"} else {})

    def act(carry: Carry, at: dict, came: dict) -> dict:
        done, stage, work = idle(carry), score.roles[role].stage, score.works[role][kind]
        rows, firsts = (_of_stage(score, role, at["stage"], field) for field in ("row", "first"))
        given = given_of(score, role, (params, carry.extra, batch), came, (at, rows, firsts))
        held = [
            taken([carry.pools[pool][shelf] for shelf in shelves[before].of[role]], at[pool])
            if KINDS.index(kind) > KINDS.index(before)
            else []
            for before, pool in KEEPS.items()
        ]
        made, keeps = work.run(given, *held)
        for shelf, one in zip(own_shelves.of[role] if keeps else [], keeps, strict=True):
            done["keeps"][shelf] = one
        if "message" in done and (made.y is not None or jax.tree.leaves(made.x)):
            done["message"] = made.x if made.y is None else made.y
        if made.own is not None:
            done["total"] = stages.add(stage, done["total"], made.own, rows)
        if made.loss is not None:
            done["loss"] = done["loss"] + made.loss
        new = [
            old if now is None else now for now, old in ((made.forward, given.forward), (made.backward, given.backward))
        ]
        return done | ({"extra": stages.put(stage, carry.extra, merged(*new), rows)} if "extra" in done else {})

    return (lambda carry, at, came: idle(carry)) if role < 0 else act


def came_of(score: Score, kind: str) -> list[str]:
    """The pools of messages that a kind of work reads.

    They are read before the branch is taken: XLA copies a pool that a branch reads and the tick changes afterwards.
    """
    return [] if score.boundary is None else ["x"] if kind == "F" else ["x", "seed"]


def given_of(score: Score, role: int, arrays: tuple, came: dict, where: tuple) -> Given:
    """What a piece of work reads: parameters, state and batch, and the messages that `came` from other stages."""
    (params, extra, batch), (at, rows, firsts) = arrays, where
    takes, last, stage = score.roles[role].takes, score.roles[role].last, score.roles[role].stage
    forward, backward = halves(stages.extra_of(stage, extra, rows))
    one = jnp.full(score.loss.shape, score.scale, score.loss.dtype)
    seed = compat.vary(one, compat.varying_axes(score.loss)) if last else came.get("seed", score.boundary.nothing())
    return Given(
        own=stages.params_of(stage, params, rows),
        forward=forward,
        backward=backward,
        x=() if takes is None else came["x"],
        data=tuple(taken(batch, at["microbatch"])),
        place=(jnp.int32(at["microbatch"]), tuple(firsts)),
        seed=seed,
    )


def _of_stage(score: Score, role: int, stage, field: str) -> list:
    """`Piece.row` or `Piece.first` of each piece of the stage that a device works for, of those of one role."""
    found = []
    for number in range(len(score.roles[role].stage)):
        values = [getattr(one[number], field) if score.role_of[n] == role else 0 for n, one in enumerate(score.stages)]
        own = {value for n, value in enumerate(values) if score.role_of[n] == role}
        found.append(jnp.int32(own.pop()) if len(own) == 1 else jnp.asarray(values, jnp.int32)[stage])
    over = (PIPE,) if score.table.devices > 1 else ()
    return [compat.vary(value, over) for value in found]
