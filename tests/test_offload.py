"""What rests on the host changes no number, does rest there, and leaves the memory of the device."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import CLASSES, SMALL, batch_of, built, recipe_of, variant
from jax.sharding import NamedSharding, PartitionSpec
from parity import assert_equal

from jaxpar.core import compat
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Model, Recipe
from jaxpar.core.refuse import Refused
from jaxpar.core.types import State
from jaxpar.optimizers.adamw import adamw
from jaxpar.optimizers.sgd import sgd
from jaxpar.plan import offload
from jaxpar.report import forecast, hostlink, memory, topology
from jaxpar.step.parts import assemble
from jaxpar.step.program import optimizer_places, program
from jaxpar.step.stream import descent, is_elementwise
from jaxpar.train import checkpoint

STEPS = 3
MODELS = {
    "gpt": variant(SMALL["gpt"], layers=3, kv_heads=2),
    "mlp": variant(SMALL["mlp"], layers=3, activation="gelu_tanh"),
    "gru": SMALL["gru"],
    "convnet": SMALL["convnet"],
}


def trained(recipe: Recipe):
    """Program, state and losses after a few steps."""
    _, made = built(recipe)
    state, losses = made.init(), []
    assert_placed(made, state)
    step = made.step.lower(made.shapes, made.batch).compile()
    for number in range(STEPS):
        state, metrics = step(state, made.place(batch_of(recipe, number)))
        losses.append(metrics["loss"])
    return made, state, np.asarray(jnp.stack(losses))


@functools.cache
def without(name: str, plan: str, optimizer: str):
    """The same with nothing on the host; blocks in a scan, as where parameters are."""
    return trained(recipe_of(MODELS[name], plan, optimizer=optimizer))


def kinds(state: State) -> dict[str, set[str]]:
    """In which memories the arrays of parameters and optimizer lie, single numbers aside."""
    trees = {"parameters": state.params, "optimizer": state.opt}
    return {
        name: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim} for name, tree in trees.items()
    }


def assert_placed(made, state: State) -> None:
    """Each leaf lies where the program says."""
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(made.shapes), strict=True):
        assert leaf.sharding.memory_kind == (like.sharding.memory_kind or "device")


def check(name: str, plan: str, chosen: str, optimizer: str = "adamw"):
    """Losses and state are those of a run with nothing on the host; each leaf lies where it should."""
    plan = plan if ",remat" in plan else f"{plan},unroll=false"
    base, want, losses = without(name, plan, optimizer)
    on_host = plan.replace(",unroll=false", "") if "parameters" in chosen else plan
    made, state, found = trained(recipe_of(MODELS[name], f"{on_host},offload={chosen}", optimizer=optimizer))
    assert_placed(made, state)
    for kind, lies in kinds(state).items():
        assert lies == {offload.HOST if kind in chosen else "device"}
    assert_equal(found, losses, tolerance=1e-6)
    for tree in ("params", "opt"):
        pair = (getattr(one, tree) for one in (state, want))
        assert_equal(*(jax.tree.map(np.asarray, leaf) for leaf in pair), tolerance=1e-6)
    return made, state, base, want


QUICK = [
    ("gpt", "data=2,tensor=one_d:2,microbatches=2", "parameters+optimizer", "adamw"),
    ("mlp", "data=4,zero=3", "parameters+optimizer", "sgd"),
    ("mlp", "data=2,tensor=one_d:2,zero=1", "optimizer", "adamw"),
    ("mlp", "pipe=2,data=2,microbatches=2", "parameters+optimizer", "sgd"),
    ("mlp", "data=2,remat=block", "activations", "adamw"),
]


@pytest.mark.parametrize(("name", "plan", "chosen", "optimizer"), QUICK)
def test_what_rests_on_the_host_changes_nothing(name, plan, chosen, optimizer):
    check(name, plan, chosen, optimizer)


SLOW = [
    *(
        ("gpt", plan, chosen, optimizer)
        for plan, optimizer in [
            ("tensor=two_d:2x4", "adamw"),
            ("tensor=three_d:2x2x2", "sgd"),
            ("data=4,zero=3,tensor=one_d:2", "adamw"),
            ("pipe=2,data=2,microbatches=4", "adamw"),
            ("pipe=2,chunks=2,microbatches=4,schedule=interleaved", "sgd"),
        ]
        for chosen in ("optimizer", "parameters", "parameters+optimizer")
    ),
    ("gpt", "data=2,zero=2,microbatches=2", "optimizer", "adamw"),
    ("gpt", "pipe=2,microbatches=2,storage=residual", "parameters+optimizer", "adamw"),
    ("gpt", "pipe=2,microbatches=4,schedule=zero_bubble_h1", "optimizer", "adamw"),
    ("gpt", "tensor=one_d:2,partition=auto", "optimizer", "adamw"),
    ("gpt", "data=2,tensor=two_d:2x2,remat=block", "activations", "adamw"),
    ("gpt", "data=2,microbatches=2,remat=names:query+up", "parameters+optimizer+activations", "adamw"),
    ("gpt", "data=4,zero=3,remat=block", "parameters+optimizer+activations", "sgd"),
    ("gpt", "pipe=2,data=2,microbatches=2,remat=block", "activations+optimizer", "adamw"),
    ("gru", "data=2,microbatches=2", "parameters+optimizer", "adamw"),
    ("gru", "data=2,remat=block", "activations", "adamw"),
    ("convnet", "data=2", "parameters+optimizer", "sgd"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "plan", "chosen", "optimizer"), SLOW)
def test_what_rests_on_the_host_changes_nothing_under_any_plan(name, plan, chosen, optimizer):
    check(name, plan, chosen, optimizer)


def test_checkpoints_do_not_know_what_rests_on_the_host(tmp_path):
    made, state, base, want = check("mlp", "data=2,tensor=one_d:2,zero=1", "optimizer")
    recipe = recipe_of(MODELS["mlp"], "data=2")
    for number, (writer, given, reader) in enumerate([(made, state, made), (made, state, base), (base, want, made)]):
        folder = tmp_path / str(number)
        checkpoint.save(folder, writer, given, {})
        found = checkpoint.restore(folder, reader, STEPS)
        assert_placed(reader, found)
        assert_equal(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, given), tolerance=0)
        after, _ = reader.step(found, reader.place(batch_of(recipe)))
        assert_placed(reader, after)


# ------------------------------------------------------------------------------------------------------ the update

MIXING = {
    "adafactor": optax.adafactor(0.1),
    "lamb": optax.lamb(0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "noisy": optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
}
LEAVES = {"stack": (3, 4, 5), "bias": (3, 5), "table": (6, 4), "single": ()}
DIMS = {"stack": "layers embed mlp", "bias": "layers mlp", "table": "vocab embed", "single": ""}


def rate(count):
    return 0.1 / (1 + count)


def each_by_itself(name: str) -> optax.GradientTransformation:
    """Optimizers that are elementwise, with state of several kinds."""
    decayed = {leaf: len(shape) > 1 for leaf, shape in LEAVES.items()}
    return {
        "adamw": lambda: adamw(rate, 0.1, decayed),
        "sgd": lambda: sgd(rate, 0.1, decayed),
        "lion": lambda: optax.lion(rate, mask=decayed),
        "masked": lambda: optax.masked(optax.adam(rate), decayed),
    }[name]()


def drawn(seed: int) -> dict:
    keys = jax.random.split(jax.random.key(seed), len(LEAVES))
    return {name: jax.random.normal(key, LEAVES[name]) for key, name in zip(keys, LEAVES, strict=True)}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "masked"])
def test_an_optimizer_that_mixes_nothing_is_known_by_its_trace(name):
    assert is_elementwise(each_by_itself(name), drawn(0))


@pytest.mark.parametrize("name", MIXING)
def test_an_optimizer_that_mixes_entries_is_known_by_its_trace(name):
    assert not is_elementwise(MIXING[name], drawn(0))


@pytest.mark.parametrize("fine", [True, False])
@pytest.mark.parametrize("name", ["adamw", "masked", "lamb"])
def test_an_update_from_the_host_is_the_update(name, fine):
    links = (optax.clip_by_global_norm(1.0), MIXING.get(name) or each_by_itself(name))
    whole, params = optax.chain(*links), drawn(0)
    state = whole.init(params)
    mesh = compat.make_mesh((1,), ("data",), jax.devices()[:1])
    words = optimizer_places(whole, state, params, DIMS, "")
    words = State("", DIMS, {}, words, {})
    specs = jax.tree.map(lambda _: PartitionSpec(), words)
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), (params, state))
    shardings = tuple(offload.resting(*pair) for pair in zip(shardings, (params, state), strict=True))
    update = jax.jit(descent(links, mesh, words, specs), static_argnums=3, out_shardings=shardings)
    held = jax.device_put((params, state), shardings)
    for seed in (1, 2):
        slopes = drawn(seed)
        moves, new = whole.update(slopes, state, params)
        if fine:
            params, state = optax.apply_updates(params, moves), new
        held = update(slopes, *held, fine)
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(held) if leaf.ndim} == {offload.HOST}
        assert_equal(held, (params, state), tolerance=1e-6)


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("offload=optimiser", "no `optimiser` to offload.*did you mean `optimizer`"),
        ("offload=optimizer+optimizer", r"names something twice. Legal: optimizer\."),
        ("offload=host", "there is no `host` to offload.*Legal: activations, none, optimizer, parameters"),
        ("offload=none+optimizer", "no `none` to offload"),
        ("offload=parameters,unroll=true", "plan.unroll = true.*outside of a scan"),
        ("offload=parameters,regather=false", "plan.regather = false.*not kept for the backward pass"),
        ("data=2,zero=1,offload=parameters+optimizer", "every device holds.*zero=3 or zero=0; or offload=optim"),
        ("data=2,zero=3,regather=false,offload=parameters", "plan.regather = false.*not kept for the backward pass"),
        ("partition=auto,offload=parameters", "XLA would decide when parameters"),
        ("remat=sqrt,offload=parameters", "remat=sqrt cuts stacks"),
        ("offload=activations", "does not say which few.*remat=block, or remat=names"),
        ("remat=dots,offload=activations+optimizer", "does not say which few.*or offload=optimizer"),
        ("remat=block,partition=auto,offload=activations", "XLA would decide where activations"),
        ("pipe=2,microbatches=2,storage=residual,remat=block,offload=activations", "lies in pools on the device"),
        ("pipe=2,microbatches=2,schedule=zero_bubble_h1,offload=parameters", "the two gradients of a block apart"),
    ],
)  # fmt: skip
def test_what_cannot_rest_on_the_host_is_refused(plan, says):
    with pytest.raises(Refused, match=says):
        built(recipe_of(SMALL["gpt"], plan))


def test_the_order_of_names_does_not_matter():
    assert offload.parse("optimizer+parameters") == offload.parse("parameters+optimizer") == {"parameters", "optimizer"}
    assert offload.parse("none") == frozenset()


# ------------------------------------------------------------------------------------------------------ the bill


def bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if leaf.ndim)


def test_what_rests_on_the_host_is_a_category_of_its_own():
    plan = "data=2,microbatches=2"
    parts, made = built(recipe_of(MODELS["gpt"], f"{plan},offload=parameters+optimizer"))
    plain, _ = built(recipe_of(MODELS["gpt"], f"{plan},unroll=false"))
    before, after = memory.predicted(plain), memory.predicted(parts)
    state = made.shapes
    assert after["host"] == bytes_of(state.params) + bytes_of(state.opt) and "host" not in before
    assert after["parameters"] == 0 and after["optimizer"] == before["optimizer"] - bytes_of(state.opt) == 2 * 4
    assert before["total"] - 1.1 * after["host"] < after["total"] < before["total"] - 0.9 * bytes_of(state.opt)


def test_what_goes_over_the_link_is_on_the_bill():
    recipe = recipe_of(MODELS["gpt"], "data=2,microbatches=2,remat=block,offload=parameters+activations")
    parts, made = built(recipe)
    params = made.shapes.params
    stacks = sum(bytes_of(tree) for tree in (params["blocks"],))
    rows = bytes_of(params) - stacks
    resting = memory.held(parts)["host"]
    found = hostlink.moved(parts, resting)
    layers, width = MODELS["gpt"].layers, MODELS["gpt"].width
    inputs = layers * (recipe.batch // 4) * batch_of(recipe)[0].shape[1] * width * 4  # of one microbatch and device
    assert resting == bytes_of(params) == found.state
    assert found.to_host == 2 * inputs + resting
    last = bytes_of(params["blocks"]["mlp"]["mlp"]["down"]["bias"])  # is not needed to go back
    assert found.to_device == 2 * (2 * stacks - last + inputs) + rows + resting  # in each microbatch forward and back
    assert hostlink.lent(parts) == inputs
    assert hostlink.seconds(found, 1e9) == found.to_device / 1e9
    assert hostlink.nvme_seconds(found, 1e9) == 2 * resting / 1e9
    nothing, _ = built(recipe_of(MODELS["gpt"], "data=2"))
    assert hostlink.moved(nothing, 0) == (0, 0, 0)


def test_a_forecast_tells_of_the_link_and_of_disks():
    recipe = recipe_of(MODELS["mlp"], "offload=optimizer")
    parts, _ = built(recipe)
    resting = memory.held(parts)["host"]
    found = forecast.forecast(recipe.plan, parts, topology.parse("v5e:1x1"))
    assert found["host"]["seconds"] == resting / 16e9 and found["memory"]["predicted"]["host"] == resting
    said = forecast.text(found)
    assert f"link to the host  {resting:,} bytes to the device, {resting:,} back" in said
    assert "arithmetic alone, no plan uses disks" in said and "bytes on the host" in said
    assert "nobody states how fast" in forecast.text(forecast.forecast(recipe.plan, parts))
    plain = recipe_of(MODELS["mlp"], "data=1")
    assert forecast.forecast(plain.plan, built(plain)[0])["host"] is None


# ------------------------------------------------------------------------------------------------------ ahead of time

LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


AHEAD = Model("gpt", layers=16, width=128, heads=4, hidden=512, context=64)
DEEP, MANY = variant(AHEAD, layers=32), 512  # what blocks are given is then as much as all of the state


@functools.cache
def stated(chosen: str, model: Model = AHEAD, batch: int = 256):
    """Shapes of the state, and XLA's statistics of a step, for eight TPUs that are not there."""
    plan = Plan.parse(f"data=8,remat=block,offload={chosen}")
    recipe = Recipe(model=model, plan=plan, batch=batch, steps=50, warmup=5)
    tokens = jax.ShapeDtypeStruct((batch, model.context), jnp.int32)
    made = program(assemble(recipe, tokens, tokens, CLASSES), topology.devices(topology.parse("v5e:2x4")))
    return made.shapes, made.step.lower(made.shapes, made.batch).compile().memory_analysis()


