"""State of the backward pass goes through all microbatches in order, once each, whatever else a pipeline does."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from harness import batch_of, built, recipe_of, run, start
from parity import assert_equal
from test_pipeline import CHUNKS, SCHEDULES, STORAGES, plan_of

from jaxpar.core.recipe import Model
from jaxpar.step.objective import nats
from jaxpar.step.pieces import halves, merged

OWN = f"{Path(__file__).with_name('controlled.py')}:controlled"
MICROBATCHES = 4


def model_of(layers):
    return Model(OWN, layers=layers, width=16)


@functools.cache
def in_a_loop(layers):
    """Loss, gradients and state by a loop over microbatches that is as plain as can be."""
    recipe = recipe_of(model_of(layers), "data=1")
    parts, _ = built(recipe)
    inputs, labels = (jnp.split(a, MICROBATCHES) for a in batch_of(recipe))
    params, extra = start(recipe.model)

    @jax.jit
    def one(params, extra, batch):
        forward, backward = halves(extra)

        def loss(params, backward):
            total, new = nats(parts.model, parts.settings, params, merged(forward, backward), batch)
            return total / recipe.batch, halves(new)[0]

        (found, forward), (own, backward) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, backward)
        return found, own, merged(forward, backward)

    total = None
    for batch in zip(inputs, labels, strict=True):
        found, own, extra = one(params, extra, batch)
        total = (found, own) if total is None else jax.tree.map(jnp.add, total, (found, own))
    return *total, extra


def check(plan, layers=4):
    """Gradients, loss and both halves of the state equal those of the loop; all went back once per microbatch."""
    loss, gradients, extra = in_a_loop(layers)
    got = run(recipe_of(model_of(layers), plan))
    assert_equal(got.loss, loss, tolerance=2e-6)
    assert_equal(got.gradients, gradients, tolerance=5e-6)
    for mine, other in zip(halves(got.extra), halves(extra), strict=True):
        assert_equal(mine, other, tolerance=5e-6)
    before, after = (jax.tree_util.tree_leaves_with_path(tree) for tree in (start(model_of(layers))[1], got.extra))
    counts = [new - old for (path, old), (_, new) in zip(before, after, strict=True) if path[-1].key == "count"]
    assert len(counts) == 3
    for count in counts:
        assert_equal(count, jnp.full(count.shape, MICROBATCHES), tolerance=1e-6)


CASES = [
    ("microbatches=4,schedule=gpipe,storage=residual", 4),  # all F before the first B
    ("microbatches=4,data=2,schedule=zero_bubble_h1", 4),
    ("pipe=4,data=2,schedule=one_f_one_b,microbatches=4,storage=residual", 2),  # cut between parts
    ("pipe=2,data=2,schedule=interleaved,chunks=2,microbatches=4", 5),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("microbatches=4", 4),
            ("pipe=2,data=2,schedule=gpipe,microbatches=4,storage=residual", 4),
            ("pipe=4,schedule=gpipe,microbatches=4", 4),
            ("pipe=2,data=2,schedule=one_f_one_b,microbatches=4", 4),
            ("pipe=2,tensor=one_d:2,schedule=interleaved,chunks=2,microbatches=4,storage=residual", 4),
            ("pipe=2,data=2,schedule=zero_bubble_h1,microbatches=4,storage=residual", 5),
            ("pipe=4,schedule=zero_bubble_h1,microbatches=4", 4),
        )
    ),
]


@pytest.mark.parametrize(("plan", "layers"), CASES)
def test_state_of_the_backward_pass(plan, layers):
    check(plan, layers)


MESHES = ["pipe=2,data=2,tensor=one_d:2", "pipe=4,data=2", "data=2"]
PRODUCT = [
    (mesh, schedule, storage)
    for mesh, schedule, storage in itertools.product(MESHES, SCHEDULES, STORAGES)
    if "pipe" in mesh or schedule not in CHUNKS
]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "schedule", "storage"), PRODUCT)
def test_state_of_the_backward_pass_in_every_combination(mesh, schedule, storage):
    check(plan_of(mesh, schedule, storage), layers=8 if schedule in CHUNKS else 5)
