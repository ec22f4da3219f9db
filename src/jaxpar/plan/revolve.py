"""Reversing a chain of equal steps with few snapshots: Revolve, as a table that one scan plays.

Source: Griewank and Walther 2000, Algorithm 799: revolve, ACM TOMS 26(1), section 2; optimality: its proposition 1.
"""

import functools
import re
from collections.abc import Callable
from math import comb
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.core import compat

SCOPE = "binomial_"  # what the switch between advancing and reversing is called in a program, before its counts
ADVANCE, REVERSE = 0, 1


class Action(NamedTuple):
    """One thing to do.

    Attributes:
        kind: `advance` (one step), `snapshot` (store the state at hand), `restore` (take it from there again), or
            `reverse` (the gradient of one step, whose input is the state at hand).
        place: the step, or the slot of a snapshot.
    """

    kind: str
    place: int


class Table(NamedTuple):
    """Actions as numbers.

    Attributes:
        forward: the slot in which the forward pass stores the state before each step, `[steps]`.
        rows: what the backward pass does, `[rows, 4]`: ADVANCE or REVERSE, the step, the slot that it reads and the one
            that it writes to.
        slots: how many there are: the snapshots, and one for the state at hand if that is none of them.
    """

    forward: np.ndarray
    rows: np.ndarray
    slots: int


def sweeps(steps: int, snapshots: int) -> int:
    """The least r with C(snapshots + r, snapshots) >= steps: how often a step is run forward, reversing it aside."""
    found = 0
    while comb(snapshots + found, snapshots) < steps:
        found += 1
    return found


def advances(steps: int, snapshots: int) -> int:
    """The least number of steps forward with which `steps` can be reversed, r steps - C(snapshots + r, snapshots + 1).

    The first sweep counts, what a reversal itself runs forward does not; the state before the first step is one of the
    snapshots.
    """
    r = sweeps(steps, snapshots)
    return r * steps - comb(snapshots + r, snapshots + 1)


def actions(steps: int, snapshots: int) -> list[Action]:
    """An optimal schedule: `advances(steps, snapshots)` steps forward, never more than `snapshots` states stored."""
    found, chains, here = [Action("snapshot", 0)], [(0, steps)], 0  # chains to reverse: (first step, steps), by slot
    while chains:
        slot = len(chains) - 1
        first, count = chains[-1]
        if here != first:
            found.append(Action("restore", slot))
        ahead = count - 1 if slot == snapshots - 1 else _split(count, snapshots - slot)
        found += [Action("advance", first + n) for n in range(ahead)]
        here = first + ahead
        chains[-1] = first, ahead
        if count - ahead == 1:
            found.append(Action("reverse", here))
            here = -1
        else:
            found.append(Action("snapshot", slot + 1))
            chains.append((here, count - ahead))
        if not chains[-1][1]:
            chains.pop()
    return found


def _split(count: int, snapshots: int) -> int:
    """How many steps to go before the next snapshot."""
    if count == 1:
        return 0
    r = sweeps(count, snapshots)
    return max(1, comb(snapshots + r - 2, snapshots), count - comb(snapshots + r - 1, snapshots - 1))


def table(steps: int, snapshots: int) -> Table:
    """`actions` as numbers: an advance reads where the state at hand lies, and writes to where its result is stored."""
    todo = actions(steps, snapshots)
    hand = 1 + max(action.place for action in todo if action.kind == "snapshot")
    forward, rows, at = np.full(steps, hand, np.int32), [], hand
    for number, (kind, place) in enumerate(todo):
        if kind in ("snapshot", "restore"):
            at = place
            if kind == "snapshot" and len(rows) < steps:  # still in the first sweep: one row for each step before
                forward[len(rows)] = place
        elif kind == "reverse":
            rows.append((REVERSE, place, at, at))  # what it read is written back: nothing changes
        else:
            after = todo[number + 1]
            rows.append((ADVANCE, place, at, after.place if after.kind == "snapshot" else hand))
            at = hand
    backward = np.asarray(rows[steps - 1 :], np.int32)  # the first sweep is the forward pass
    return Table(forward, backward, 1 + int(max(forward.max(), backward[:, 2:].max())))


def branches(scope: str, count: int) -> np.ndarray | None:
    """Which branch the backward pass of a chain takes, `[rows]`: ADVANCE or REVERSE.

    Args:
        scope: where a switch stands in a program.
        count: of its branches.

    Returns:
        None for a switch that is none of a `chain`.
    """
    found = re.search(rf"{SCOPE}(\d+)_of_(\d+)(/cond)?$", scope)
    return _table(int(found[2]), int(found[1])).rows[:, 0] if found and count == 2 else None


_table = functools.cache(table)


class Chain(NamedTuple):
    """A chain of steps with all that they read made explicit, as flat lists; `f` is what has a gradient, `i` is not.

    Attributes:
        step: `step(consts_f, consts_i, state_f, state_i, xs_f, xs_i) -> (state_f, state_i, ys_f, ys_i)`.
        steps: how many.
        snapshots: states that may be stored.
    """

    step: Callable
    steps: int
    snapshots: int


