"""A pipeline changes no number: gradients of every schedule equal those of one device, whatever else the plan says."""

import functools
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from harness import SMALL, built, losses, placed, recipe_of, reference, run, variant
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_equal

from experiments import lm
from jaxpar.core import family
from jaxpar.core.plan import Plan
from jaxpar.core.refuse import Refused
from jaxpar.plan.wire import cost_of
from jaxpar.report import account, bill, compiled, flops
from jaxpar.step import executor, stages
from jaxpar.train.fit import fit
from jaxpar.train.progress import quiet

SCHEDULES = [name for name in family.names("schedules") if name != "from_table"]
CHUNKS = {"interleaved": 2, "zero_bubble_v": 2}
MESHES = ["pipe=2,data=2,tensor=one_d:2", "pipe=2,tensor=two_d:2x2", "pipe=2,tensor=three_d:1x2x2", "pipe=4,data=2"]
STORAGES = ["recompute", "residual"]
GPT = variant(SMALL["gpt"], layers=5, dropout=0.1, kv_heads=2)  # layers that divide by no number of stages


def plan_of(mesh, schedule, storage, microbatches=4):
    """A plan as a string."""
    return f"{mesh},schedule={schedule},chunks={CHUNKS.get(schedule, 1)},microbatches={microbatches},storage={storage}"


def check(model, plan, want=None):
    """Gradients, loss and state equal those of one device."""
    want, got = want or reference(model), run(recipe_of(model, plan))
    assert abs(got.loss - want.loss) <= 2e-6 * abs(want.loss)
    assert_equal(got.gradients, want.gradients, tolerance=5e-6)
    assert_equal(got.extra, want.extra, tolerance=5e-6)
    return got


def pairwise():
    """Each schedule with both storages, in turn tied, and untied with dropout, on meshes in turn."""
    for number, schedule in enumerate(SCHEDULES):
        for place, storage in enumerate(STORAGES):
            yield plan_of(MESHES[(number + 2 * place) % 4], schedule, storage), bool((number + place) % 2)


@pytest.mark.parametrize(("plan", "tied"), [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in pairwise()])
def test_gradients_are_those_of_one_device(plan, tied):
    if "chunks=2" in plan:
        plan = plan.replace("pipe=4", "pipe=2")
    two_stages = "pipe=2" in plan and "chunks=1" in plan
    dropout = 0.0 if tied else 0.1  # random bits are half of what is compiled; tied with dropout: the V below
    got = check(variant(GPT, layers=3 if two_stages else 5, tied=tied, dropout=dropout), plan)
    if re.search("=(one_f_one_b|zero_bubble_h1),", plan):  # both storages on all MESHES
        assert_bill_is_exact(got, plan)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mesh", MESHES)
def test_gradients_are_those_of_one_device_in_every_combination(mesh, schedule, storage, tied):
    got = check(variant(GPT, layers=8, tied=tied), plan_of(mesh, schedule, storage))
    assert_bill_is_exact(got, plan_of(mesh, schedule, storage))


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("gru", "pipe=2,microbatches=2,storage=residual,tensor=two_d:2x2"),
        ("mlp", "pipe=2,microbatches=4,tensor=one_d:2,schedule=gpipe"),
        ("gpt", "pipe=2,microbatches=2,tensor=fsdp:4,regather=false,storage=residual"),
        ("gpt", "microbatches=4,storage=residual"),
        ("gpt", "microbatches=2,schedule=zero_bubble_h1"),
    ],
)
def test_other_models_and_plans(name, plan):
    check(SMALL[name], plan)


@functools.cache
def in_microbatches(model, count):
    """On one device."""
    return run(recipe_of(model, f"microbatches={count}"))


@pytest.mark.parametrize(
    "plan",
    ["pipe=2,data=2,tensor=two_d:2x1", "pipe=4,data=2,storage=residual", "pipe=3,schedule=zero_bubble_h1"],
)
def test_unequal_parts_and_running_statistics(plan):
    """Two blocks on more stages than that are cut between parts of different shapes; batch norm sees microbatches."""
    plan = f"{plan},microbatches=4"
    check(SMALL["convnet"], plan, want=in_microbatches(SMALL["convnet"], 4))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("schedule", ["one_f_one_b", "zero_bubble_v"])
def test_collectives_of_a_tick(schedule, storage):
    """Two permutes in the body of the loop, four for the V; none over `pipe` or `data` in a branch."""
    plan = plan_of("pipe=4,data=2", schedule, storage, microbatches=8)
    if schedule == "zero_bubble_v":  # on two devices above
        got = check(variant(GPT, layers=8), plan)
    else:
        got = run(recipe_of(variant(GPT, layers=4, dropout=0.0), plan))
    assert len(re.findall(r" collective-permute(?:-start)?\(", got.text)) == (4 if schedule == "zero_bubble_v" else 2)
    branches = {
        name for found in re.findall(r"branch_computations=\{([^}]*)\}", got.text) for name in found.split(", ")
    }
    bodies = {part.split(" ", 1)[0]: part for part in got.text.split("\n\n")}
    assert branches <= bodies.keys() and len(branches) > 3
    for name in branches:
        assert not re.search(r" (all-|reduce-scatter|collective-)", bodies[name]), name


def instructions(plan, microbatches):
    """How many the compiled program of a small pipeline has."""
    model = variant(SMALL["mlp"], layers=4, width=8, hidden=8)
    _, made = built(recipe_of(model, f"{plan},microbatches={microbatches}", batch=64))
    text = made.gradients.lower(made.shapes, made.batch).compile().as_text()
    return len(re.findall(r"^ +(?:ROOT )?%\S+ = ", text, re.MULTILINE))


