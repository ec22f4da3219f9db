"""What is computed again changes no number, is on the bill, and keeps as little as it says."""

import functools
import re

import numpy as np
import pytest
from harness import SMALL, built, recipe_of, run, variant
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_equal
from test_backward_state import check as check_state
from test_parity import compare_bytes
from test_pipeline import assert_bill_is_exact

from jaxpar.core.refuse import Refused
from jaxpar.core.walk import jaxprs
from jaxpar.plan import budget, remat
from jaxpar.report import flops
from jaxpar.step.program import traced

MODELS = {
    "gpt": variant(SMALL["gpt"], layers=5, dropout=0.1, kv_heads=2),
    "mlp": variant(SMALL["mlp"], layers=5, dropout=0.1, activation="gelu_tanh"),
    "gru": variant(SMALL["gru"], layers=2),
    "convnet": variant(SMALL["convnet"], layers=3),
}


@functools.cache
def without(name, plan):
    """A step that keeps everything."""
    return run(recipe_of(MODELS[name], plan))


def check(name, plan, policy):
    """Loss, gradients and state are those of a step that keeps everything; compiled bytes are the predicted ones."""
    want, got = without(name, plan), run(recipe_of(MODELS[name], f"{plan},remat={policy}"))
    assert_equal(got.loss, want.loss, tolerance=1e-6)
    assert_equal(got.gradients, want.gradients, tolerance=1e-6)
    assert_equal(got.extra, want.extra, tolerance=1e-6)
    if name == "convnet":  # XLA counts no padding of convolutions
        compare_bytes(got)
    else:
        assert_bill_is_exact(got, plan)


NAMES = {"gpt": "query+scores+up", "mlp": "activation", "gru": "recurrent+norm", "convnet": "conv"}
BUDGETS = {"gpt": "150KB", "mlp": "20KB", "gru": "60KB", "convnet": "100KB"}
POLICIES = ["block", "dots", "names", "budget", "sqrt", "nested:3", "binomial:1", "binomial:2", "binomial:100"]
SCHEMES = [
    "data=1",
    "data=2,tensor=one_d:4,microbatches=2",
    "tensor=sequence:8",
    "tensor=fsdp:8",
    "data=2,tensor=two_d:2x2,microbatches=2",
    "tensor=two_half_d:2x2x2",
    "tensor=three_d:2x2x2",
    "data=4,zero=3,tensor=one_d:2",
    "data=4,zero=2,microbatches=2",
]
PIPES = [
    "pipe=2,data=2,tensor=one_d:2,microbatches=4",
    "pipe=2,tensor=two_d:2x2,microbatches=4,storage=residual",
    "pipe=2,data=2,schedule=interleaved,chunks=2,microbatches=4",
]
QUICK = [
    ("gpt", "tensor=fsdp:8", "names"),
    ("mlp", "data=2,tensor=two_d:2x2,microbatches=2", "sqrt"),
    ("mlp", "data=2,tensor=two_d:2x2,microbatches=2", "binomial:2"),
    ("mlp", "tensor=three_d:2x2x2", "dots"),
    ("mlp", "tensor=three_d:2x2x2", "nested:3"),
    ("mlp", "data=1", "budget"),
    ("mlp", "data=4,zero=3,tensor=one_d:2", "block"),
    ("mlp", "pipe=2,data=2,tensor=one_d:2,microbatches=4", "binomial:1"),
    ("gru", "tensor=two_d:2x1", "binomial:2"),
    ("gru", "pipe=2,microbatches=2", "binomial:2"),  # a block of a stage is a chain of one, time steps are one of many
    ("convnet", "tensor=one_d:2", "block"),
]


def policy_of(name, policy):
    """A policy as a plan has it."""
    return {"names": f"names:{NAMES[name]}", "budget": f"budget:{BUDGETS[name]}"}.get(policy, policy)


