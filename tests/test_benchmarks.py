"""What is timed side by side is the same work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_equal

from benchmarks import aot, step_time
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Model, Recipe
from jaxpar.step.parts import assemble
from jaxpar.step.program import program

TINY = step_time.Options(Model("gpt", layers=2, width=16, heads=2, hidden=32, context=8), batch=4, rounds=2, steps=1)


@pytest.mark.parametrize("unroll", [True, False])
def test_the_steps_agree_in_loss_and_gradients(unroll):
    recipe = step_time.recipe_of(TINY, unroll)
    shape = jax.ShapeDtypeStruct((TINY.batch, TINY.model.context), jnp.int32)
    made, ids = program(assemble(recipe, shape, shape, step_time.VOCAB)), step_time.batch_of(TINY, 0)
    state = made.init()
    got = made.gradients(state, made.place((ids[:, :-1], ids[:, 1:])))
    loss = jax.jit(jax.value_and_grad(step_time.plain_loss), static_argnums=(2, 3))
    value, want = loss(jax.device_get(state.params), ids, TINY.model.heads, unroll)
    assert float(got.loss) == pytest.approx(float(value), rel=2e-6)
    assert_equal(got.gradients, want, tolerance=2e-6)


def test_rounds_are_timed_one_by_one():
    found, off = step_time.agree(step_time.contenders(TINY, False)[:2], TINY)
    seconds = step_time.times(found, TINY)
    line, ratio = step_time.row("plain JAX", seconds[1], seconds[0], 32)
    assert off < 1e-5 and f"{ratio:.3f}" in line
    assert [len(rounds) for rounds in seconds] == [2, 2] and min(map(min, seconds[0] + seconds[1])) > 0


def test_different_work_is_not_timed():
    recipe = step_time.recipe_of(TINY, False)
    first = step_time.jaxpar_step(recipe)
    params = jax.tree.map(lambda leaf: leaf * np.float32(1.1), jax.device_get(first.state.params))
    with pytest.raises(SystemExit, match="different work"):
        step_time.agree([first, step_time.plain_step(recipe, params)], TINY)


@pytest.mark.parametrize(
    "plan",
    ["tensor=fsdp:4", *(pytest.param(plan, marks=pytest.mark.slow) for plan in ("data=2", "data=2,tensor=one_d:2"))],
)
def test_the_twin_that_is_compiled_ahead_of_time_does_the_same(plan):
    model = Model("gpt", layers=2, width=16, heads=4, hidden=32, context=8, vocab=64)
    recipe = Recipe(model=model, plan=Plan.parse(plan), batch=8)
    shape = jax.ShapeDtypeStruct((8, 8), jnp.int32)
    parts = assemble(recipe, shape, shape, 64)
    made = program(parts)
    step, state, batch = aot.twin(recipe, made, parts.optimizer)
    ids = np.random.default_rng(0).integers(0, 64, (8, 9)).astype(np.int32)
    given, own = (ids[:, :-1], ids[:, 1:]), made.init()
    params = jax.device_get(own.params)
    placed = jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), params, state[0])
    opt = jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), parts.optimizer.init(params), state[1])
    (after, _), loss = step((placed, opt), tuple(map(jax.device_put, given, [one.sharding for one in batch])))
    new, metrics = made.step(own, made.place(given))
    assert float(loss) == pytest.approx(float(metrics["loss"]), rel=2e-6)
    moved = [jax.tree.map(lambda a, b: np.asarray(a) - b, tree, params) for tree in (new.params, after)]
    assert_equal(
        *moved, tolerance=2e-3
    )  # the first update of Adam is a sign: rounding shows where a gradient is near 0