@LIBTPU
@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["optimizer", "parameters", "parameters+optimizer"])
def test_on_a_tpu_state_on_the_host_leaves_the_device(chosen):
    (shapes, before), (_, after) = stated("none"), stated(chosen)
    trees = {"parameters": shapes.params, "optimizer": shapes.opt}
    resting = sum(bytes_of(tree) for kind, tree in trees.items() if kind in chosen)
    saved = before.argument_size_in_bytes - after.argument_size_in_bytes
    assert saved == pytest.approx(resting, rel=0.02)  # there it is padded to whole tiles
    assert after.host_argument_size_in_bytes == after.host_alias_size_in_bytes == pytest.approx(resting, rel=0.02)
    assert after.host_temp_size_in_bytes == 0
    layer = resting / AHEAD.layers
    assert after.temp_size_in_bytes < before.temp_size_in_bytes + 4 * layer, "it must not all be there at once"


@LIBTPU
@pytest.mark.slow
def test_on_a_tpu_activations_on_the_host_leave_the_device():
    (_, before), (_, after) = (stated(chosen, DEEP, MANY) for chosen in ("none", "activations"))
    inputs = DEEP.layers * MANY // 8 * DEEP.context * DEEP.width * 4
    assert before.temp_size_in_bytes - after.temp_size_in_bytes > 0.6 * inputs
    assert after.host_temp_size_in_bytes == pytest.approx(inputs, rel=0.05)
    assert after.argument_size_in_bytes == before.argument_size_in_bytes
