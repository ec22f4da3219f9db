"""Every policy gives under every plan what it gives on one device; there it gives what a plain program gives.

A policy declares how far plans may lie from one device (`Policy.tolerance`). Sums that swamp in few bits, of embeddings
and biases, of norms, softmax and loss, are in float32.
"""

import functools
import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import BATCH, SMALL, built, recipe_of, run, variant
from jax import lax
from parity import assert_equal
from test_resume import CONVNET, PIPED, SPREAD, assert_same_bits, interrupt
from tiny import TINY

from jaxpar.core import family
from jaxpar.core.plan import Plan
from jaxpar.core.walk import visits
from jaxpar.plan.context import context
from jaxpar.plan.layout import SINGLE
from jaxpar.plan.product import Settings
from jaxpar.plan.wire import device_wire
from jaxpar.train import ahead, checkpoint
from jaxpar.train.fit import fit
from jaxpar.train.metrics import NonFinite
from jaxpar.train.progress import quiet

POLICIES = family.names("policies")
HALF = {"bf16": jnp.bfloat16, "fp16": jnp.float16}

# every policy, every plan

SMOOTH = {"mlp": variant(SMALL["mlp"], activation="gelu_tanh")}  # a rounded ReLU has another gradient at once
MODELS = {name: SMOOTH.get(name, model) for name, model in SMALL.items()}
MODELS |= {f"{name} without bias": variant(MODELS[name], bias=False) for name in ("gpt", "mlp")}
TINIEST = variant(MODELS["mlp"], layers=1, width=16, hidden=16)
QUICK = (
    "tensor=two_d:2x2",
    "data=2,zero=3",
    "tensor=three_d:1x2x2",
    "pipe=2,data=2,microbatches=2,schedule=zero_bubble_h1",
    "tensor=one_d:4",
)
PLANS = (
    "data=8",
    "tensor=one_d:8",
    "tensor=sequence:8",
    "tensor=fsdp:8",
    "tensor=two_d:2x4",
    "data=2,tensor=two_half_d:1x2x2",
    "tensor=two_half_d:2x2x2",
    "tensor=three_d:2x2x2",
    "data=8,zero=1",
    "data=8,zero=2",
    "data=8,zero=3",
    "data=2,tensor=two_d:2x2,zero=3,microbatches=2",
    "data=2,remat=block,unroll=false",
    "tensor=one_d:4,partition=auto",
    "pipe=2,data=2,tensor=one_d:2,microbatches=4",
    "pipe=2,data=2,microbatches=4,schedule=zero_bubble_h1,storage=residual",
    "pipe=2,data=2,chunks=2,microbatches=4,schedule=interleaved",
)
ODD = {"tensor=two_d:3x2": (12, 8), "tensor=one_d:5": (16, 5), "data=7": (14, 8)}  # batch, heads


def recipe_in(policy, model, plan, batch):
    """With a loss scale under which nothing overflows, if the policy scales at all."""
    scale = "none" if family.pick("policies", policy)().loss_scale == "none" else "static:1024"
    return recipe_of(model, f"{plan},precision={policy}", batch=batch, loss_scale=scale)


@functools.cache
def alone(model, policy, microbatches, batch):
    """Loss, gradients and state of one device."""
    return run(recipe_in(policy, model, f"microbatches={microbatches}", batch))


def check(policy, model, plan, batch=BATCH):
    """A plan lies no further from one device than the policy says."""
    want = alone(model, policy, Plan.parse(plan).microbatches, batch)
    got = run(recipe_in(policy, model, plan, batch))
    tolerance = family.pick("policies", policy)().tolerance
    assert_equal(got.loss, want.loss, tolerance)
    assert_equal(got.gradients, want.gradients, tolerance)
    assert_equal(got.extra, want.extra, tolerance)


NOW = ("bf16", "fp8_current", "fp8_delayed")  # the others are like one of these; test_families.py trains in each


@pytest.mark.parametrize("policy", [pytest.param(p, marks=[pytest.mark.slow] * (p not in NOW)) for p in POLICIES])
def test_a_policy_gives_the_gradients_of_one_device(policy):
    check(policy, TINIEST, QUICK[POLICIES.index(policy) % len(QUICK)])


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_gives_the_gradients_of_one_device_under_every_plan(policy, model, plan):
    layers = 4 if "chunks=2" in plan else 2
    check(policy, variant(MODELS[model], layers=layers), plan)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ODD)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_takes_odd_sizes(policy, plan):
    batch, heads = ODD[plan]
    check(policy, variant(MODELS["gpt"], heads=heads, width=heads * 6, hidden=60), plan, batch)


# what one device gives


def alone_in(policy, train=True):
    """The Context of one device."""
    return context(Settings(SINGLE, family.pick("policies", policy)(), device_wire(), train=train))


def drawn(seed, *shape):
    """Numbers of two more bits than float16 keeps; the products of what is left of them add up exactly in float32."""
    numbers = np.random.default_rng(seed).integers(2**12, 2**13, shape) * 2.0**-12
    return (numbers * np.random.default_rng(seed + 1).choice([-1, 1], shape)).astype(np.float32)


