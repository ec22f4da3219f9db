"""A loss of one's own over eight devices: the numbers of one device, in parts that are really parts."""

import functools
import inspect
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity import assert_equal

import jaxpar
from jaxpar.core.refuse import Refused
from jaxpar.step.parallelize import parallelize

BATCH, CLASSES = 16, 10


class Net(nn.Module):
    """Normalization, attention and an MLP; no key bias, whose gradient is 0 in truth and rounding in practice."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32)(x)
        x = x + nn.SelfAttention(4, use_bias=False)(nn.LayerNorm()(x))
        return nn.Dense(CLASSES)(nn.gelu(nn.Dense(128)(x)).mean(1))


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def linen():
    net = Net()
    params = net.init(jax.random.key(0), jnp.zeros((1, 4, 8)))
    return lambda params, batch: cross_entropy(net.apply(params, batch["x"]), batch["y"]), params


def plain():
    """A tree of a tuple and a dict, and a table that is gathered from."""
    keys = jax.random.split(jax.random.key(1), 3)
    params = ({"table": jax.random.normal(keys[0], (64, 32))}, 0.2 * jax.random.normal(keys[1], (8, 32)), jnp.zeros(32))
    params = (*params, 0.1 * jax.random.normal(keys[2], (32, CLASSES)))

    def loss(params, batch):
        tables, weight, bias, out = params
        hidden = jnp.tanh(batch["x"] @ weight + bias).mean(1) * tables["table"][batch["y"] % 64]
        return cross_entropy(hidden @ out, batch["y"])

    return loss, params


def odd():
    """Sizes that nothing divides, beside some that 2 or 4 does."""
    sizes = [8, 37, 44, 2 * 53, CLASSES]
    keys = jax.random.split(jax.random.key(2), len(sizes))
    shapes = zip(keys, sizes, sizes[1:], strict=False)
    params = {
        f"layer_{n}": {"w": i**-0.5 * jax.random.normal(k, (i, o)), "scale": jnp.ones(())}
        for n, (k, i, o) in enumerate(shapes)
    }

    def loss(params, batch):
        x = batch["x"].mean(1)
        for layer in params.values():
            x = jnp.tanh(x @ layer["w"] * layer["scale"])
        return cross_entropy(x, batch["y"])

    return loss, params


CASES = {"linen": linen, "plain": plain, "odd": odd}
PLANS = ("data=8", "tensor=fsdp:8", "data=2,tensor=fsdp:4", "data=2,tensor=fsdp:2,microbatches=2")


def batch_of(step=0, count=BATCH):
    rng = np.random.default_rng(step)
    return {"x": rng.normal(size=(count, 4, 8)).astype(np.float32), "y": rng.integers(0, CLASSES, count)}


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, eps=1e-4))


@functools.cache
def on_one_device(case):
    """First gradients, losses of five updates, and the parameters after them."""
    loss, params = CASES[case]()
    update, gradients, losses = optimizer(), jax.jit(jax.value_and_grad(loss)), []
    opt, first = update.init(params), gradients(params, batch_of())[1]
    for step in range(5):
        value, found = gradients(params, batch_of(step))
        updates, opt = update.update(found, opt, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    return first, losses, params


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_one_device(case, plan):
    loss, params = CASES[case]()
    want, want_losses, want_params = on_one_device(case)
    run = parallelize(loss, params, plan, optimizer())
    state = run.init(params)
    value, found = run.value_and_grad(state.params, batch_of())
    assert abs(float(value) - want_losses[0]) <= 2e-6 * abs(want_losses[0])
    assert_equal(found, want, tolerance=2e-6)
    losses = []
    for step in range(5):
        state, value = run.step(state, batch_of(step))
        losses.append(float(value))
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    assert_equal(state.params, want_params, tolerance=2e-5)
    assert int(state.step) == 5


def test_parts_are_parts():
    """Parameters, gradients and both moments rest in quarters."""
    loss, params = linen()
    run = parallelize(loss, params, "data=2,tensor=fsdp:4")
    state = run.init(params)
    _, found = run.value_and_grad(state.params, batch_of())
    moments = [state.opt[0].mu, state.opt[0].nu]
    for tree in (state.params, found, *moments):
        kernel = tree["params"]["Dense_2"]["kernel"]
        assert kernel.shape == (32, 128) and kernel.addressable_shards[0].data.shape == (32, 32)
        assert tree["params"]["Dense_2"]["bias"].sharding.is_fully_replicated  # small
    held = [leaf for leaf in jax.tree.leaves(state) if leaf.size >= 1024]
    assert held and all(leaf.addressable_shards[0].data.nbytes * 4 == leaf.nbytes for leaf in held)
    assert dict(run.mesh.shape) == {"data": 2, "shard": 4}


def test_a_leaf_is_split_where_it_divides():
    run = parallelize(*odd(), "tensor=fsdp:4")
    specs = jax.tree.map(lambda place: tuple(place.spec), run.shardings.params)
    assert specs["layer_0"]["w"] == () and specs["layer_0"]["scale"] == ()  # 8 x 37: small
    assert specs["layer_1"]["w"] == (None, "shard")  # 37 x 44
    assert specs["layer_2"]["w"] == ("shard",)  # 44 x 106
    assert specs["layer_3"]["w"] == ()  # 106 x 10: 4 divides neither


def test_your_parameters_stay_yours():
    """The state is donated, but it is a copy: also where nothing has to move."""
    loss, params = plain()
    for plan in ("data=1", "tensor=fsdp:8"):
        run = parallelize(loss, params, plan)
        there = jax.device_put(params, jax.devices()[3])  # bound to one device, as a restored checkpoint may be
        run.value_and_grad(there, batch_of())
        state = run.init(there if plan != "data=1" else params)
        after, _ = run.step(state, batch_of())
        assert np.isfinite(np.asarray(params[1])).all()
        assert state.params[1].is_deleted() and not after.params[1].is_deleted()


def test_parameters_are_made_where_they_live():
    loss, params = plain()
    shapes = jax.eval_shape(lambda: params)
    run = parallelize(loss, shapes, "tensor=fsdp:8")
    state = run.init(lambda: plain()[1])
    assert state.params[0]["table"].addressable_shards[0].data.shape == (8, 32)
    assert_equal(state.params, params, tolerance=1e-6)


def test_a_factored_optimizer_and_a_random_key():
    loss, params = plain()

    def noisy(params, batch):
        keep = jax.random.bernoulli(batch["key"], 0.5, batch["x"].shape)
        return loss(params, {"x": batch["x"] * keep, "y": batch["y"]})

    run = parallelize(noisy, params, "data=2,tensor=fsdp:4", optax.adafactor(1e-2, min_dim_size_to_factor=8))
    batch = batch_of() | {"key": jax.random.key(3)}
    _, value = run.step(run.init(params), batch)
    assert float(value) == pytest.approx(float(noisy(params, batch)), rel=2e-6)
    parts = parallelize(noisy, params, "data=2,microbatches=4")
    assert np.isfinite(float(parts.value_and_grad(params, batch)[0]))


@pytest.mark.parametrize(
    "plan, fields",
    [
        ("data=2,tensor=one_d:4", ["plan.tensor"]),
        ("tensor=two_d:2x4,zero=3,pipe=2", ["plan.pipe", "plan.zero", "plan.tensor"]),
        ("precision=bf16,regather=false", ["plan.regather", "plan.precision"]),
        ("data=0,microbatches=0", ["plan.data", "plan.microbatches"]),
        ("tensor=fdsp:4", ["plan.tensor"]),
        ("partition=atuo", ["plan.partition"]),
    ],
)
def test_what_means_nothing_here_is_refused_by_name(plan, fields):
    loss, params = plain()
    with pytest.raises(Refused) as refused:
        parallelize(loss, params, plan)
    assert [problem.field for problem in refused.value.problems] == fields
    assert all(problem.legal for problem in refused.value.problems)


def test_a_batch_that_does_not_divide_is_refused():
    loss, params = plain()
    run = parallelize(loss, params, "data=2,tensor=fsdp:2,microbatches=2")
    with pytest.raises(Refused) as refused:
        run.shard(batch_of(count=12))
    first, second = refused.value.problems
    assert (first.field, second.field) == ("batch['x']", "batch['y']")
    assert first.legal == "8 or 16" and "data = 2 x shard = 2 x microbatches = 2" in first.rule


def test_what_is_no_loss_says_so():
    loss, params = plain()
    run = parallelize(lambda params, batch: batch["x"] @ params[1], params, "data=8")
    with pytest.raises(ValueError, match=r"must return one number.*jnp.mean"):
        run.value_and_grad(params, batch_of())
    with pytest.raises(Refused, match="has no arrays"):
        parallelize(loss, {}, "data=8")


def test_the_example_of_the_docstring_runs():
    body = inspect.getdoc(jaxpar.parallelize).split("\n\n", 1)[1]
    example = body[: body.index("\n\nWith `fsdp:F`")]
    names = {}
    exec(compile(textwrap.dedent(example), "docstring", "exec"), names)
    assert int(names["state"].step) == 10 and float(names["loss"]) < 0.5


@pytest.mark.parametrize(
    "params, plan, optimizer, told",
    [
        (np.ones(4, np.float32), 7, None, "plan = 7: must be a Plan or its text"),
        (np.ones(4, np.float32), "data=1", "adamw", "optimizer = 'adamw': must be an optax transformation"),
        (
            {"n": np.ones(4, np.int32)},
            "data=1",
            None,
            r"params\['n'\] = \(4,\): must be an array of numbers with a gradient",
        ),
        ({"n": "text"}, "data=1", None, r"params\['n'\] = text: must be an array"),
    ],
)
def test_what_is_no_plan_no_optimizer_or_no_parameter_is_refused(params, plan, optimizer, told):
    with pytest.raises(Refused, match=told):
        jaxpar.parallelize(lambda params, batch: 0.0, params, plan, optimizer)


def test_a_tree_may_be_callable_as_modules_are():
    @jax.tree_util.register_pytree_node_class
    class Module(tuple):
        def tree_flatten(self):
            return tuple(self), None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls(leaves)

        def __call__(self, x):
            return x @ self[0]

    run = jaxpar.parallelize(lambda module, x: module(x).mean(), Module([jnp.ones((4, 4))]), "data=2")
    state, loss = run.step(run.init(Module([jnp.ones((4, 4))])), jnp.ones((2, 4)))
    assert float(loss) == 4.0 and isinstance(state.params, Module)
