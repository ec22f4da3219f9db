"""Parameters that rest in fewer bits than they are computed with: the same on every layout, saved, resumed, sampled."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import SMALL, batch_of, built, recipe_of, unpadded, variant
from test_resume import GPT, assert_same_bits, interrupt

from jaxpar.core import formats
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Refused
from jaxpar.plan.wire import cost_of
from jaxpar.report import account, bill, memory
from jaxpar.train import checkpoint
from jaxpar.train.fit import fit
from jaxpar.train.progress import quiet
from jaxpar.train.sample import sample


@functools.cache
def trained(plan, layers=1, master="fp16", rounding="auto"):
    """Unpadded parameters after three steps, with parts, state and compiled step."""
    recipe = recipe_of(variant(SMALL["mlp"], layers=layers), plan, master=master, rounding=rounding)
    parts, made = built(recipe)
    state, step = made.init(), made.step.lower(made.shapes, made.batch).compile()
    for number in range(3):
        state, _ = step(state, made.place(batch_of(recipe, number)))
    return unpadded(made, state.params, state.extra)[0], parts, state, step


PLANS = [
    "data=2,tensor=two_d:2x2",
    *(
        pytest.param(plan, marks=pytest.mark.slow)
        for plan in (
            "pipe=2,data=2,chunks=2,schedule=interleaved,microbatches=2,zero=1",  # layers lie in another order
            "tensor=three_d:2x2x2",
            "data=4,zero=2,microbatches=2",
            "data=8,zero=3",
            "data=2,tensor=one_d:2,partition=auto",
            "data=2,offload=optimizer",
        )
    ),
]


@pytest.mark.parametrize("plan", PLANS)
def test_parameters_of_16_bits_are_the_same_under_any_plan(plan):
    layers = 4 if "pipe" in plan else 1
    (want, *_), (got, parts, state, step) = trained("data=1", layers), trained(plan, layers)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt) if leaf.ndim} == {jnp.dtype(jnp.float32)}
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    differ = np.concatenate([(one != other).ravel() for one, other in pairs])
    assert np.mean(differ) < 2e-3, "the same random bits, but for sums that were rounded otherwise"
    held, on_host = memory.held(parts), "offload" in plan
    there = sum(held.values()) - held["gradients"] + 4  # the count of steps
    assert on_host or step.memory_analysis().argument_size_in_bytes == there
    if parts.partition == "manual":
        counted, predicted = bill.counted_in(parts, step.as_text()).sent, cost_of(account.step_lines(parts)).sent
        assert counted == pytest.approx(predicted)


@pytest.mark.parametrize(
    ("precision", "master", "kept"),
    [
        ("fp32", "none", None),
        ("fp32", "auto", None),
        ("bf16", "none", ("bf16", jnp.bfloat16, True)),
        ("fp16", "none", ("fp16", jnp.float16, True)),
        ("bf16", "fp16", ("fp16", jnp.float16, True)),
        ("bf16", "fp169", ("fp169", jnp.float32, True)),
        ("bf16", "auto", None),
    ],
)
def test_what_rests_follows_the_precision_or_the_recipe(precision, master, kept):
    recipe = recipe_of(SMALL["mlp"], f"precision={precision}", master=master)
    found = built(recipe)[0].master
    assert (found and (found.fmt.name, found.dtype, found.stochastic)) == kept


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("master", ["bf16", "fp169", "fp152", "fixed:4.10"])
def test_parameters_rest_on_the_grid(master, rounding):
    fmt = formats.named(master)
    got, parts, state, _ = trained("data=2", 1, master, rounding)
    dtype = jnp.bfloat16 if master == "bf16" else jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}
    for leaf in jax.tree.leaves(got):
        wide = np.asarray(leaf, np.float32)
        assert np.array_equal(formats.nearest(wide, fmt), wide)
    assert parts.master.stochastic == (rounding == "stochastic")


@pytest.mark.slow
def test_a_run_of_16_bits_is_saved_resumed_moved_and_sampled(tmp_path):
    recipe = replace(GPT, model=replace(GPT.model, vocab=None), master="bf16", loss_scale="dynamic")
    whole = fit(recipe, report=quiet())
    interrupt(recipe, tmp_path, 6)
    resumed = fit(recipe, name="run", runs_dir=str(tmp_path), report=quiet())
    assert_same_bits(resumed.state, whole.state)
    leaves = checkpoint.described(tmp_path / "run" / "checkpoints", 10)["leaves"]
    kinds = {(name.split("/")[0], leaf["dtype"]) for name, leaf in leaves.items() if leaf["shape"]}
    assert kinds == {("params", "bfloat16"), ("opt", "float32")}
    with pytest.raises(Refused, match="master = auto"):
        fit(replace(recipe, master="auto"), name="run", runs_dir=str(tmp_path), report=quiet())
    interrupt(recipe, tmp_path, 6, name="moved")
    moved = fit(replace(recipe, plan=Plan.parse("data=2,zero=3")), name="moved", runs_dir=str(tmp_path), report=quiet())
    np.testing.assert_allclose(moved.losses, whole.losses, rtol=1e-3)
    assert sample(resumed, "a", count=8) == sample(str(tmp_path / "run"), "a", count=8)


@pytest.mark.parametrize(
    ("fields", "plan", "says"),
    [
        ({"master": "fp61"}, "data=1", "master = fp61: is no format.*did you mean `fp16"),
        ({"rounding": "up"}, "data=1", "rounding = up: is not a choice.*auto, nearest, stochastic"),
        ({"rounding": "nearest"}, "data=1", "rounding = nearest: .*parameters rest in float32.*master=fp16"),
        ({"master": "none", "rounding": "stochastic"}, "data=1", "parameters rest in float32"),
        ({"master": "fp16"}, "offload=parameters", "plan.offload = parameters: parameters rest as fp16"),
    ],
)
def test_what_means_nothing_is_one_problem(fields, plan, says):
    with pytest.raises(Refused, match=f"(?s){says}") as refused:
        built(recipe_of(SMALL["mlp"], plan, **fields))
    assert len(refused.value.problems) == 1
    assert Recipe.from_json(Recipe(**fields).to_json()) == Recipe(**fields)
