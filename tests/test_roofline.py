"""Three ceilings of a plan, and steps to a loss times time per step."""

import jax
import pytest
from harness import CLASSES, CONTEXT, SMALL, recipe_of

from jaxpar.core import products
from jaxpar.report import ceilings, efficiency, forecast, roofline, topology
from jaxpar.report.compiled import rates_of
from jaxpar.step.parts import assemble
from jaxpar.step.program import traced


def roof_of(plan, word):
    recipe = recipe_of(SMALL["gpt"], plan)
    tokens, where = jax.ShapeDtypeStruct((recipe.batch, CONTEXT), "int32"), topology.parse(word)
    parts = assemble(recipe, tokens, tokens, CLASSES)
    trace = traced(parts)
    found = forecast.forecast(recipe.plan, parts, where, trace)
    return found, ceilings.roof(found, parts, where, trace), where


def test_ceilings_are_amounts_over_rates(tmp_path):
    found, roof, where = roof_of("tensor=two_d:2x4", "v5e:2x4")
    assert roof.arithmetic == found["flops"]["executed"] / 197e12
    assert roof.memory == roof.traffic / 0.819e12 and roof.traffic > 4 * found["memory"]["predicted"]["parameters"]
    rates = rates_of(found["mesh"], where)
    sent = found["comm"]["predicted"]
    seconds = [size / rates.link(axes, kind) for axes, kinds in sent.items() for kind, size in kinds.items()]
    assert roof.communication == pytest.approx(sum(seconds)) and roof.link_rate == pytest.approx(
        roof.sent / sum(seconds)
    )
    assert roof.bound == "communication" and roof.seconds == roof.communication, "a toy model sends too much"
    assert ceilings.as_json(roof)["bound"] == "communication" and "bound by communication" in ceilings.text(roof)
    alone = roof_of("data=1", "v5e:1x1")[1]
    assert alone.sent == alone.communication == 0 and alone.link_rate is None and alone.bound == "memory"
    assert roofline.picture(tmp_path / "roof.png", [roof, alone]).read_bytes().startswith(b"\x89PNG")
    far, near = (roof_of("data=2,tensor=fsdp:8", word)[1] for word in ("v5e:2x4*2", "v5e:4x4"))
    assert far.sent == near.sent and far.communication > 1.5 * near.communication, "slices have slow links"
    staged = roof_of("pipe=2,microbatches=2", "h100:1x1x2")[1]
    assert staged.idle == pytest.approx(1 / 3) and staged.arithmetic == pytest.approx(staged.flops / staged.peak * 1.5)
    fast = alone._replace(traffic=alone.traffic / 1e6, memory=alone.memory / 1e6)
    assert fast.bound == "arithmetic" and "at most 100% of the dense" in ceilings.text(fast)


def test_a_product_moves_its_operands_and_its_result():
    x, w = jax.ShapeDtypeStruct((5, 7), "float32"), jax.ShapeDtypeStruct((7, 11), "bfloat16")

    def thrice(x, w):
        def trip(c, _):
            return jax.lax.dot(x + c, w, preferred_element_type="float32").sum(), None

        return jax.lax.scan(trip, 0.0, length=3)

    moved = 3 * (5 * 7 * 4 + 7 * 11 * 2 + 5 * 11 * 4)
    assert products.traffic(jax.make_jaxpr(thrice)(x, w).jaxpr) == moved


def test_who_is_first_at_a_loss(tmp_path):
    falling = [(step, 4 - 0.01 * step) for step in range(1, 301)]
    small = efficiency.reached(falling, [0.010] * 300, 3.0)
    assert small.steps == 105, "the mean over ten steps is 4.5 steps behind"
    assert small.seconds == pytest.approx(1.05)
    large = efficiency.reached([(step, 4 - 0.02 * step) for step in range(1, 151)], [0.030] * 150, 3.0)
    never = efficiency.reached([(1, 9.0), (2, 8.0)], [0.001, 0.003, 0.002], 3.0)
    assert large.steps == 55 and never == efficiency.Reached(None, 0.002) and never.seconds is None
    said = efficiency.text({"large": large, "never": never, "small": small}).splitlines()
    assert [line.split()[0] for line in said[1:]] == ["small", "large", "never"] and said[1].endswith("1 x")
    assert "1.5714 x" in said[2]
    found = efficiency.picture(tmp_path / "e.png", {"small": small, "large": large}, 3.0)
    assert found.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no run reached"):
        efficiency.picture(tmp_path / "n.png", {"never": never}, 3.0)