@pytest.mark.parametrize(
    "plan",
    [
        "pipe=4,schedule=one_f_one_b",
        "pipe=4,schedule=gpipe,storage=residual",
        "pipe=2,schedule=zero_bubble_h1",
        "storage=residual",
    ],
)
def test_the_program_is_as_long_for_any_number_of_microbatches(plan):
    assert instructions(plan, 4) == instructions(plan, 16) > 300


def test_a_program_that_is_unrolled_would_be_longer(monkeypatch):
    """What the test before this one would see."""

    def unrolled(tick, carry, rows):
        for row in rows:
            carry, _ = tick(carry, row)
        return carry, None

    monkeypatch.setattr(executor, "lax", SimpleNamespace(**vars(jax.lax) | {"scan": unrolled}))
    assert instructions("pipe=2", 4) > 1.3 * instructions("pipe=2", 2)


def test_a_gather_of_weights_that_xla_takes_out_of_the_loop_is_predicted_so():
    """Predicted bytes of pipelines are compared by `test_gradients_are_those_of_one_device`."""
    plan = "tensor=two_d:2x2,microbatches=4,storage=residual"
    assert_bill_is_exact(run(recipe_of(variant(GPT, layers=4, dropout=0.0), plan)), plan)


def assert_bill_is_exact(got, plan):
    """Bytes predicted and compiled are equal, by mesh axes and collective, and so are flops."""
    counted, predicted = bill.counted_in(got.parts, got.text), cost_of(account.gradient_lines(got.parts)).sent
    assert not counted.unknown and counted.sent.keys() == predicted.keys()
    assert any("pipe" in axes and kind == "permute" for axes, kind in predicted) == ("pipe" in plan)
    np.testing.assert_allclose([counted.sent[key] for key in predicted], list(predicted.values()), rtol=1e-9)
    *_, played = compiled.play(got.parts, got.text, None)
    assert played.flops == pytest.approx(flops.executed(got.parts), rel=1e-3)


def test_losses_are_those_of_one_device():
    model = variant(SMALL["mlp"], layers=4, dropout=0.1)
    want, got = (losses(recipe_of(model, plan), 20)[0] for plan in ("data=1", "pipe=4,microbatches=8"))
    assert want[-1] < 0.97 * want[0]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_evaluation_is_that_of_one_device():
    model, found = variant(GPT, layers=4), []
    for plan in ("data=1", "pipe=2,data=2,tensor=one_d:2,microbatches=4,schedule=interleaved,chunks=2"):
        recipe = recipe_of(model, plan)
        parts, made = built(recipe)
        state = placed(recipe, parts, made)
        batch = made.place(next(iter([(np.zeros((16, 8), np.int32), np.ones((16, 8), np.int32))])))
        found.append(jax.device_get(made.evaluate(state.params, state.extra, batch)))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 9))
def test_the_costliest_stage_is_as_cheap_as_can_be(costs, groups):
    groups = min(groups, len(costs))
    ends = stages.balanced(costs, groups)
    assert len(ends) == groups and ends[-1] == len(costs) and ends == sorted(set(ends))

    def best(start, left):  # by trying everything
        if left == 1:
            return sum(costs[start:])
        return min(max(sum(costs[start:end]), best(end, left - 1)) for end in range(start + 1, len(costs) - left + 2))

    assert max(sum(costs[a:b]) for a, b in zip([0, *ends], ends, strict=False)) == best(0, groups)


@pytest.mark.parametrize(
    ("name", "plan", "field"),
    [
        ("mlp", "pipe=8,microbatches=2", "plan.pipe"),
        ("gpt", "pipe=2,partition=auto", "plan.pipe"),
        ("gpt", "pipe=2,storage=none", "plan.storage"),
        ("gpt", "pipe=2,schedule=one_f_one_bee", "plan.schedule"),
        ("gpt", "pipe=2,chunks=2,microbatches=2", "plan.chunks"),
        ("gpt", "pipe=2,microbatches=3", "batch"),
    ],
)
def test_what_cannot_be_is_refused(name, plan, field):
    with pytest.raises(Refused) as refused:
        built(recipe_of(SMALL[name], plan))
    assert field in [problem.field for problem in refused.value.problems]
    assert Plan.parse(plan) == Plan.parse(str(Plan.parse(plan)))


def test_state_goes_through_microbatches_in_order(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("F1,F0,,,B1,B0\n,F1,F0,B1,B0,\n", encoding="utf-8")
    plan = f"pipe=2,microbatches=2,schedule=from_table:{table}"
    with pytest.raises(Refused, match=r"plan.schedule = .*out of order, and the model convnet has state"):
        built(recipe_of(SMALL["convnet"], plan))
    check(SMALL["mlp"], plan)


@pytest.mark.slow
def test_the_curve_of_real_text_is_that_of_one_device():
    """The first 50 of the 600 steps of `experiments.lm`: all in its warm-up, a tenth of them."""
    rate = lm.BASE.learning_rate * 50 / (lm.BASE.steps // 10)
    recipe = replace(lm.BASE, steps=50, warmup=50, learning_rate=rate, evaluate_batches=1)
    plans = Plan(), Plan.parse("pipe=4,schedule=one_f_one_b,microbatches=16")
    want, got = (fit(replace(recipe, plan=plan), report=quiet()).losses for plan in plans)
    assert len(want) == 50 and want[-1] < 0.6 * want[0]
    np.testing.assert_allclose(got, want, rtol=1e-5)
