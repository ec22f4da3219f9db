"""Loss scales: torch's trajectories, the same gradients under any plan, and what a step that is no number leaves alone."""

import functools
import json
from dataclasses import replace

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import SMALL, batch_of, built, recipe_of, run
from parity import assert_equal
from tiny import TINY

from jaxpar.core import family, scaling
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Refused
from jaxpar.core.types import State
from jaxpar.loss_scales.dynamic import dynamic
from jaxpar.loss_scales.enhanced import enhanced
from jaxpar.step.scaling import unscaling
from jaxpar.step.update import updated

TORCH = golden.load("grad_scaler")
CONFIGS = {
    "gi4": dynamic(65536.0, interval=4),
    "gi2_f3": dynamic(1000.0, interval=2, growth=3.0, backoff=0.25),
}
TEXTS = {"none": "none", "static": "static:1024", "dynamic": "dynamic", "enhanced": "enhanced"}


def second_half(loss_scale, inner, params):
    """`step(state, loss, gradients) -> (state, metrics)` and the first state: `updated`, compiled."""
    optimizer = optax.chain(unscaling(loss_scale), inner)
    state = State(jnp.int32(0), params, {}, optimizer.init(params), {})
    step = jax.jit(lambda state, loss, found: updated(optimizer, (loss, found, {}, {}), state, loss_scale))
    return step, state


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("pattern", ["mixed", "allok", "allinf"])
def test_a_dynamic_scale_is_torchs_step_for_step(pattern, config):
    want = {key.rpartition("/")[2]: TORCH[key] for key in TORCH if key.startswith(f"{pattern}/{config}/")}
    loss_scale = CONFIGS[config]
    step, state = second_half(loss_scale, optax.sgd(0.1, momentum=0.9), jnp.array([1.0, -2.0, 3.0]))

    def loss(w, i):
        return (w * jnp.array([0.3, -0.1, 0.2]) * (1 + 0.1 * i)).sum() + 0.05 * (w**2).sum()

    total = 0
    for i, kind in enumerate(want["pattern"]):
        scale = loss_scale.scale(state.opt[0].scale)
        assert scale == want["scale_used"][i]
        value, pull = jax.vjp(lambda w, i=i: loss(w, i), state.params)
        bad = ~np.isfinite(want["grad_unscaled"][i])
        assert bad.any() == (kind != "ok")
        found = jnp.where(bad, want["grad_unscaled"][i], pull(scale)[0])
        unscaled, _ = unscaling(loss_scale).update(found, state.opt[0])
        np.testing.assert_allclose(unscaled, want["grad_unscaled"][i], rtol=3e-7)
        state, metrics = step(state, value, found)
        total += kind != "ok"
        assert metrics["skipped"] == (kind != "ok") == ~want["stepped"][i] and metrics["loss_scale"] == scale
        assert state.opt[0].scale.finite == want["growth_tracker_after"][i] and state.opt[0].total == total
        np.testing.assert_allclose(state.params, want["w"][i + 1], atol=1e-6, rtol=3e-6)  # one passes by zero
    assert loss_scale.scale(state.opt[0].scale) == want["final_scale"]


def walked(loss_scale, fine):
    """The scale of each step, and after the last."""
    state, scales = loss_scale.init(), []
    for one in fine:
        scales.append(float(loss_scale.scale(state)))
        state = loss_scale.update(state, jnp.bool_(one))
    return [*scales, float(loss_scale.scale(state))]


def test_a_floor_holds_at_once_and_stops_the_fall():
    floored = enhanced(floors=((6, 32.0), (3, 8.0)), start=16.0, interval=2)
    assert walked(floored, [0, 0, 0, 0, 0, 0, 0, 1, 1, 0]) == [16, 8, 4, 8, 8, 8, 32, 32, 32, 64, 32]
    assert walked(dynamic(16.0, interval=2), [0, 0, 0, 0, 1, 1]) == [16, 8, 4, 2, 1, 1, 2]
    assert walked(enhanced(), [1])[:1] == [65536]
    assert scaling.loss_scale_of("enhanced").update(enhanced().init()._replace(steps=149_999, scale=1.0), False)[0] == 32768


def test_a_scale_stays_a_number():
    most, least = dynamic(2.0**125, interval=1), dynamic(2.0**-125)
    assert walked(most, [1, 1, 1]) == [2.0**125, 2.0**126, 2.0**126, 2.0**126]
    assert walked(least, [0, 0, 0]) == [2.0**-125, 2.0**-126, 2.0**-126, 2.0**-126]
    for scale in (2.0**126, 2.0**-126):
        found, _ = unscaling(dynamic(scale)).update(jnp.float32(scale), unscaling(dynamic(scale)).init(None))
        assert found == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dynamc", "did you mean `dynamic`"),
        ("", "no such file in loss_scales"),
        ("static", r"static needs its scale. Legal: static:1024"),
        ("static:0", "`0` must be a finite number above 0"),
        ("static:inf", "`inf` must be a finite number"),
        ("static:1e39", "`1e39` must be a finite number"),
        ("static:", "`` must be a finite number"),
        ("none:3", "none takes no numbers"),
        ("dynamic:interval=2.5", "`2.5` must be a whole number"),
        ("dynamic:interval=0", "`0` must be a whole number"),
        ("dynamic:8+start=9", "says `start` twice"),
        ("dynamic:every=2", "dynamic has no `every`"),
        ("dynamic:growth=0.5", "growth=0.5: must be at least 1"),
        ("dynamic:backoff=1", "backoff=1.0: must lie between 0 and 1"),
        ("dynamic:40=8", "dynamic has no `40`"),
        ("enhanced:8", "a bare number means nothing here.*enhanced:40000=8192"),
        ("enhanced:floors=8", "enhanced has no `floors`"),
        ("enhanced:40=8+40=9", "says `40` twice"),
    ],
)
def test_a_text_that_names_no_loss_scale_is_one_problem(text, says):
    with pytest.raises(Refused, match=f"(?s)loss_scale = .*{says}") as refused:
        built(replace(recipe_of(SMALL["mlp"], "data=1"), loss_scale=text))
    assert [problem.field for problem in refused.value.problems] == ["loss_scale"]


def test_a_text_says_every_number():
    found = scaling.loss_scale_of("enhanced:start=4+interval=1+growth=4+backoff=0.25+3=2+1=8").init()
    assert found == (4, 0, 0)
    assert walked(scaling.loss_scale_of("enhanced:start=4+interval=1+growth=4+backoff=0.25+3=2+1=8"), [0, 1]) == [4, 8, 32]
    assert walked(scaling.loss_scale_of("dynamic:8+interval=1"), [1]) == [8, 16]
    assert walked(scaling.loss_scale_of("static:1000"), [1, 0]) == [1000, 1000, 1000]
    assert Recipe.from_json(Recipe(loss_scale="static:8").to_json()).loss_scale == "static:8"