def chain(body: Callable, carry, xs, snapshots: int):
    """As `jax.lax.scan(body, carry, xs)`, of whose states only `snapshots` are kept for the backward pass.

    Its backward pass is one scan over a table, so that compiling takes as long for many steps as for few.
    """
    steps = jax.tree.leaves(xs)[0].shape[0]
    closed, shapes = jax.make_jaxpr(body, return_shape=True)(carry, jax.tree.map(lambda leaf: leaf[0], xs))
    count = len(jax.tree.leaves(carry))
    consts_f, consts_i, consts_of = _parted(closed.consts)
    state_f, state_i, state_of = _parted(jax.tree.leaves(carry))
    xs_f, xs_i, xs_of = _parted(jax.tree.leaves(xs))

    def step(consts_f, consts_i, state_f, state_i, xs_f, xs_i):
        given = [*state_of(state_f, state_i), *xs_of(xs_f, xs_i)]
        made = jax.core.eval_jaxpr(closed.jaxpr, consts_of(consts_f, consts_i), *given)
        return *_parted(made[:count])[:2], *_parted(made[count:])[:2]

    found = _played(Chain(step, steps, min(snapshots, steps)), consts_f, consts_i, state_f, state_i, xs_f, xs_i)
    _, _, ys_of = _parted(closed.out_avals[count:])
    flat = [*state_of(*found[:2]), *ys_of(*found[2:])]
    return jax.tree.unflatten(jax.tree.structure(shapes), flat)


def _parted(leaves) -> tuple[list, list, Callable]:
    """Those with a gradient, the others, and how to put both together again."""
    real = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def whole(floats, others):
        floats, others = iter(floats), iter(others)
        return [next(floats if one else others) for one in real]

    one = [leaf for leaf, is_real in zip(leaves, real, strict=True) if is_real]
    return one, [leaf for leaf, is_real in zip(leaves, real, strict=True) if not is_real], whole


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _played(how: Chain, consts_f, consts_i, state_f, state_i, xs_f, xs_i):
    """(state_f, state_i, ys_f, ys_i) after all steps."""

    def one(state, xs):
        found = how.step(consts_f, consts_i, *state, *xs)
        return found[:2], found[2:]

    state, ys = lax.scan(one, (state_f, state_i), (xs_f, xs_i))
    return *state, *ys


def _forth(how: Chain, consts_f, consts_i, state_f, state_i, xs_f, xs_i):
    """The same, with the pool of snapshots as the first sweep leaves it."""
    plan = _table(how.steps, how.snapshots)

    def one(carry, given):
        (pool, state), (slot, xs) = carry, given
        pool = _set(pool, state, slot)
        found = how.step(consts_f, consts_i, *state, *xs)
        return (pool, found[:2]), found[2:]

    pool = jax.tree.map(lambda leaf: _zeros(leaf, plan.slots), (state_f, state_i))
    given = jnp.asarray(plan.forward), (xs_f, xs_i)
    (pool, state), ys = lax.scan(one, (pool, (state_f, state_i)), given)
    return (*state, *ys), (pool, consts_f, consts_i, xs_f, xs_i)


def _back(how: Chain, kept, found):
    """Cotangents of what has a gradient, by playing the table."""
    pool, consts_f, consts_i, xs_f, xs_i = kept
    d_state, _, d_ys, _ = found
    scope = f"{SCOPE}{how.snapshots}_of_{how.steps}"

    def one(carry, row):
        pool, d_consts, d_state, d_xs = carry
        _, step, at, to = row
        state, (x_f, x_i), d_y = _get(pool, at), _get((xs_f, xs_i), step), _get(d_ys, step)

        def advance(pool_state, d_consts, d_state):
            state = how.step(consts_f, consts_i, *pool_state, x_f, x_i)[:2]
            return state, d_consts, d_state, jax.tree.map(_zeros, x_f)

        def reverse(pool_state, d_consts, d_state):
            def run(consts_f, state_f, x_f):
                found = how.step(consts_f, consts_i, state_f, pool_state[1], x_f, x_i)
                return found[0], found[2]

            _, pull = jax.vjp(run, consts_f, pool_state[0], x_f)
            more, d_state, d_x = pull((d_state, d_y))
            return pool_state, jax.tree.map(jnp.add, d_consts, more), d_state, d_x

        with jax.named_scope(scope):
            state, d_consts, d_state, d_x = lax.cond(row[0] == REVERSE, reverse, advance, state, d_consts, d_state)
        # an advance writes zeros for a step that is reversed later
        return (_set(pool, state, to), d_consts, d_state, _set(d_xs, d_x, step)), None

    start = pool, jax.tree.map(_zeros, consts_f), d_state, jax.tree.map(_zeros, xs_f)
    (_, d_consts, d_state, d_xs), _ = lax.scan(one, start, jnp.asarray(_table(how.steps, how.snapshots).rows))
    return d_consts, None, d_state, None, d_xs, None


_played.defvjp(_forth, _back)


def _zeros(leaf, *count: int):
    """Zeros as `leaf`, or as many of it."""
    return compat.vary(jnp.zeros((*count, *leaf.shape), leaf.dtype), compat.varying_axes(leaf))


def _get(tree, number):
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, number, 0, keepdims=False), tree)


def _set(tree, values, number):
    return jax.tree.map(lambda leaf, one: lax.dynamic_update_index_in_dim(leaf, one, number, 0), tree, values)
