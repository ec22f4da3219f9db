"""`partition=auto`: XLA decides the collectives of the same model, and the numbers are those of one device.

Both ways to the same function check each other: a wrong rule here, or a wrong product there, shows as a difference.
"""

import itertools
import json
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
from harness import MESHES, SMALL, batch_of, built, losses, recipe_of, reference, reference_losses, run, variant
from parity import assert_equal
from tiny import TINY

from jaxpar.core import family
from jaxpar.core.plan import Plan
from jaxpar.core.refuse import Refused
from jaxpar.report import bill, hlo
from jaxpar.step.parts import prepare
from jaxpar.train.fit import fit
from jaxpar.train.progress import quiet
from jaxpar.train.stop import Interrupted

LISTED = (*MESHES, "data=8", "data=2,tensor=fsdp:4", "data=2,tensor=three_d:1x2x2")
SCHEMES = {name: [mesh for mesh in LISTED if f"tensor={name}" in mesh] for name in family.names("schemes")}
SCHEMES["single"] = ["data=8"]
NEW = {name: family.parameters(family.pick("schemes", name)) for name, meshes in SCHEMES.items() if not meshes}
ALL = (*LISTED, *(":".join([f"tensor={name}", "x".join(["2"] * len(sizes))]) for name, sizes in NEW.items()))
# As in tests/test_parity.py: rows n and 7 - n are each other's opposites, so that a pair covers every level.
CHOICES = [
    {"bias": bool(a), "tied": bool(b), "kv_heads": 8 if c else 2, "dropout": 0.0 if a ^ b ^ c else 0.1}
    for a, b, c in itertools.product((0, 1), repeat=3)
]
QUICK = (3, 4)
STEPS = ("", "microbatches=2", "unroll=true", "microbatches=2,unroll=false")
OTHERS = ("convnet", "gru", "mlp")


def model_of(name, row):
    if name == "gpt":
        return variant(SMALL["gpt"], **CHOICES[row])
    return variant(SMALL["mlp"], dropout=0.1, activation="gelu_tanh") if name == "mlp" else SMALL[name]


def check(model, plan):
    """Loss, gradients and extra equal one device; what devices say to each other was found and counted."""
    want, got = reference(model), run(recipe_of(model, f"{plan},partition=auto"))
    assert abs(got.loss - want.loss) <= 2e-6 * abs(want.loss)
    assert_equal(got.gradients, want.gradients, tolerance=2e-6)
    if "microbatches" not in plan:  # batch norm sees a microbatch at a time: another function, not another layout
        assert_equal(got.extra, want.extra, tolerance=2e-6)
    counted = hlo.count(got.text, dict(got.program.mesh.shape))
    assert sum(counted.sent.values()) > 0
    assert not [doubt for doubt in counted.unknown if "lie along no axes" not in doubt]
    assert "xla.sdy.manual" not in got.text and "SPMDFullToShardShape" not in got.text


@pytest.mark.parametrize(("mesh", "n"), [(mesh, n) for n, mesh in enumerate(ALL)])
def test_gpt_is_that_of_one_device(mesh, n):
    row, how = QUICK[n % 2], STEPS[n // 2 % len(STEPS)]
    check(model_of("gpt", row), ",".join(filter(None, [mesh, how])))


@pytest.mark.parametrize(("name", "mesh"), [(OTHERS[n % 3], mesh) for n, mesh in enumerate(ALL)])
def test_other_models_are_those_of_one_device(name, mesh):
    check(model_of(name, 0), mesh)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "n"), [(mesh, n) for n, mesh in enumerate(ALL)])
@pytest.mark.parametrize("row", range(8))
def test_gpt_is_that_of_one_device_under_every_choice(mesh, n, row):
    check(model_of("gpt", row), ",".join(filter(None, [mesh, STEPS[(n + row) % len(STEPS)]])))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ALL)
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_those_of_one_device_on_every_mesh(name, mesh):
    check(model_of(name, 0), mesh)


def test_ten_steps_give_the_same_losses():
    model, plan = variant(SMALL["gpt"], dropout=0.1, kv_heads=2), "data=2,tensor=two_d:2x2,microbatches=2"
    (want, _), (got, _) = reference_losses(model, 10), losses(recipe_of(model, f"{plan},partition=auto"), 10)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_bf16_is_rounded_where_manual_rounds_it():
    model, plan = SMALL["gpt"], "data=2,tensor=two_d:2x2,precision=bf16"
    want, got = (run(recipe_of(model, f"{plan},partition={how}")) for how in ("manual", "auto"))
    single = reference(model)
    assert_equal(got.gradients, want.gradients, tolerance=0.05)
    assert abs(got.loss - want.loss) < 1e-3 and got.loss != single.loss  # it did round


def test_state_and_batch_lie_as_under_manual():
    model, plan = variant(SMALL["gpt"], kv_heads=2), "data=2,tensor=three_d:1x2x2"
    manual, auto = (built(recipe_of(model, f"{plan},partition={how}"))[1] for how in ("manual", "auto"))
    assert (auto.shapes, auto.unpadded, auto.batch) == (manual.shapes, manual.unpadded, manual.batch)
    state, _ = auto.step(auto.init(), auto.place(batch_of(recipe_of(model, plan))))
    for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(manual.shapes), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
        assert leaf.addressable_shards[0].data.shape == want.sharding.shard_shape(want.shape)


def test_a_run_goes_on_under_the_other_partition(tmp_path):
    """Stopped and saved under auto, restored under manual: as one run under manual."""
    spread = replace(TINY, plan=Plan.parse("tensor=two_half_d:2x2x2"))
    auto = replace(spread, plan=replace(spread.plan, partition="auto"))
    whole = fit(spread, report=quiet())

    def line(values):
        if values["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        fit(auto, name="run", runs_dir=str(tmp_path), report=quiet()._replace(line=line))
    resumed = fit(spread, name="run", runs_dir=str(tmp_path), report=quiet())
    np.testing.assert_allclose(resumed.losses, whole.losses, rtol=1e-5)
    np.testing.assert_allclose(resumed.held_out, whole.held_out, rtol=1e-5)
    assert_equal(resumed.state.params, whole.state.params, tolerance=1e-4)


def test_the_bill_predicts_nothing():
    got = run(recipe_of(SMALL["mlp"], "tensor=one_d:8,partition=auto"))
    found = bill.bill(got.parts, got.text)
    assert found.predicted is None and found.compiled.total_sent > 0
    *body, total = bill.table(found).splitlines()[1:]
    assert total.split()[:2] == ["all", "n/a"] and all("n/a" in line for line in body)
    assert bill.differences(found) == []
    said = json.loads(json.dumps(bill.as_json(found)))
    assert said["predicted"] is None and said["compiled"]["tensor"]["all_reduce"] > 0


def test_what_only_jaxpar_decides_is_refused():
    with pytest.raises(Refused) as refused:
        prepare(replace(TINY, plan=Plan(partition="auto", regather=False, reducer="men")))
    problems = {problem.field: problem for problem in refused.value.problems}
    assert {"plan.regather", "plan.reducer"} <= set(problems)
    assert "XLA decides" in problems["plan.regather"].rule and "partition=manual" in problems["plan.regather"].legal
    with pytest.raises(Refused, match="did you mean `auto`"):
        prepare(replace(TINY, plan=Plan(partition="atuo")))
