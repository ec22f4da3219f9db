"""What a compiled step says of itself, on the CPU to the byte and the flop; and ahead of time, for chips nobody has."""

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import pytest
from harness import BATCH, CONTEXT, SMALL, built, recipe_of

from jaxpar.core.cost import Cost
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Model, Recipe
from jaxpar.core.refuse import Refused
from jaxpar.report import account, compiled, forecast, topology
from jaxpar.step.parts import assemble
from jaxpar.step.program import program

LIBTPU = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs jaxpar[aot-tpu]")
CUDA = pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="needs jaxpar[aot-cuda12]")


def read(plan):
    """The step of a small GPT, compiled for simulated devices."""
    parts, made = built(recipe_of(SMALL["gpt"], plan))
    step = made.step.lower(made.shapes, made.batch).compile()
    return parts, made, compiled.read(parts, made, step, seconds=1.5)


def gpt_flops(vocab):
    """Of one step of that GPT on one of eight devices, for this many tokens in the head."""
    model = SMALL["gpt"]
    d, h = model.width, model.hidden
    block = 2 * 4 * d * d + 2 * 2 * d * h + 2 * 2 * CONTEXT * d
    return 3 * BATCH * CONTEXT * (model.layers * block + 2 * d * vocab) / 8


@pytest.mark.parametrize(
    "plan, vocab", [("data=8", 61), ("tensor=two_d:2x4", 64), ("data=2,tensor=fsdp:4,microbatches=2", 61)]
)
def test_a_step_for_the_cpu_says_what_theory_says(plan, vocab):
    parts, made, found = read(plan)
    assert found.flops == pytest.approx(gpt_flops(vocab), rel=1e-3)
    assert found.model_flops == pytest.approx(gpt_flops(61))
    batch = sum(a.size * a.dtype.itemsize for a in made.batch) / made.mesh.shape.get("data", 1)
    assert found.arguments >= found.state + batch / 8 and found.aliased == found.state
    assert Cost(found.sent).total_sent == pytest.approx(account.predicted(parts).total_sent)
    assert (found.target, found.devices, found.compile_seconds) == ("cpu", 8, 1.5)
    assert found.compiler.startswith("jaxlib 0.") and found.warnings == ()
    assert found.played is None and found.mfu is None and found.fits is None
    assert found.held == found.arguments + found.outputs - found.aliased + found.temporary + found.code
    assert compiled.differences(account.predicted(parts), found) == []
    written = json.loads(json.dumps(forecast.with_compiled(forecast.forecast(Plan.parse(plan), parts), found)))
    assert written["memory"]["compiled"]["total"] == found.held and written["flops"]["compiled"] == found.flops
    sent = written["comm"]["compiled"]
    assert sum(size for kinds in sent.values() for size in kinds.values()) == sum(found.sent.values())
    assert written["compiled"]["estimate"] is None and written["fits"] is None and written["warnings"] == []


def test_a_program_is_for_the_devices_it_is_given():
    parts, _ = built(recipe_of(SMALL["gpt"], "data=8"))
    given = jax.devices()[7::-1]
    made = program(parts, given)
    assert [*made.mesh.devices.flat] == given and made.shapes.step.sharding.mesh == made.mesh


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"flops": 50.0}, "executed flops are 0.500 times the model's"),
        ({"flops": 201.0}, "executed flops are 2.010 times the model's"),
        ({"flops": 100.0, "mfu": 1.02}, "the estimated MFU is 1.02"),
        ({"aliased": 900}, "only 900 of 1,000 bytes of state are updated in place"),
        ({"room": 2**30, "temporary": 2**31}, "the step holds 2.0 GiB, and a device has 1.0 GiB"),
        ({"flops": 133.0, "mfu": 0.4, "room": 1e6}, None),
    ],
)
def test_what_cannot_be_true_is_said(changed, says):
    fields = dict.fromkeys(compiled.Compiled._fields, 0) | {"flops": 100.0, "model_flops": 100.0, "warnings": ()}
    fields |= {"arguments": 1000, "outputs": 1000, "aliased": 1000, "state": 1000, "room": None, "mfu": None}
    said = compiled.doubts(compiled.Compiled(**{**fields, **changed}))
    assert len(said) == (says is not None) and (says is None or says in said[0])


ROUNDED, TURNED = "in bfloat16, to which", "gathers or scatters became all-reduces"


