"""In which dtype a compiled program multiplies: read from its text, and from real programs for chips nobody has."""

import importlib.util
from collections import Counter

import pytest
from harness import SMALL, built, recipe_of, variant

from benchmarks import precision
from jaxpar import Model
from jaxpar.plan.wire import cost_of
from jaxpar.report import account, hlo, operands
from jaxpar.report.operands import Product

LIBTPU = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs jaxpar[aot-tpu]")
CUDA = pytest.mark.skipif(not importlib.util.find_spec("jax_cuda12_plugin"), reason="needs jaxpar[aot-cuda12]")
TEXT = """HloModule jit_step, num_partitions=1

%gemm_fusion_dot.1_computation (a: f8e5m2[8,16], b: f8e4m3fn[16,32]) -> f32[8,32] {
  %a = f8e5m2[8,16]{1,0} parameter(0)
  %b = f8e4m3fn[16,32]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,32]{1,0} dot(%a, %b), metadata={op_name="jit(step)/transpose(jvp())/dot_general"}
}

%fused (p: f8e4m3fn[8,16], q: bf16[16,32]) -> f32[8,32] {
  %p = f8e4m3fn[8,16]{1,0} parameter(0)
  %wide = bf16[8,16]{1,0} convert(%p)
  %q = bf16[16,32]{1,0} parameter(1)
  ROOT %c = f32[8,32]{1,0} convolution(%wide, %q), dim_labels=bf_io->bf, metadata={op_name="jit(step)/jvp()/dot"}
}

ENTRY %main (x: f8e4m3fn[8,16], w: f8e4m3fn[16,32], s: f32[], g: f8e5m2[8,16], v: bf16[16,32]) -> f32[8,32] {
  %x = f8e4m3fn[8,16]{1,0} parameter(0)
  %w = f8e4m3fn[16,32]{1,0} parameter(1)
  %s = f32[] parameter(2)
  %g = f8e5m2[8,16]{1,0} parameter(3)
  %v = bf16[16,32]{1,0} parameter(4)
  %gemm = (f32[8,32]{1,0}, s8[64]{0}) custom-call(%x, %w, %s, %s), custom_call_target="__cublas$lt$matmul$f8"
  %other = f32[8,32]{1,0} custom-call(%x), custom_call_target="annotate"
  %fusion = f32[8,32]{1,0} fusion(%x, %v), kind=kOutput, calls=%fused
  ROOT %t = f32[8,32]{1,0} fusion(%g, %w), kind=kCustom, calls=%gemm_fusion_dot.1_computation
}
"""
E4M3, E5M2 = "f8e4m3fn", "f8e5m2"


def test_products_are_told_by_what_is_multiplied():
    found = operands.products(TEXT)
    assert found == Counter(
        [
            Product(False, E4M3, E4M3, "__cublas$lt$matmul$f8"),
            Product(False, "bf16", "bf16", "compiler"),  # made wide before it is multiplied
            Product(True, E5M2, E4M3, "triton"),
        ]
    )
    assert [line.split() for line in operands.shown(found)] == [
        ["forward", "bf16", "x", "bf16", "1", "compiler"],
        ["forward", E4M3, "x", E4M3, "1", "__cublas$lt$matmul$f8"],
        ["backward", E5M2, "x", E4M3, "1", "triton"],
    ]


def gathered(plan):
    """Bytes of gathers by mesh axes, predicted and in the compiled program, of a model without a table."""
    parts, made = built(recipe_of(variant(SMALL["mlp"], layers=1, width=16, hidden=16), plan))
    text = made.gradients.lower(made.shapes._replace(opt=(), comm={}), made.batch).compile().as_text()
    both = cost_of(account.gradient_lines(parts)).sent, hlo.count(text, dict(made.mesh.shape)).sent
    return [{axes: sent for (axes, kind), sent in one.items() if kind == "all_gather"} for one in both]


PLANS = ("two_d:2x2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("three_d:2x2x2", "fsdp:4", "one_d:2")))


@pytest.mark.parametrize("tensor", PLANS)
@pytest.mark.parametrize("policy", ["fp8_current", pytest.param("fp8_delayed", marks=pytest.mark.slow)])
def test_operands_travel_in_8_bits(policy, tensor):
    predicted, sent = gathered(f"tensor={tensor},precision={policy}")
    twice, _ = gathered(f"tensor={tensor},precision=bf16")
    assert sent == predicted, "XLA for CPU would send float8 as float16, but sends bits as they are"
    assert predicted == {axes: size / 2 for axes, size in twice.items()}, "half of bfloat16"


def compiled(policy, word, extra):
    options = precision.Options(Model("gpt", layers=1, width=64, heads=4, hidden=128, context=32, vocab=64), batch=4)
    return precision.compiled_for(options, policy, word, extra)


def kinds(found, *by):
    """(back, dtypes of both operands in any order) of the products that are `by` one of these."""
    return {(one.back, *sorted((one.left, one.right))) for one in found if one.by in by}


FORWARD, BACK = (False, E4M3, E4M3), (True, E4M3, E5M2)
ATTENTION = {(back, "bf16", "bf16") for back in (False, True)}


@pytest.mark.slow
@CUDA
@pytest.mark.parametrize("extra", [precision.LIBRARIES, {}], ids=["libraries", "as chosen"])
@pytest.mark.parametrize("policy", ["bf16", "fp8_current", "fp8_delayed", "fp8_block"])
def test_a_hopper_gpu_multiplies_in_8_bits_forward_and_back(policy, extra):
    found = compiled(policy, "h100:1x1x1", extra)
    wide, eight = ("__cublas$lt$matmul", "__cublas$gemm"), ("__cublas$lt$matmul$f8",)
    if not extra:
        wide = eight = ("triton",)
    back = (True, E4M3, E4M3) if policy == "fp8_block" else BACK
    want = set() if policy == "bf16" else {FORWARD, back}
    assert kinds(found, *eight) - ATTENTION == want and ATTENTION <= kinds(found, *wide)
    assert kinds(found, *{one.by for one in found}) == want | ATTENTION, "nothing else is multiplied"
    if want and policy != "fp8_block":  # six weights, three products each; those that share an operand may be merged
        assert sum(count for one, count in found.items() if E4M3 in one) >= 3 * 6 - 4


@pytest.mark.slow
@LIBTPU
@pytest.mark.parametrize("policy", ["bf16", "fp8_current"])
@pytest.mark.parametrize("word", ["v6e:1x1", "tpu7x:2x2x1"])
def test_a_tpu_multiplies_in_8_bits_forward_and_back(word, policy):
    found = compiled(policy, word, {})
    assert kinds(found, "compiler") == ATTENTION | (set() if policy == "bf16" else {FORWARD, BACK})
