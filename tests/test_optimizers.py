"""Optimizers by their formulas, the schedules of the rate, and both through JSON and a resumed run."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY

from jaxpar.core import spec
from jaxpar.core.recipe import Data, Model, Recipe
from jaxpar.core.refuse import Refused
from jaxpar.step.parts import prepare
from jaxpar.step.rates import learning_rate
from jaxpar.train.fit import fit
from jaxpar.train.progress import quiet
from jaxpar.train.stop import Interrupted

RATE = [0.5, 0.25, 0.125, 0.5]
GRADIENTS = np.random.default_rng(0).normal(size=(4, 3))


def moved(text, decay=0.1):
    """A decayed and an undecayed weight after each of four updates."""
    rate = lambda count: jnp.asarray(RATE)[count]  # noqa: E731
    optimizer = spec.member("optimizers", text, "optimizer")(rate, decay, {"w": True, "b": False})
    params = {"w": jnp.ones(3), "b": jnp.ones(3)}
    state, found = optimizer.init(params), []
    for gradient in GRADIENTS:
        updates, state = optimizer.update({"w": jnp.asarray(gradient), "b": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found


@pytest.mark.parametrize("momentum", [0.9, 0.5, 0.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_that_of_torch(momentum, nesterov):
    """The update as torch.optim.SGD documents it: decay goes through the momentum, the rate stands outside."""
    if nesterov and not momentum:
        return
    found = moved(f"sgd:momentum={momentum}+nesterov={str(nesterov).lower()}")
    for name, decay in (("w", 0.1), ("b", 0.0)):
        weight, v = np.ones(3), np.zeros(3)
        for rate, gradient, got in zip(RATE, GRADIENTS, found, strict=True):
            g = gradient + decay * weight
            v = momentum * v + g
            weight = weight - rate * (g + momentum * v if nesterov else v)
            np.testing.assert_allclose(got[name], weight, rtol=1e-5)


def test_the_defaults_are_those_of_before():
    for name, text in (("sgd", "sgd:momentum=0.9"), ("adamw", "adamw:b1=0.9+b2=0.95+eps=1e-8")):
        for one, other in zip(moved(name), moved(text), strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    "text, told",
    [
        ("sgd:momentum=1", r"must lie in \[0, 1\)"),
        ("sgd:momentum=-0.1", r"must lie in \[0, 1\)"),
        ("sgd:momentum=nan", r"must lie in \[0, 1\)"),
        ("sgd:momentum=0+nesterov=true", "needs a momentum above 0"),
        ("sgd:momentun=0.9", "did you mean `momentum`"),
        ("adamw:b2=1", r"b2=1.0: must lie in \[0, 1\)"),
        ("adamw:eps=0", r"must lie in \(0, 1\)"),
        ("sgdm", "did you mean `sgd`"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused_before_anything_is_compiled(text, told):
    with pytest.raises(Refused, match=told) as refused:
        prepare(replace(TINY, optimizer=text))
    assert [problem.field for problem in refused.value.problems] == ["optimizer"]


# Schedules

PLAIN = Recipe(steps=100, learning_rate=0.5, warmup=10)


def rates(schedule, recipe=PLAIN):
    return np.asarray(jax.jit(learning_rate(replace(recipe, schedule=schedule)))(np.arange(recipe.steps + 1)))


def test_each_schedule_warms_up_and_then_follows_its_formula():
    t = np.arange(101)
    after = (t - 10) / 90
    want = {
        "cosine": 0.5 * (0.1 + 0.9 * (1 + np.cos(np.pi * after)) / 2),
        "cosine:0": 0.5 * (1 + np.cos(np.pi * after)) / 2,
        "linear": 0.5 * (1 - 0.9 * after),
        "linear:0": 0.5 * (1 - after),
        "constant": np.full(101, 0.5),
        "steps:0.4=0.1+0.6=0.01": 0.5 * np.where(t < 40, 1, np.where(t < 60, 0.1, 0.01)),
    }
    for schedule, values in want.items():
        np.testing.assert_allclose(rates(schedule), np.where(t < 10, 0.5 * t / 10, values), rtol=1e-5, atol=1e-7)


def test_steps_fall_where_torch_has_its_milestones():
    """MultiStepLR of the published CIFAR recipe: epochs 100, 150 and 200 of 250, a tenth each."""
    found = rates("steps:0.4=0.1+0.6=0.01+0.8=0.001", replace(PLAIN, steps=250, warmup=0, learning_rate=0.1))
    assert [int(at) + 1 for at in np.flatnonzero(np.diff(found))] == [100, 150, 200]
    np.testing.assert_allclose(found[[0, 100, 150, 200]], [0.1, 0.01, 0.001, 0.0001], rtol=1e-6)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(["cosine", "cosine:0", "linear:0.5", "constant", "steps:0.1=0.5+0.9=0"]),
    st.integers(1, 300),
    st.integers(0, 300),
)
def test_a_rate_lies_between_nothing_and_the_largest(schedule, steps, warmup):
    recipe = replace(PLAIN, steps=steps, warmup=min(warmup, steps), schedule=schedule)
    found = np.asarray(learning_rate(recipe)(np.arange(steps)))
    assert found.shape == (steps,) and (found >= 0).all() and (found <= 0.5 * (1 + 1e-6)).all()
    assert warmup == 0 or found[0] == 0


@pytest.mark.parametrize(
    "schedule, told",
    [
        ("cosin", "did you mean `cosine`"),
        ("", "there is no such shape"),
        ("cosine:", "is no number"),
        ("cosine:2", "must lie in 0 to 1"),
        ("linear:nan", "must lie in 0 to 1"),
        ("constant:1", "constant takes nothing"),
        ("steps", "is no number"),
        ("steps:0.5", "is no number"),
        ("steps:0.5=0.1+0.4=0.01", "rising order"),
        ("steps:0.5=0.1+0.5=0.01", "rising order"),
        ("steps:1=0.1", "below 1"),
        ("steps:0.5=10", "must lie in 0 to 1"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(schedule, told):
    with pytest.raises(Refused, match=told) as refused:
        prepare(replace(TINY, schedule=schedule))
    assert [problem.field for problem in refused.value.problems] == ["schedule"]


def test_a_published_recipe_goes_through_json_and_a_resumed_run(tmp_path):
    recipe = replace(
        TINY,
        model=Model("mlp", layers=1, width=8),
        data=Data("digits"),
        optimizer="sgd:momentum=0.8+nesterov=true",
        schedule="steps:0.4=0.1+0.8=0.01",
        learning_rate=0.1,
        checkpoint_every=3,
    )
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_json("{}").schedule == "cosine", "an older recipe has none"
    whole = fit(recipe, report=quiet())
    seen = []

    def stop(line):
        if "loss" in line and line["step"] == 7:
            seen.append(line["step"])
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        fit(recipe, name="cut", runs_dir=str(tmp_path), report=quiet()._replace(line=stop))
    resumed = fit(recipe, name="cut", runs_dir=str(tmp_path), report=quiet())
    assert seen == [7] and resumed.losses == whole.losses
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