@pytest.mark.parametrize(
    "predicted, sent, said",
    [
        ({("a", "all_gather"): 100}, {("a", "all_gather"): 100.2}, []),
        ({("a", "all_gather"): 100}, {("a", "all_gather"): 52}, [("all_gather over a", ROUNDED)]),
        (
            {("a", "all_gather"): 100, ("a", "permute"): 5},
            {("a", "all_reduce"): 198, ("a", "permute"): 5},
            [("all_gather over a", TURNED), ("all_reduce over a", TURNED)],
        ),
        ({("a", "all_reduce"): 5000}, {("a", "all_reduce"): 4900}, [("all_reduce over a", "sums of single numbers")]),
        ({("a", "permute"): 5000}, {("a", "permute"): 9000}, [("permute over a", "compiled 9,000$")]),
        (
            {("data", "all_reduce"): 1e4, ("b", "all_gather"): 7},
            {("slices", "all_reduce"): 2e4, ("b", "all_gather"): 7},
            [("all_reduce over all axes", "predicted 10,000 bytes, compiled 20,000$")],
        ),
    ],
)
def test_differences_are_named(predicted, sent, said):
    fields = dict.fromkeys(compiled.Compiled._fields) | {"sent": sent}
    found = compiled.differences(Cost(predicted), compiled.Compiled(**fields))
    assert len(found) == len(said)
    assert all(line.startswith(key) and re.search(why, line) for line, (key, why) in zip(found, said, strict=True))


# Ahead of time.
def ahead(plan, word, **fields):
    """The step of a GPT of 1.6 million parameters, compiled for devices that are not there."""
    model = Model("gpt", layers=2, width=256, heads=8, hidden=1024, context=128)
    recipe = Recipe(model=model, plan=Plan.parse(plan), batch=16, steps=50, warmup=5, **fields)
    tokens = jax.ShapeDtypeStruct((16, 128), jnp.int32)
    parts = assemble(recipe, tokens, tokens, 512)
    return parts, compiled.compile_for(parts, topology.parse(word))


def test_a_plan_for_another_number_of_devices_is_refused():
    with pytest.raises(Refused, match="topology = v5e:4x4: has 16 devices, and the plan takes 8"):
        ahead("data=8", "v5e:4x4")
    with pytest.raises(Refused, match=r"has 8 slices, and no mesh axis of \{'row': 2, 'column': 4\} divides by that"):
        ahead("tensor=two_d:2x4", "v5e:1x1*8")


def as_predicted(parts, found):
    """Bytes of the compiled step over those predicted, and the sentences on differences."""
    predicted = account.predicted(parts)
    return Cost(found.sent).total_sent / predicted.total_sent, compiled.differences(predicted, found)


@LIBTPU
@pytest.mark.slow
def test_a_step_for_eight_tpus_is_as_predicted():
    parts, found = ahead("tensor=fsdp:8,precision=bf16", "v5e:2x4")
    ratio, differences = as_predicted(parts, found)
    assert ratio <= 1.05 and len(differences) == 1, "gradients of biases are rounded before they are summed"
    assert differences[0].startswith("all_reduce over shard") and differences[0].endswith("rounds it anyway")
    assert found.flops == pytest.approx(found.model_flops, rel=1e-3)
    assert found.state <= found.aliased < 1.01 * found.state and found.fits and found.warnings == ()
    assert 0 < found.beside <= found.started < sum(found.sent.values()) and not found.provisional
    assert 0 < found.mfu < 1 and 0 < found.played.exposed < found.played.sending < found.played.seconds
    assert found.compiler.startswith("libtpu ") and found.devices == 8


@LIBTPU
@pytest.mark.slow
def test_two_slices_talk_over_the_network():
    parts, found = ahead("data=2,tensor=fsdp:4,precision=bf16", "v5e:2x2*2")
    assert found.sent["slices", "all_reduce"] == pytest.approx(
        account.predicted(parts).sent["data", "all_reduce"], rel=0.02
    )
    assert found.warnings == () and as_predicted(parts, found)[0] <= 1.05


@LIBTPU
@pytest.mark.slow
def test_a_step_that_does_not_fit_a_tpu_is_refused():
    model = Model("gpt", layers=2, width=8192, heads=64, hidden=65536, context=128)
    recipe = Recipe(model=model, plan=Plan.parse("data=8,precision=bf16"), batch=16, steps=50)
    tokens = jax.ShapeDtypeStruct((16, 128), jnp.int32)
    with pytest.raises(Refused, match=r"v5e:2x4: the step does not fit: Ran out of memory on HBM.*[^.]\. Legal: a "):
        compiled.compile_for(assemble(recipe, tokens, tokens, 512), topology.parse("v5e:2x4"))


@CUDA
@pytest.mark.slow
def test_a_step_for_eight_gpus_is_as_predicted():
    parts, found = ahead("tensor=fsdp:8", "h100:1x1x8")
    assert as_predicted(parts, found) == (1, [])
    assert found.flops == pytest.approx(found.model_flops, rel=1e-3) and found.warnings == ()
    assert found.provisional and found.played is None and found.sending > 0