@pytest.mark.parametrize(("name", "plan", "policy"), QUICK)
def test_what_is_computed_again_changes_nothing(name, plan, policy):
    check(name, plan, policy_of(name, policy))


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("plan", SCHEMES + PIPES)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_computed_again_changes_nothing_in_any_combination(name, plan, policy):
    check(name, plan, policy_of(name, policy))


@pytest.mark.parametrize("policy", ["sqrt", "binomial:2"])
def test_state_of_the_backward_pass(policy):
    check_state(f"microbatches=4,remat={policy}")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["block", "dots", "nested:3", "binomial:1"])
@pytest.mark.parametrize("plan", ["microbatches=4", "pipe=2,data=2,microbatches=4"])
def test_state_of_the_backward_pass_in_any_combination(plan, policy):
    check_state(f"{plan},remat={policy}", layers=5)


# -------------------------------------------------------------------------------------------------------------- budget

BLOCKS = st.lists(  # what each block may keep: bytes and work, in any relation, the first the fewest
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 1000)), min_size=1, max_size=3), min_size=1, max_size=6
)


@settings(max_examples=200, deadline=None)
@given(BLOCKS, st.floats(0, 1))
def test_a_budget_is_spent_within_a_tenth_of_the_optimum(blocks, share):
    fewest, most = (sum(pick(held for held, _ in block) for block in blocks) for pick in (min, max))
    compare_with_optimum(blocks, fewest + share * (most - fewest))


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_for_a_chain_of_twelve_unequal_blocks(seed):
    rng = np.random.default_rng(seed)
    held, saved = rng.integers(1, 2000, (12, 2)), rng.integers(1, 10**6, (12, 2))
    blocks = [
        [(1, 2e6), *((1 + h, 2e6 - s) for h, s in zip(*one, strict=True))] for one in zip(held, saved, strict=True)
    ]
    for share in (0.1, 0.35, 0.6):
        compare_with_optimum(blocks, 12 + share * held.max(1).sum())


def compare_with_optimum(blocks, limit):
    """The chosen bytes are within the limit, and the work within a tenth of what the best of all combinations saves."""
    chosen = budget.choose(blocks, limit)
    held, work = np.sum([block[one] for block, one in zip(blocks, chosen, strict=True)], axis=0)
    assert held <= limit
    sums, works = np.zeros(1), np.zeros(1)
    for block in blocks:
        own = np.asarray(block, float)
        sums, works = (np.add.outer(total, own[:, n]).ravel() for n, total in enumerate((sums, works)))
    most = sum(max(work for _, work in block) for block in blocks)
    assert most - work >= 0.9 * (most - works[sums <= limit].min())


def test_less_than_the_least_is_no_budget():
    with pytest.raises(ValueError, match="at least 3 bytes"):
        budget.choose([[(1, 5), (9, 1)], [(2, 5)]], 2)


@pytest.mark.parametrize(
    ("chosen", "want"),
    [
        ([0, 0, 2, 2], [(0, 2), (2, 2)]),
        ([2, 0, 2, 0, 1], [(0, 3), (2, 2)]),
        ([0, 2, 2], [(0, 2), (2, 1)]),
        ([0, 1, 1], [(0, 3)]),
        ([0, 1, 1, 1], [(0, 2), (1, 2)]),
        ([1, 1, 2], [(1, 2), (2, 1)]),
        ([1], [(1, 1)]),
    ],
)
def test_no_block_runs_alone_but_one_that_keeps_everything(chosen, want):
    assert budget.runs(chosen, everything=2) == want


def stacked(parts):
    """Bytes of what scans stack in the forward pass of a traced step, state without gradient aside."""
    found = 0
    for equation in scans(traced(parts)):
        if "transpose(" not in str(equation.source_info.name_stack) and equation.params["length"] > 1:
            made = equation.outvars[equation.params["num_carry"] :]
            found += sum(var.aval.size * var.aval.dtype.itemsize for var in made)
    return found


