"""Networks for images: published sizes, one device or many, pipelines, what they refuse; and their parts, as flax's."""

import math
import re
from dataclasses import replace
from functools import cache

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import AS_USERS_DO, batch_of, built, losses, recipe_of, reference, run, start
from laid_out import laid_out, pull
from networks import NETWORKS
from parity import assert_equal

from jaxpar.core import family
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Data, Model, Recipe
from jaxpar.core.refuse import Refused
from jaxpar.layers.conv import conv, turns, up_conv
from jaxpar.layers.pool import average_pool, global_average, max_pool
from jaxpar.plan.wire import cost_of
from jaxpar.report import account, bill, compiled, flops
from jaxpar.report.memory import predicted
from jaxpar.step.parts import assemble
from jaxpar.train.ahead import speed_of

LARGE, SMALL = (224, 224, 3), (32, 32, 3)
PUBLISHED = [  # where each count is from: the docstring of the model
    ("lenet", (32, 32, 1), 10, {}, 61_706),
    ("resnet", SMALL, 10, {}, 269_722),
    ("resnet", LARGE, 1000, {"layers": 18}, 11_689_512),
    ("resnet", LARGE, 1000, {"layers": 34}, 21_797_672),
    ("resnet", LARGE, 1000, {"layers": 50}, 25_557_032),
    ("resnet", LARGE, 1000, {"layers": 101}, 44_549_160),
    ("vgg", LARGE, 1000, {"layers": 11}, 132_863_336),
    ("vgg", LARGE, 1000, {"layers": 13}, 133_047_848),
    ("vgg", LARGE, 1000, {"layers": 16}, 138_357_544),
    ("vgg", LARGE, 1000, {"layers": 19}, 143_667_240),
    ("alexnet", LARGE, 1000, {}, 61_100_840),
    ("googlenet", LARGE, 1000, {}, 6_998_552),
    ("unet", (572, 572, 3), 1, {}, 31_037_633),
]
PLANS = (
    "data=8",
    "data=4,zero=3",
    "tensor=one_d:2",
    "tensor=sequence:2",
    "tensor=two_d:2x2",
    "tensor=two_half_d:2x2x2",
    "tensor=three_d:2x2x2",
    "tensor=fsdp:8",
)
PIPES = (
    "pipe=2,microbatches=2",
    "pipe=2,microbatches=4,storage=residual,tensor=two_d:2x2",
    "pipe=2,microbatches=2,schedule=zero_bubble_h1,data=2",
)
# a largest of a window is not smooth: rounding may decide which entry it is, and with it where its gradient goes
TOLERANCE = {"googlenet": 1e-4, "unet": 2e-5}


def made_of(name, example, vocab, **fields):
    """The model, and the shapes of its parameters."""
    model = family.pick("models", name)(example=example, vocab=vocab, **fields)
    return model, jax.eval_shape(lambda: model.init(jax.random.key(0)))[0]


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# --- sizes


@pytest.mark.parametrize(("name", "example", "vocab", "fields", "parameters"), PUBLISHED)
def test_models_have_as_many_parameters_as_published(name, example, vocab, fields, parameters):
    assert count(made_of(name, example, vocab, **fields)[1]) == parameters


