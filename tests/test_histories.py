"""Delayed scaling keeps a history for each operand of each product, around any model and under any plan."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import SMALL, built, recipe_of, run, start, variant
from parity import assert_equal

from jaxpar.core import family
from jaxpar.core.parts import chain, normal
from jaxpar.core.refuse import Refused
from jaxpar.core.types import Layer
from jaxpar.layers import dense
from jaxpar.layers.stack import stack
from jaxpar.plan.context import context
from jaxpar.plan.layout import SINGLE
from jaxpar.plan.product import Settings
from jaxpar.plan.wire import device_wire
from jaxpar.step import histories
from jaxpar.train.leaves import flat

DELAYED = "precision=fp8_delayed"
MICROBATCHES = 4
MODEL = variant(SMALL["gpt"], layers=4, width=16, heads=4, hidden=32)
TINY = variant(SMALL["mlp"], layers=1, width=16, hidden=16, activation="gelu_tanh")


def remembering(model: Layer, *x) -> Layer:
    return histories.remembering(model, family.pick("policies", "fp8_delayed")(), jax.ShapeDtypeStruct(*x))


def recorded(model: Layer) -> dict[str, set[str]]:
    """By the name of each weight that has histories, of which operands."""
    found = {}
    for name in flat(jax.eval_shape(lambda: model.init(jax.random.key(0)))[1]):
        if name.endswith("/amax"):
            *above, role, _ = (word for word in name.split("/") if word not in ("precision", "backward"))
            found.setdefault("/".join(above), set()).add(role)
    return found


ALL, OWN = {"activation", "weight", "gradient"}, {"weight", "gradient"}


def test_each_operand_of_a_product_has_a_history():
    gpt = family.pick("models", "gpt")(vocab=61, context=8, layers=2, width=16, heads=4)
    same, model = jax.random.key(3), remembering(gpt, (4, 8), jnp.int32)
    inside = "blocks/attention.attention."
    assert recorded(model) == {
        f"{inside}query.weight": ALL,
        f"{inside}key.weight": OWN,  # they share x with the query
        f"{inside}value.weight": OWN,
        f"{inside}out.weight": ALL,
        "blocks/mlp.mlp.up.weight": ALL,
        "blocks/mlp.mlp.down.weight": ALL,
        "head/table": ALL,  # the token table, as the head reads it
    }
    assert_equal(model.init(same)[0], gpt.init(same)[0], tolerance=0)
    assert jax.tree.structure(model.init(same)[1]) == jax.tree.structure(model.dims[1])
    lengths = {leaf.shape for name, leaf in flat(model.init(same)[1]).items() if name.endswith("amax")}
    assert lengths == {(2, 1024), (1024,)}


def test_a_weight_that_is_used_otherwise_has_none():
    def twice(params, extra, x, ctx):
        y = ctx.dot(ctx.dot(x, params["twice"], "- -"), params["twice"].T, "- -")
        y = ctx.dot(y, 2 * params["doubled"], "- -") + params["also"].sum().astype(y.dtype)
        return ctx.dot(ctx.dot(y, params["also"], "- -"), params["turned"].T, "- -"), extra

    def init(key):
        names = ("also", "doubled", "turned", "twice")
        return {name: normal(one, (4, 4), 0.5) for name, one in zip(names, jax.random.split(key, 4), strict=True)}, {}

    odd = Layer(init, twice, (dict.fromkeys(("also", "doubled", "turned", "twice"), "- -"), {}))
    inner = chain({"inner": stack(dense.dense(4, 4, "- -"), 2)})
    gru = family.pick("models", "gru")(vocab=61, layers=1, width=4)
    assert recorded(remembering(odd, (2, 4), jnp.float32)) == {"turned": ALL}
    assert set(recorded(remembering(chain({"odd": inner}), (2, 4), jnp.float32))) == {"odd/inner/weight"}
    in_loops = [name for name in recorded(remembering(gru, (2, 4), jnp.int32)) if "hidden" in name]
    assert in_loops == [], "in the loop over time"


def test_a_use_moves_the_histories_on_and_evaluation_does_not():
    layer = remembering(dense.dense(3, 2, "embed mlp"), (4, 3), jnp.float32)
    params, extra = layer.init(jax.random.key(0))
    x, dy = jax.random.normal(jax.random.key(1), (4, 3)), jnp.full((4, 2), 0.25, jnp.bfloat16)

    def apply(train):
        ctx = context(Settings(SINGLE, family.pick("policies", "fp8_delayed")(), device_wire(), train=train))
        return lambda params, x, extra: layer.apply(params, extra, x, ctx)

    @jax.jit
    def backward(extra):
        _, back, _ = jax.vjp(lambda *given: apply(True)(*given), params, x, extra, has_aux=True)
        return back(dy)[2]["precision"]["backward"]["weight"]

    found = backward(extra)
    want = {"activation": x, "weight": params["weight"], "gradient": dy}
    for role, array in want.items():
        largest = jnp.abs(array.astype(jnp.bfloat16)).max().astype(jnp.float32)
        np.testing.assert_array_equal(found[role]["amax"], np.r_[largest, np.zeros(1023)], err_msg=role)
        assert found[role]["scale"] == 1, "the first use knows of none before"
    again = backward(extra | {"precision": {"backward": {"weight": found}}})
    assert float(again["activation"]["scale"]) == pytest.approx(float(found["activation"]["amax"][0]) / 448)
    assert float(again["gradient"]["scale"]) == pytest.approx(0.25 / 57344)
    _, after = jax.jit(apply(False))(params, x, extra)
    assert_equal(after, extra, tolerance=0)


@functools.cache
def one_device(model):
    return run(recipe_of(model, f"microbatches={MICROBATCHES},{DELAYED}"))


def check(model, plan):
    """Every microbatch moved every history on by one, in order: of weights to the bit, of the rest nearly so."""
    want, got = one_device(model), run(recipe_of(model, f"{plan},{DELAYED}"))
    before, mine, other = map(flat, (start(model, "fp8_delayed")[1], got.extra, want.extra))
    rings = [name for name in mine if name.endswith("amax")]
    assert len(rings) > 5
    for name in rings:
        new = np.r_["-1", mine[name][..., :1], mine[name][..., 1 - MICROBATCHES :]]
        old = np.roll(before[name], -MICROBATCHES, axis=-1)[..., 1 : 1025 - MICROBATCHES]
        np.testing.assert_array_equal(mine[name][..., 1 : 1025 - MICROBATCHES], old, err_msg=f"{plan}: {name}")
        wanted = np.r_["-1", other[name][..., :1], other[name][..., 1 - MICROBATCHES :]]
        near = {"weight": 0, "activation": 0.05, "gradient": 0.5}[name.split("/")[-2]]
        np.testing.assert_allclose(new, wanted, rtol=near, err_msg=f"{plan}: {name}")
    tolerance = family.pick("policies", "fp8_delayed")().tolerance
    assert_equal(got.gradients, want.gradients, tolerance)


def test_microbatches_move_the_histories_on_one_by_one():
    check(TINY, "data=2,microbatches=4")


PLANS = [
    f"{plan},microbatches=4"
    for plan in (
        "data=2,zero=1",
        "data=2,zero=2",
        "data=2,zero=3",
        "tensor=two_d:2x2",
        "tensor=three_d:2x2x2",
        "unroll=true",
        "remat=block,unroll=false",
        "remat=dots,unroll=false",
        "remat=binomial:2,unroll=false",
        "pipe=4,schedule=gpipe",
        "pipe=2,tensor=one_d:2,schedule=gpipe,storage=residual",
        "pipe=2,data=2,schedule=one_f_one_b,storage=residual",
        "pipe=2,schedule=eager_one_f_one_b",
        "pipe=2,chunks=2,schedule=interleaved,storage=residual",
        "pipe=2,data=2,schedule=zero_bubble_h1",
        "pipe=2,schedule=zero_bubble_h1,storage=residual",
        "pipe=2,schedule=zero_bubble_h2,storage=residual",
        "pipe=2,chunks=2,schedule=zero_bubble_v,storage=residual",
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_histories_under_every_plan(plan):
    check(MODEL, plan)


def test_state_of_the_precision_keeps_microbatches_in_order(monkeypatch):
    monkeypatch.setattr("jaxpar.step.checks.timetable", lambda order: SimpleNamespace(in_order=False))
    with pytest.raises(Refused, match="out of order, and the model mlp under precision=fp8_delayed has state"):
        built(recipe_of(TINY, DELAYED))


@pytest.mark.parametrize(
    "plan, fields, says",
    [
        ("tensor=one_d:2", {"hidden": 384}, ["model.hidden = 384: makes 384 .* Legal: 256 or 512; or at most 128"]),
        ("tensor=two_d:2x2", {"width": 160, "hidden": 640}, ["model.hidden = 640", "model.width = 160"]),
        ("tensor=two_d:2x2", {"width": 256, "hidden": 128}, []),
        ("data=2", {"width": 160, "hidden": 640}, []),
    ],
)
def test_devices_hold_whole_blocks(plan, fields, says):
    recipe = recipe_of(variant(TINY, **fields), f"{plan},precision=fp8_block")
    if not says:
        built(recipe)
        return
    with pytest.raises(Refused) as refused:
        built(recipe)
    told = str(refused.value)
    assert len(refused.value.problems) == len(says)
    for line in says:
        assert re.search(line, told), told


def test_a_policy_that_remembers_nothing_is_refused(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from jaxpar.policies.fp8_delayed import fp8_delayed\n"
        "def forgetful():\n"
        "    return fp8_delayed()._replace(remember=None)\n"
    )
    with pytest.raises(Refused, match=r"plan\.precision.*nothing that makes the next one"):
        built(recipe_of(SMALL["mlp"], f"precision={path}:forgetful"))