def scans(jaxpr):
    """The outermost scans of a jaxpr."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        else:
            for inner in jaxprs(equation):
                yield from scans(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt", "convnet"))])
def test_a_budget_is_never_exceeded_and_the_more_it_is_the_less_is_computed_again(name):
    model, plan = variant(MODELS[name], layers=9), "tensor=two_d:2x2"
    if name == "convnet":
        model = variant(model, norm="layer")  # no state, which is stacked as well
    least = int(re.search(r"at least (\d+) bytes of 9 blocks", told(model, f"{plan},remat=budget:1")["plan.remat"])[1])
    work = []
    for limit in (least, 2 * least, 3 * least, 10 * least, 50 * least):
        parts, _ = built(recipe_of(model, f"{plan},remat=budget:{limit}"))
        assert stacked(parts) <= limit
        work.append(flops.executed(parts))
    none, block = (flops.executed(built(recipe_of(model, f"{plan},remat={one}"))[0]) for one in ("none", "block"))
    assert work == sorted(work, reverse=True)
    assert work[0] == block > work[1] and work[-1] == none


def test_the_model_has_its_flops_whatever_a_device_may_keep():
    """All examples on one device would keep more than a budget that is enough for four."""
    plan = "data=4,remat=budget:{}"
    least = int(re.search(r"at least (\d+) bytes", told(MODELS["mlp"], plan.format(1))["plan.remat"])[1])
    parts, _ = built(recipe_of(MODELS["mlp"], plan.format(least)))
    assert flops.of_model(parts) == flops.of_model(built(recipe_of(MODELS["mlp"], "data=1"))[0]) > 0


@pytest.mark.parametrize("policy", ["block", pytest.param("binomial:2", marks=pytest.mark.slow)])
def test_what_xla_partitions_is_computed_again_as_well(policy):
    plan = f"data=2,tensor=one_d:2,partition=auto,remat={policy}"
    got = run(recipe_of(MODELS["mlp"], plan))
    assert_equal(got.gradients, without("mlp", "data=1").gradients, tolerance=2e-6)


# ------------------------------------------------------------------------------------------------------------ refusals


def told(model, plan):
    """Fields and messages of what is refused."""
    with pytest.raises(Refused) as refused:
        built(recipe_of(model, plan))
    return {problem.field: f"{problem.rule} {problem.legal}" for problem in refused.value.problems}


@pytest.mark.parametrize(
    ("plan", "field", "says"),
    [
        ("remat=blok", "plan.remat", "did you mean `block`"),
        ("remat=block:2", "plan.remat", "takes nothing after its name. block"),
        ("remat=nested:0", "plan.remat", "whole number of levels, at least 1. nested:3"),
        ("remat=nested", "plan.remat", "whole number of levels"),
        ("remat=binomial:0", "plan.remat", "whole number of snapshots, at least 1"),
        ("remat=budget:512QB", "plan.remat", "whole number of bytes, at least 1. budget:512MiB"),
        ("remat=names:", "plan.remat", "joined by +"),
        ("remat=names:up+up", "plan.remat", "each once"),
        ("remat=names:upp", "plan.remat", "calls an activation `upp`. did you mean `up`? Any of activation, down, up"),
        ("remat=block,unroll=true", "plan.unroll", "unroll=auto"),
        ("remat=block,regather=false", "plan.regather", "regather=true"),
        ("remat=block,schedule=zero_bubble_h1,pipe=2,microbatches=2", "plan.remat", "one_f_one_b"),
        ("remat=budget:1GB,partition=auto", "plan.remat", "partition=manual"),
    ],
)
def test_what_cannot_be_is_refused(plan, field, says):
    found = told(SMALL["mlp"], plan)
    assert list(found) == [field] and says in found[field]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("sqrt", remat.Remat("nested", count=2)),
        ("names:a+b", remat.Remat("names", ("a", "b"))),
        ("budget:2GB", remat.Remat("budget", count=2 * 10**9)),
        ("budget:3kib", remat.Remat("budget", count=3 * 1024)),
        ("budget:7", remat.Remat("budget", count=7)),
    ],
)
def test_a_policy_is_read(text, want):
    assert remat.parse(text) == want
