"""Norms in a whole step: pipelines, remat, accumulation and layouts have what a plain loop has, and a right bill."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import batch_of, built, laid, recipe_of, start, unpadded
from parity import assert_equal

from jaxpar.core import family
from jaxpar.core.recipe import Model
from jaxpar.core.refuse import Refused
from jaxpar.plan.wire import cost_of
from jaxpar.report import hlo
from jaxpar.report.account import gradient_lines
from jaxpar.step.objective import nats
from jaxpar.step.pieces import halves, merged

OWN = f"{Path(__file__).with_name('normed.py')}:normed"
MICROBATCHES, STEPS = 4, 2
NORMS = [*family.names("norms"), "batch:replicas=2", "batch_renorm:begin=0", "weight:mean_only=true"]


def model_of(norm):
    return Model(OWN, layers=2, width=8, norm=norm)


@functools.cache
def first(norm):
    """Parameters that are noise, and the state before any step."""
    parts, _ = built(recipe_of(model_of(norm), "data=1"))
    return start(model_of(norm))[0], jax.tree.map(np.asarray, parts.model.init(jax.random.key(0))[1])


@functools.cache
def in_a_loop(norm):
    """Loss, gradients and state of steps whose microbatches are taken one after the other; parameters stay."""
    recipe = recipe_of(model_of(norm), "data=1")
    parts, _ = built(recipe)
    params, extra = first(norm)

    @jax.jit
    def one(params, extra, batch, example):
        forward, backward = halves(extra)
        settings = parts.settings._replace(first_example=example)

        def loss(params, backward):
            total, new = nats(parts.model, settings, params, merged(forward, backward), batch)
            return total / recipe.batch, halves(new)[0]

        (found, forward), (own, backward) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, backward)
        return (found, own), merged(forward, backward)

    found, size = [], recipe.batch // MICROBATCHES
    for step in range(STEPS):
        each = []
        for n, batch in enumerate(zip(*(jnp.split(a, MICROBATCHES) for a in batch_of(recipe, step)), strict=True)):
            one_found, extra = one(params, extra, batch, n * size)
            each.append(one_found)
        found.append((jax.tree.map(lambda *leaves: sum(leaves), *each), extra))
    return found


def check(norm, plan):
    """The same steps by a plan."""
    recipe = recipe_of(model_of(norm), f"microbatches={MICROBATCHES},{plan}")
    parts, made = built(recipe)
    params, extra = first(norm)
    state, compiled = laid(made, parts, params, extra), None
    for step, (want, after) in enumerate(in_a_loop(norm)):
        batch = made.place(batch_of(recipe, step))
        compiled = compiled or made.gradients.lower(state, batch).compile()
        loss, gradients, extra, _ = compiled(state, batch)
        state = state._replace(extra=extra)
        gradients, extra = unpadded(made, gradients, extra)
        assert_equal(loss, want[0], tolerance=2e-6)
        assert_equal(gradients, want[1], tolerance=5e-6)
        for mine, other in zip(halves(extra), halves(after), strict=True):
            assert_equal(mine, other, tolerance=5e-6)


PLANS = [
    "remat=block",
    "data=2,remat=dots",
    "data=2,tensor=one_d:2,remat=sqrt",
    "tensor=two_d:2x2",
    "tensor=three_d:2x2x2",
    "tensor=fsdp:4",
    "data=4,zero=3",
    "pipe=2,data=2,schedule=one_f_one_b",
    "pipe=2,tensor=one_d:2,schedule=gpipe,storage=residual",
    "pipe=2,schedule=zero_bubble_h1",
    "pipe=2,data=2,schedule=one_f_one_b,remat=block",
]
QUICK = [("streaming", PLANS[7])]


@pytest.mark.parametrize(("norm", "plan"), QUICK)
def test_a_step_is_that_of_a_plain_loop(norm, plan):
    check(norm, plan)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_of_any_norm_is_that_of_a_plain_loop(norm, plan):
    if (norm, plan) in QUICK:
        pytest.skip("is among the quick ones")
    check(norm, plan)


def sent(norm, plan):
    """Bytes of one device by axes and kind, as compiled and as predicted; those of means, forward and back."""
    parts, made = built(recipe_of(model_of(norm), plan))
    state = laid(made, parts, *first(norm))
    text = made.gradients.lower(state, made.place(batch_of(recipe_of(model_of(norm), plan)))).compile().as_text()
    lines = gradient_lines(parts)
    means = [[line.bytes for line in lines if "mean" in line.site and line.phase == way] for way in WAYS]
    return hlo.count(text, dict(made.mesh.shape)).sent, cost_of(lines).sent, [sum(one) for one in means]


WAYS = ("forward", "backward")
BILLS = [
    *NORMS,
    "batch:replicas=4",
    "online:replicas=4",
    "instance:running=true",
    "batch:cumulative=true",
    "layer:over=example",
]


def assert_the_bill_is_right(norm, plan):
    compiled, predicted, _ = sent(norm, plan)
    assert compiled.keys() == predicted.keys()
    np.testing.assert_allclose([compiled[key] for key in predicted], list(predicted.values()), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["data=4", "tensor=one_d:4", "data=2,tensor=two_d:2x2", "tensor=three_d:2x2x2"])
@pytest.mark.parametrize("norm", BILLS)
def test_compiled_bytes_are_those_predicted(norm, plan):
    assert_the_bill_is_right(norm, plan)


def test_replicas_send_nothing_but_their_running_statistics():
    """Those are a mean and a variance of each feature, forward; what y and gradients need stays where it is."""
    features = 8 + 2 * (8 + 16)  # stem and two blocks
    ring = 2 * 3 / 4 * 4  # bytes of an all-reduce of one float32 over 4 devices
    *_, together = sent("batch", "data=4")
    compiled, predicted, apart = sent("batch:replicas=4", "data=4")
    assert together == [2 * features * ring, 2 * features * ring]
    assert apart == [2 * features * ring, 0]
    assert compiled == pytest.approx(predicted)


def test_streams_of_their_own_send_nothing_but_their_states():
    """No device goes on with what another began, so nothing is gathered."""

    def kinds(norm):
        lines = gradient_lines(built(recipe_of(model_of(norm), "data=4"))[0])
        return {line.kind for line in lines if line.bytes}

    assert kinds("online:replicas=2") == {"all_gather", "all_reduce"}
    assert kinds("online:replicas=4") == {"all_reduce"}


def test_a_norm_that_no_model_can_have_is_refused():
    for model, norm, said in [("gpt", "weight", "acts on"), ("gpt", "instance", "see"), ("convnet", "grop", "group")]:
        with pytest.raises(Refused, match=rf"model\.norm.*{said}"):
            built(recipe_of(replace(Model(model, layers=1), norm=norm), "data=1"))