@pytest.mark.parametrize(("layers", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_resnets_of_small_images_are_those_of_table_6(layers, millions):
    found = count(made_of("resnet", SMALL, 10, layers=layers)[1])
    assert abs(found / 1e6 - millions) <= (0.05 if millions > 1 else 0.006)


def test_fifty_layers_are_of_the_form_that_the_image_asks_for():
    small, large = (made_of("resnet", example, 10, layers=50)[1] for example in (SMALL, LARGE))
    assert count(small) < 1e6 < count(large)
    assert set(small) - {"stem", "head", "mean"} == {"blocks_1", "change_2", "blocks_2", "change_3", "blocks_3"}


def test_blocks_of_equal_shapes_are_stacks():
    model, _ = made_of("resnet", SMALL, 10, layers=20)
    assert {part.name: part.layer.blocks for part in model.parts if part.layer.blocks} == {
        "blocks_1": 3,
        "blocks_2": 2,
        "blocks_3": 2,
    }


def test_products_in_a_row_go_up_and_down_in_turn():
    assert turns(4) == ["- channels", "channels embed", "embed channels", "channels embed"]
    assert turns(3) == ["- embed", "embed channels", "channels embed"]


@pytest.mark.parametrize(
    ("fields", "example", "vocab", "logits"),
    [
        ({"name": "unet", "layers": 2, "width": 2}, (12, 20, 3), 5, (2, 12, 20, 5)),
        ({"name": "unet", "layers": 2, "width": 2}, (7, 9, 11, 1), 4, (2, 7, 9, 11, 4)),  # nothing divides
        ({"name": "resnet", "layers": 50, "width": 2}, (64, 64, 3), 5, (2, 5)),
        ({"name": "resnet", "layers": 14}, (8, 9, 1), 5, (2, 5)),
        ({"name": "lenet"}, (28, 28, 1), 10, (2, 10)),
        ({"name": "vgg", "width": 2, "hidden": 4}, (96, 64, 3), 5, (2, 5)),
        ({"name": "googlenet", "width": 8}, (33, 47, 3), 5, (2, 5)),
    ],
)
def test_what_comes_out_has_the_shape_of_the_labels(fields, example, vocab, logits):
    model, params = made_of(example=example, vocab=vocab, **fields)
    dims = " ".join("-" * (len(example) + 1)), " ".join("-" * len(logits))
    apply = laid_out(model, "data=1", {"batch": 2}, dims, train=False)
    extra = jax.eval_shape(lambda: model.init(jax.random.key(0)))[1]
    x = jax.ShapeDtypeStruct((2, *example), jnp.float32)
    assert jax.eval_shape(lambda *args: apply(*args)[0], params, extra, x).shape == logits


# --- what they refuse


@pytest.mark.parametrize(
    ("fields", "example", "field", "words"),
    [
        ({"name": "resnet", "layers": 21}, SMALL, "model.layers", "6 n \\+ 2"),
        ({"name": "resnet", "layers": 18}, (16, 16, 3), "model.name", "halves height and width 5 times"),
        ({"name": "resnet", "layers": 20}, (3, 3, 3), "model.name", "too few pixels"),
        ({"name": "vgg", "layers": 12}, SMALL, "model.layers", "11, 13, 16 or 19"),
        ({"name": "vgg"}, (8, 8, 1), "model.name", "8 x 8 x 1"),
        ({"name": "alexnet"}, SMALL, "model.name", "63 pixels"),
        ({"name": "googlenet"}, (16, 40, 3), "model.name", "32 pixels"),
        ({"name": "googlenet", "width": 12}, SMALL, "model.width", "8 or 16"),
        ({"name": "lenet", "width": 8}, SMALL, "model.width", "multiple of 3"),
        ({"name": "unet", "layers": 4}, (8, 8, 1), "model.layers", "1 to 3"),
        ({"name": "unet"}, (128,), "model.name", "height x width x channels"),
        ({"name": "resnet"}, (128,), "model.name", "height x width x channels"),
    ],
)
def test_what_cannot_be_is_refused(fields, example, field, words):
    with pytest.raises(Refused, match=words) as refused:
        made_of(example=example, vocab=10, **fields)
    assert [problem.field for problem in refused.value.problems] == [field]


def prepared(model, images, labels, plan=""):
    """A recipe's parts for batches of these shapes."""
    shapes = [jax.ShapeDtypeStruct(images, jnp.float32), jax.ShapeDtypeStruct(labels, jnp.int32)]
    return assemble(Recipe(model=model, data=Data("digits"), plan=Plan.parse(plan), batch=images[0]), *shapes, 10)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(Refused, match=r"labels of shape \[\], .* a class for each of \[8, 8\]"):
        prepared(NETWORKS["unet"], (4, 8, 8, 1), (4,))
    with pytest.raises(Refused, match=r"labels of shape \[8, 8\], .* a class for each of \[\]"):
        prepared(NETWORKS["resnet"], (4, 8, 8, 1), (4, 8, 8))


def test_a_layer_that_does_not_split_is_told_by_the_field_that_makes_it():
    with pytest.raises(Refused) as refused:
        prepared(Model("resnet", layers=8, width=12), (16, 8, 8, 1), (16,), "tensor=one_d:8")
    assert {problem.field for problem in refused.value.problems} == {"model.width"}
    assert re.search("width = 12: must split into 8 parts, .*8 or 16", str(refused.value))
    with pytest.raises(Refused, match=r"width = 24: makes a layer of 64 features, .* into 3 parts"):
        prepared(Model("lenet", width=24), (6, 8, 8, 1), (6,), "tensor=two_d:1x3")


def test_examples_are_counted_where_each_pixel_has_a_label():
    assert speed_of((6, 8, 8), 1.0, None)(2.0) == {"examples_per_second": 3.0}
    assert speed_of((6, 8), 1.0, None)(2.0) == {"tokens_per_second": 24.0}


# --- parts, as flax has them


def pulled(layer, params, x, dims, plan="data=1"):
    """What a layer gives for the batch x, and its gradients by both, where dy is x's own numbers."""
    apply = laid_out(layer, plan, {"batch": len(x)}, dims)
    y = jax.eval_shape(lambda: apply(params, {}, x)[0])
    dy = np.random.default_rng(3).normal(size=y.shape).astype(np.float32)
    found = pull(apply, params, {}, jnp.asarray(x), dy)
    return found.y, found.gradients


def by_flax(module, params, x):
    """The same of a module of flax."""
    y, back = jax.vjp(lambda params, x: module.apply({"params": params}, x), params, jnp.asarray(x))
    return y, back(jnp.asarray(np.random.default_rng(3).normal(size=y.shape).astype(np.float32)))


@pytest.mark.parametrize(
    ("window", "strides", "padding", "space"),
    [(3, 2, 1, 2), (7, 2, 3, 2), (3, 1, "SAME", 2), (4, 1, "VALID", 2), (1, 2, 0, 2), (3, 1, "SAME", 3), (3, 2, 1, 3)],
)
def test_a_convolution_is_that_of_flax(window, strides, padding, space):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *(6, 5, 4)[:space], 3)).astype(np.float32)
    kernel = rng.normal(size=(*(window,) * space, 3, 4)).astype(np.float32)
    layer = conv(3, 4, "embed channels", window=window, strides=strides, padding=padding, space=space)
    rows = "batch depth height width" if space == 3 else "batch height width"
    got = pulled(layer, {"kernel": kernel}, x, (f"{rows} embed", f"{rows} channels"))
    module = nn.Conv(4, (window,) * space, strides, padding=padding, use_bias=False)
    assert_equal(got, by_flax(module, {"kernel": kernel}, x), tolerance=2e-6)


