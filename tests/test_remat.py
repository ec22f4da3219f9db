"""What is computed again changes no number, is on the bill, and keeps as little as it says."""

import functools

import pytest
from harness import SMALL, built, recipe_of, run, variant
from parity import assert_equal
from test_backward_state import check as check_state
from test_parity import compare_bytes
from test_pipeline import assert_bill_is_exact

from jaxpar.core.refuse import Refused
from jaxpar.plan import remat

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
POLICIES = ["block", "dots", "names", "sqrt", "nested:3", "binomial:1", "binomial:2", "binomial:100"]
SCHEMES = [
    "data=1",
    "data=2,tensor=one_d:4,microbatches=2",
    "tensor=sequence:8",
    "tensor=fsdp:8",
    "data=2,tensor=two_d:2x2,microbatches=2",
    "tensor=two_half_d:2x2x2",
    "tensor=three_d:2x2x2",
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
    ("mlp", "pipe=2,data=2,tensor=one_d:2,microbatches=4", "binomial:1"),
    ("gru", "tensor=two_d:2x1", "binomial:2"),
    ("convnet", "tensor=one_d:2", "block"),
]


def policy_of(name, policy):
    """A policy as a plan has it."""
    return f"names:{NAMES[name]}" if policy == "names" else policy


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
