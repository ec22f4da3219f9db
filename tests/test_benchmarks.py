"""What is timed side by side is the same work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_equal

from benchmarks import step_time
from jaxpar.core.recipe import Model
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