@pytest.mark.parametrize(("space", "plan"), [(2, "data=1"), (3, "tensor=two_d:2x2"), (2, "tensor=three_d:1x2x2")])
def test_an_up_convolution_is_a_transposed_convolution(space, plan):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, *(3, 5, 2)[:space], 8)).astype(np.float32)
    params = {"weight": rng.normal(size=(8, 4 * 2**space)), "bias": rng.normal(size=4)}
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    rows = "batch depth height width" if space == 3 else "batch height width"
    y, (by_params, by_x) = pulled(up_conv(8, 4, "embed embed", space=space), params, x, (f"{rows} embed",) * 2, plan)

    def kernel(weight):  # [in, out * 2^space] as [*space, in, out]
        return np.moveaxis(np.asarray(weight).reshape(8, 4, *(2,) * space), (0, 1), (-2, -1))

    module = nn.ConvTranspose(4, (2,) * space, (2,) * space, padding="VALID")
    flipped = np.flip(kernel(params["weight"]), range(space))  # flax correlates
    want, (want_params, want_x) = by_flax(module, {"kernel": flipped, "bias": params["bias"]}, x)
    got = {"kernel": np.flip(kernel(by_params["weight"]), range(space)), "bias": by_params["bias"]}
    assert_equal((y, got, by_x), (want, want_params, want_x), tolerance=2e-6)


@pytest.mark.parametrize(
    ("layer", "function"),
    [
        (max_pool(3, 2, 1), lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))),
        (max_pool(3, 2, "SAME"), lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME")),
        (max_pool(2), lambda x: nn.max_pool(x, (2, 2), (2, 2))),
        (average_pool(2), lambda x: nn.avg_pool(x, (2, 2), (2, 2))),
        (average_pool(3, 2), lambda x: nn.avg_pool(x, (3, 3), (2, 2))),
    ],
)
def test_pooling_is_that_of_flax(layer, function):
    x = np.random.default_rng(0).normal(size=(4, 7, 6, 4)).astype(np.float32)
    want, back = jax.vjp(function, jnp.asarray(x))
    dy = np.random.default_rng(3).normal(size=want.shape).astype(np.float32)
    got, (_, by_x) = pulled(layer, {}, x, ("batch height width embed",) * 2, "tensor=two_d:2x2")
    assert_equal((got, by_x), (want, back(dy)[0]), tolerance=2e-6)


