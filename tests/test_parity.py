"""One model, any layout, the same numbers; and the bytes that the bill predicts.

Every case compiles loss and gradients once, compares all gradients with one device, and counts the bytes in the
compiled program.
"""

import functools
import itertools

import numpy as np
import pytest
from harness import BATCH, MESHES, SMALL, losses, recipe_of, reference, reference_losses, run, variant
from parity import assert_equal

from jaxpar.plan.wire import cost_of
from jaxpar.report import account, hlo

# Two levels of four choices in eight rows, such that any three choices meet in every combination (an orthogonal array
# of strength 3); row n and row 7 - n are each other's opposites, so a pair of rows covers both levels of each choice.
CHOICES = [
    {
        "bias": bool(a),
        "tied": bool(b),
        "kv_heads": 8 if c else 2,  # 2 heads on up to 8 shards: copies
        "dropout": 0.0 if a ^ b ^ c else 0.1,
    }
    for a, b, c in itertools.product((0, 1), repeat=3)
]
STEPS = ("", "regather=false", "microbatches=2", "unroll=true")


def check(model, plan):
    """Gradients and extra equal one device; compiled bytes equal predicted bytes, exactly."""
    want, got = reference(model), run(recipe_of(model, plan))
    assert abs(got.loss - want.loss) <= 2e-6 * abs(want.loss)
    assert_equal(got.gradients, want.gradients, tolerance=2e-6)
    if "microbatches" not in plan:  # batch norm sees a microbatch at a time: another function, not another layout
        assert_equal(got.extra, want.extra, tolerance=2e-6)
    compare_bytes(got)


def compare_bytes(got):
    """Every collective, by mesh axis and kind, to the byte."""
    counted = hlo.count(got.text, dict(got.program.mesh.shape))
    predicted = cost_of(account.gradient_lines(got.parts)).sent
    assert not counted.unknown
    assert set(counted.sent) == set(predicted)
    np.testing.assert_allclose([counted.sent[key] for key in predicted], list(predicted.values()), rtol=1e-12)


def pairwise():
    """Each mesh with two opposite rows of `CHOICES` and two ways to run the step."""
    for number, mesh in enumerate(MESHES):
        for row, how in ((number % 4, number), (7 - number % 4, number + 2)):
            yield ",".join(filter(None, [mesh, STEPS[how % 4]])), row


@pytest.mark.parametrize(("plan", "row"), list(pairwise()))
def test_gpt_is_the_same_under_every_layout(plan, row):
    check(variant(SMALL["gpt"], **CHOICES[row]), plan)


@pytest.mark.slow
@pytest.mark.parametrize("row", range(8))
@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("mesh", MESHES)
def test_gpt_is_the_same_under_every_layout_and_choice(mesh, how, row):
    check(variant(SMALL["gpt"], **CHOICES[row]), ",".join(filter(None, [mesh, how])))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["convnet", "gru"])
def test_other_models_are_the_same_under_every_layout(name, mesh):
    check(SMALL[name], mesh)


@pytest.mark.parametrize("plan", ["tensor=three_d:2x2x2", "data=2,tensor=one_d:4", "tensor=two_d:4x2,microbatches=2"])
def test_mlp_is_the_same_under_every_layout(plan):
    check(variant(SMALL["mlp"], dropout=0.1, activation="gelu_tanh"), plan)


@pytest.mark.parametrize(
    "plan",
    [
        "data=2,tensor=three_d:1x2x2",
        "data=4,tensor=sequence:2,microbatches=2",
        "data=2,tensor=fsdp:4,regather=false",
        "data=2,tensor=two_half_d:2x1x2",
        "data=8",
        "tensor=two_d:3x2",
        "tensor=three_d:1x3x2",
        "tensor=one_d:5",
        "data=7",
    ],
)
def test_other_meshes_and_odd_sizes(plan):
    batch = {"tensor=two_d:3x2": 12, "tensor=three_d:1x3x2": 12, "data=7": 14}.get(plan, 16)
    heads = {"tensor=three_d:1x3x2": 6, "tensor=one_d:5": 5}.get(plan, 8)
    model = variant(SMALL["gpt"], heads=heads, width=heads * 6, hidden=60)
    check_batch(model, plan, batch)


@functools.cache
def alone(model, batch):
    """`reference` for a batch of another size."""
    return reference(model) if batch == BATCH else run(recipe_of(model, "data=1", batch=batch))


def check_batch(model, plan, batch):
    """As `check`, with a batch of another size."""
    want, got = alone(model, batch), run(recipe_of(model, plan, batch=batch))
    assert_equal(got.gradients, want.gradients, tolerance=2e-6)
    compare_bytes(got)


def test_a_few_sequences_suffice_when_rows_lie_on_the_context():
    model = variant(SMALL["gpt"], dropout=0.1, kv_heads=2)
    want = alone(model, 2)
    got = run(recipe_of(model, "tensor=three_d:2x4x1", batch=2))
    assert got.parts.settings.placement.on_context == ("j",)
    assert_equal(got.gradients, want.gradients, tolerance=2e-6)
    compare_bytes(got)


LONG = 50
TURNED = ("tensor=two_d:4x2", "tensor=three_d:1x4x2", "tensor=three_d:4x2x1")  # other sizes of what is there besides


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=pytest.mark.slow) if mesh in TURNED else mesh for mesh in MESHES]
)
def test_fifty_steps_of_gpt_give_the_same_losses(mesh):
    model = variant(SMALL["gpt"], dropout=0.1, kv_heads=2)
    same_losses(model, mesh)


@pytest.mark.parametrize("name", ["convnet", "gru"])
def test_fifty_steps_of_other_models_give_the_same_losses(name):
    same_losses(SMALL[name], "tensor=three_d:2x2x2")  # all meshes below


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["convnet", "gru", "mlp"])
def test_fifty_steps_give_the_same_losses_on_every_mesh(name, mesh):
    same_losses(SMALL[name], mesh)


def same_losses(model, mesh):
    """Loss curves and the running state at their end."""
    (want, want_extra), (got, extra) = reference_losses(model, LONG), losses(recipe_of(model, mesh), LONG)
    assert want[-1] < 0.95 * want[0]  # something was learned, so the updates count
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert_equal(extra, want_extra, tolerance=1e-4)