@pytest.mark.parametrize("policy", HALF)
def test_a_product_is_rounded_as_a_plain_program_rounds_it(policy):
    half = HALF[policy]
    x, up, gate = drawn(1, 3, 4), drawn(2, 4, 3), drawn(4, 4, 3)
    dy = np.stack([drawn(6, 3, 3), drawn(8, 3, 3)]).astype(half)
    dot = alone_in(policy).dot
    found, back = jax.vjp(lambda x, *w: jnp.stack(dot(x, w, ("embed mlp", "embed mlp"))), x, up, gate)
    dx, *dw = back(jnp.asarray(dy))

    cut = [a.astype(half).astype(np.float64) for a in (x, up, gate, *dy)]
    x, up, gate, d_up, d_gate = cut
    assert not all(np.array_equal(a, b) for a, b in zip(cut, (x, drawn(2, 4, 3)), strict=False)), "bits were lost"
    assert_same_bits(np.asarray(found), np.stack([(x @ up).astype(half), (x @ gate).astype(half)]))
    both = (d_up @ up.T).astype(half) + (d_gate @ gate.T).astype(half)
    wanted = [both, (x.T @ d_up).astype(half), (x.T @ d_gate).astype(half)]
    assert_same_bits([*map(np.asarray, (dx, *dw))], [a.astype(np.float32) for a in wanted])


@pytest.mark.parametrize("policy", HALF)
def test_gradients_of_a_token_that_is_everywhere_are_summed_in_float32(policy):
    table, ids, dy = drawn(1, 5, 3), np.full((1, 4096), 2), np.ones((1, 4096, 3), HALF[policy])
    _, back = jax.vjp(lambda table: alone_in(policy).lookup(table, ids), table)
    (found,) = back(jnp.asarray(dy))
    assert_equal(found[2], np.full(3, 4096.0), tolerance=0)  # in bfloat16 it would stay at 256, in float16 at 2048
    swamped = lax.fori_loop(0, 4096, lambda _, total: total + 1, jnp.zeros((), HALF[policy]))
    assert float(swamped) < 4096 and not found[:2].any()


SUMS = ("reduce_sum", "scatter-add", "cumsum", "cumlogsumexp", "psum", "psum_invariant", "log", "rsqrt")


def sums_in_few_bits(recipe):
    """Sums, and what norms, softmax and loss are made of, that have fewer than 32 bits; without products."""
    _, made = built(recipe)
    trace = jax.make_jaxpr(made.gradients)(made.shapes, made.batch)
    found = set()
    for equation, _ in visits(trace.jaxpr, lambda equation: 0):
        kinds = {var.aval.dtype for var in (*equation.invars, *equation.outvars) if hasattr(var.aval, "dtype")}
        if any(jnp.issubdtype(kind, jnp.floating) and kind.itemsize < 4 for kind in kinds):
            found.add(equation.primitive.name)
    return found.intersection(SUMS)


def quickly(*cases):
    """Only these are quick."""
    every = itertools.product(POLICIES, SMALL)
    return [pytest.param(*case, marks=[] if case in cases else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("policy", "model"), quickly(("bf16", "gpt")))
def test_sums_norms_softmax_and_loss_are_in_float32(policy, model):
    # two_d scatters what products leave to be summed, in the policy's dtype; but for weights that it does not split
    plan = "tensor=two_d:2x2" if model == "gpt" else "data=1"
    assert not sums_in_few_bits(recipe_of(MODELS[model], f"{plan},precision={policy}"))


# steps that change nothing, and runs that go on


def one_by_one(quick):
    """One policy is quick."""
    return [pytest.param(name, marks=[] if name == quick else pytest.mark.slow) for name in POLICIES]


STATEFUL = "fp8_delayed"
ONE = replace(TINY, model=replace(TINY.model, layers=1))
RUNS = {"spread": SPREAD, "batch norm": CONVNET, "pipeline": PIPED, "zero": replace(TINY, plan=Plan(data=2, zero=3))}
RUNS |= {"one device": ONE}


@pytest.mark.parametrize("policy", one_by_one(STATEFUL))
def test_batches_that_are_no_numbers_change_nothing_and_stop_the_run(policy, tmp_path, monkeypatch):
    def spoilt(batch, parts, dataset, name):
        inputs, labels = batch
        bad = name in ("batch 1", "batch 4", "batch 5", "batch 6")
        return np.where(bad and inputs == inputs.max(), np.float32(np.nan), inputs), labels

    monkeypatch.setattr(ahead, "checked", spoilt)  # which refuses what large numbers may become on the way
    recipe = replace(ONE, plan=Plan(precision=policy), skip_limit=3, checkpoint_every=1)
    with pytest.raises(NonFinite, match=r"step 7: .*update 3 in a row") as stopped:
        fit(recipe, name="bad", runs_dir=str(tmp_path), report=quiet())
    assert stopped.value.exit_code == 78
    lines = [json.loads(line) for line in (tmp_path / "bad" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line["skipped"] for line in lines if "skipped" in line} == {2: 1, 5: 1, 6: 2, 7: 3}
    at = tmp_path / "bad" / "checkpoints"
    before, after = (checkpoint.described(at, step)["leaves"] for step in checkpoint.steps(at)[::2])
    moved = {name for name in before if before[name] != after[name]}
    scaled = family.pick("policies", policy)().loss_scale != "none"
    free = ("step", "opt/0/") if scaled else ("step",)  # the loss scale is the first link of the optimizer
    assert "step" in moved and all(name.startswith(free) for name in moved)


@pytest.mark.parametrize("run", [pytest.param(n, marks=[] if n == "one device" else pytest.mark.slow) for n in RUNS])
@pytest.mark.parametrize("policy", one_by_one(STATEFUL))
def test_stop_and_resume_is_no_stop_bitwise(policy, run, tmp_path):
    recipe = replace(RUNS[run], plan=replace(RUNS[run].plan, precision=policy))
    whole = fit(recipe, report=quiet())
    interrupt(recipe, tmp_path, 6)
    resumed = fit(recipe, name="run", runs_dir=str(tmp_path), report=quiet())
    assert_same_bits(resumed.state, whole.state)
    assert resumed.losses == whole.losses and resumed.held_out == whole.held_out