def test_the_mean_of_a_map_is_that_of_numpy():
    x = np.random.default_rng(0).normal(size=(4, 7, 6, 4)).astype(np.float32)
    got, _ = pulled(global_average(), {}, x, ("batch height width embed", "batch embed"), "tensor=two_d:2x2")
    assert_equal(got, x.mean((1, 2)), tolerance=2e-6)


def norm_of(params, y):
    """Batch norm of flax, in training."""
    scaled = {"scale": params["gain"], "bias": params["bias"]}
    zeros = {"mean": jnp.zeros(y.shape[-1]), "var": jnp.ones(y.shape[-1])}
    module = nn.BatchNorm(use_running_average=False, epsilon=1e-5)
    return module.apply({"params": scaled, "batch_stats": zeros}, y, mutable=["batch_stats"])[0]


def conv_of(params, x, strides=1, act=True):
    """A convolution of flax with a norm behind it and, mostly, an activation."""
    kernel = params["product"]["kernel"]
    *window, _, out = kernel.shape
    padding = [(side // 2, side // 2) for side in window]
    y = nn.Conv(out, window, strides, padding=padding, use_bias=False).apply({"params": {"kernel": kernel}}, x)
    y = norm_of(params["norm"], y)
    return nn.gelu(y) if act else y


def resnet_by_flax(params, x):
    """The small network of 8 layers."""

    def branch(own, x, strides):
        return conv_of(own["conv_2"], conv_of(own["conv_1"], x, strides), act=False)

    x = conv_of(params["stem"], x)
    for level in (1, 2, 3):
        if level == 1:
            own = jax.tree.map(lambda leaf: leaf[0], params["blocks_1"]["sum"]["branch"])
            x = nn.gelu(x + branch(own, x, 1))
        else:
            less = x[:, ::2, ::2]
            shortcut = jnp.pad(less, ((0, 0),) * 3 + ((0, x.shape[-1]),))
            x = nn.gelu(shortcut + branch(params[f"change_{level}"]["sum"]["branch"], x, 2))
    return nn.Dense(10).apply({"params": dense_of(params["head"])}, x.mean((1, 2)))


def unet_by_flax(params, x):
    """The small network of two levels."""

    def both(own, x):
        return conv_of(own["conv_2"], conv_of(own["conv_1"], x))

    skips = []
    for level in (1, 2):
        skips.append(both(params[f"down_{level}"], x))
        x = nn.max_pool(skips[-1], (2, 2), (2, 2))
    x = both(params["bottom"], x)
    for level in (2, 1):
        own = params[f"up_{level}"]
        weight, bias = own["up"]["weight"], own["up"]["bias"]
        kernel = jnp.moveaxis(weight.reshape(len(weight), len(bias), 2, 2), (0, 1), (-2, -1))
        up = nn.ConvTranspose(len(bias), (2, 2), (2, 2), padding="VALID")
        x = up.apply({"params": {"kernel": jnp.flip(kernel, (0, 1)), "bias": bias}}, x)
        x = both(own["body"], jnp.concatenate([skips.pop(), x], -1))
    return nn.Dense(10).apply({"params": dense_of(params["head"])}, x)


def dense_of(head):
    return {"kernel": head["weight"], "bias": head["bias"]}


@pytest.mark.parametrize(
    ("name", "network"), [("resnet", resnet_by_flax), pytest.param("unet", unet_by_flax, marks=pytest.mark.slow)]
)
def test_a_network_of_flax_gives_the_same_loss_and_gradients(name, network):
    model = NETWORKS[name]
    want, (params, _) = reference(model), start(model)
    images, labels = batch_of(recipe_of(model, "data=1"))

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(network(params, images), labels).mean()

    found, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(want.loss - found) <= 2e-6 * found
    assert_equal(want.gradients, gradients, tolerance=1e-5)


# --- plans and pipelines


@cache
def in_microbatches(model, count):
    """On one device."""
    return run(recipe_of(model, f"microbatches={count}"))


def check(name, plan, model=None, tolerance=None):
    """Loss, gradients and state equal those of one device, of the same microbatches."""
    model, tolerance = model or NETWORKS[name], tolerance or TOLERANCE.get(name, 5e-6)
    number = re.search(r"microbatches=(\d+)", plan)
    want = in_microbatches(model, int(number[1])) if number else reference(model)
    got = run(recipe_of(model, plan))
    assert abs(got.loss - want.loss) <= 2e-6 * abs(want.loss)
    assert_equal(got.gradients, want.gradients, tolerance=tolerance)
    assert_equal(got.extra, want.extra, tolerance=tolerance)
    return got


def test_a_network_on_many_devices_is_that_of_one():
    check("resnet", "tensor=three_d:2x2x2")


def test_skips_go_from_stage_to_stage(monkeypatch):
    """A message is a map and the skips, of other shapes at each boundary."""
    monkeypatch.setitem(harness.IMAGES, "unet", (4, 4, 1))
    model = Model("unet", layers=1, width=8, norm="layer", activation="gelu_tanh")
    check("unet", "pipe=2,tensor=two_d:2x1,storage=residual", model)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [*PLANS, *PIPES])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_under_every_plan_is_that_of_one_device(name, plan):
    check(name, plan)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tensor=two_d:2x2", "tensor=three_d:2x2x2", "pipe=2,microbatches=2"])
@pytest.mark.parametrize("layers", [18, 50])
def test_the_forms_of_imagenet_are_those_of_one_device(layers, plan, monkeypatch):
    monkeypatch.setitem(harness.IMAGES, "resnet", (64, 64, 1))
    check("resnet", plan, replace(NETWORKS["resnet"], layers=layers, width=4), 2e-5 if layers == 18 else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_learns_as_on_one_device(name):
    model, rate = NETWORKS[name], {"learning_rate": 1e-3}
    want, got = (losses(recipe_of(model, plan, **rate), 16)[0] for plan in ("data=1", "data=2,tensor=one_d:2"))
    np.testing.assert_allclose(got, want, rtol=1e-3)
    assert got[-4:].mean() < got[:4].mean()


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["data=2,tensor=two_d:2x2", "pipe=3,microbatches=2,data=2"])
def test_volumes_are_those_of_one_device(plan, monkeypatch):
    monkeypatch.setitem(harness.IMAGES, "unet", (4, 6, 5, 2))
    model = Model("unet", layers=1, width=6, norm="layer", activation="gelu_tanh")
    check("unet", plan, model)


# --- what is predicted of them


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["data=2,tensor=one_d:2", "tensor=two_d:2x2", "tensor=three_d:2x2x2", PIPES[0]])
@pytest.mark.parametrize("name", NETWORKS)
def test_bytes_sent_are_those_of_the_compiled_step(name, plan):
    parts, made = built(recipe_of(NETWORKS[name], plan))
    text = made.gradients.lower(made.shapes, made.batch).compile().as_text()
    counted, said = bill.counted_in(parts, text), cost_of(account.gradient_lines(parts)).sent
    assert not counted.unknown and counted.sent.keys() == said.keys()
    np.testing.assert_allclose([counted.sent[key] for key in said], list(said.values()), rtol=1e-9)


