"""Reversing a chain with few snapshots: the schedule against an independent optimum, and played."""

import functools
from math import comb

import jax
import jax.numpy as jnp
import pytest
from parity import assert_equal

from jaxpar.core import products
from jaxpar.plan import revolve

STEPS, SNAPSHOTS = range(1, 61), range(1, 9)


@functools.cache
def fewest(steps, snapshots):
    """The fewest steps forward, by trying every place for the next snapshot."""
    if steps == 1:
        return 0
    if snapshots == 1:
        return steps * (steps - 1) // 2
    return min(first + fewest(steps - first, snapshots - 1) + fewest(first, snapshots) for first in range(1, steps))


def played(steps, snapshots):
    """How often each step is advanced, once it is checked that all are reversed, last first, from what is stored."""
    slots, here, left, runs = {}, 0, steps, [0] * steps
    for kind, place in revolve.actions(steps, snapshots):
        if kind == "snapshot":
            slots[place] = here
            assert len(slots) <= snapshots
        elif kind == "restore":
            here = slots[place]
        else:
            assert place == here
            if kind == "advance":
                runs[place] += 1
                here += 1
            else:
                left -= 1
                assert place == left
    assert left == 0
    return runs


@pytest.mark.parametrize("snapshots", SNAPSHOTS)
def test_a_schedule_is_optimal(snapshots):
    for steps in STEPS:
        runs = played(steps, snapshots)
        assert sum(runs) == fewest(steps, snapshots) == revolve.advances(steps, snapshots)


@pytest.mark.parametrize("snapshots", [1, 2, 3, 5])
def test_c_snapshots_and_r_sweeps_reverse_binomially_many_steps(snapshots):
    for sweeps in range(1, 6):
        most = comb(snapshots + sweeps, snapshots)
        assert max(played(most, snapshots)) == revolve.sweeps(most, snapshots) == sweeps
        assert max(played(most + 1, snapshots)) == sweeps + 1
        assert revolve.advances(most, snapshots) == sweeps * most - comb(snapshots + sweeps, snapshots + 1)


@pytest.mark.parametrize("snapshots", SNAPSHOTS)
def test_a_table_says_what_its_schedule_says(snapshots):
    for steps in STEPS:
        plan = revolve.table(steps, snapshots)
        assert plan.slots <= min(snapshots, steps) + 1
        pool, left = {}, steps
        for state, slot in enumerate(plan.forward):
            pool[int(slot)] = state
        for kind, step, at, to in plan.rows.tolist():
            assert pool[at] == step
            if kind == revolve.REVERSE:
                left -= 1
                assert (step, to) == (left, at)
            else:
                pool[to] = step + 1
        assert left == 0
        assert sum(plan.rows[:, 0] == revolve.ADVANCE) + steps - 1 == revolve.advances(steps, snapshots)


W = jax.random.normal(jax.random.key(0), (7, 4, 4))


def looped(chain, w, b, x):
    """A loop with an argument of whole numbers, a closed-over one, and a result for each step."""
    offset = jnp.arange(4)

    def body(carry, xs):
        x, count = carry
        number, w = xs
        x = jnp.tanh(x @ w + b + (number + offset + count) / 20)
        return (x, count + 1), (x.sum(), number)

    (x, count), (sums, numbers) = chain(body, (x, jnp.int32(0)), (jnp.arange(7), w))
    return (x * offset).sum() + (sums**2).sum(), (count, numbers)


@pytest.mark.parametrize("snapshots", [1, 2, 3, 7, 20])
def test_gradients_through_a_chain(snapshots):
    given = W / 2, jnp.zeros(4), jnp.ones((3, 4))
    chain = functools.partial(revolve.chain, snapshots=snapshots)
    want, got = (
        jax.jit(jax.value_and_grad(functools.partial(looped, one), (0, 1, 2), has_aux=True))(*given)
        for one in (jax.lax.scan, chain)
    )
    assert_equal(got, want, tolerance=1e-6)


def test_a_program_is_as_long_for_many_steps_as_for_few():
    def of(steps):
        def chain(x, w):
            return revolve.chain(lambda x, w: (jnp.tanh(x @ w), None), x, w, 3)[0].sum()

        return jax.make_jaxpr(jax.grad(chain, argnums=1))(jnp.ones((2, 4)), jnp.ones((steps, 4, 4)))

    lengths = [len(str(of(steps)).splitlines()) for steps in (20, 2000)]
    assert lengths[0] == lengths[1]

    for steps in (20, 2000):
        work = products.flops(of(steps).jaxpr, lambda scope, count: shares(scope, count))
        again = revolve.advances(steps, 3) - (steps - 1)
        assert work == pytest.approx((4 * steps + again) * 2 * 2 * 4 * 4)  # forward, again, and two back


def shares(scope, count):
    """How often each branch is taken, as a share of all."""
    taken = revolve.branches(scope, count)
    return None if taken is None else [float((taken == branch).mean()) for branch in range(count)]