@pytest.mark.parametrize("name", ["resnet", "lenet", "alexnet"])
def test_one_device_executes_what_the_model_asks_for(name, monkeypatch):
    """Strides, and windows of whole maps, included; maps are no smaller than kernels."""
    monkeypatch.setitem(harness.IMAGES, "resnet", (16, 16, 1))
    parts, _ = built(recipe_of(NETWORKS[name], "data=1"))
    assert flops.executed(parts) == flops.of_model(parts) > 0


@pytest.mark.slow
def test_flops_without_padding_are_those_of_the_compiled_step(monkeypatch):
    monkeypatch.setitem(harness.IMAGES, "lenet", (32, 32, 1))
    parts, made = built(recipe_of(Model("lenet", width=12), "data=1"))
    text = made.gradients.lower(made.shapes, made.batch).compile(compiler_options=AS_USERS_DO).as_text()
    *_, played = compiled.play(parts, text, None)
    assert played.flops == pytest.approx(flops.executed(parts), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["data=1", "tensor=two_d:2x2"])
@pytest.mark.parametrize("name", NETWORKS)
def test_memory_is_that_of_the_compiled_step(name, plan):
    """Within 11 %."""
    parts, made = built(recipe_of(NETWORKS[name], plan))
    said = made.step.lower(made.shapes, made.batch).compile(compiler_options=AS_USERS_DO).memory_analysis()
    fresh = said.output_size_in_bytes - said.alias_size_in_bytes
    total = said.argument_size_in_bytes + said.temp_size_in_bytes + fresh
    assert predicted(parts)["total"] == pytest.approx(total, rel=0.11)
