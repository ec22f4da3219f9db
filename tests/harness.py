"""Runs the real step on small models, once per plan, and remembers the one-device reference."""

import functools
import math
import os
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.core import family
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Model, Recipe
from jaxpar.core.types import State
from jaxpar.plan import padding
from jaxpar.step.parts import Parts, assemble
from jaxpar.step.program import Program, program

BATCH, CONTEXT, CLASSES = 16, 8, 61  # a vocabulary that no mesh of these tests divides
MESHES = (
    "tensor=one_d:8",
    "tensor=sequence:8",
    "tensor=fsdp:8",
    "tensor=two_d:2x4",
    "tensor=two_d:4x2",
    "data=2,tensor=two_d:2x2",
    "tensor=two_half_d:2x2x2",
    "tensor=three_d:2x2x2",
    "tensor=three_d:1x4x2",
    "tensor=three_d:4x2x1",
)
# `compiler_options` for a program whose kernels count, where tests have others than users (tests/conftest.py)
AS_USERS_DO = (
    {"xla_cpu_use_fusion_emitters": True} if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", "") else None
)
SMALL = {
    "gpt": Model("gpt", layers=2, width=32, heads=8, hidden=64, context=CONTEXT),
    "gru": Model("gru", layers=2, width=16, hidden=32, context=CONTEXT),
    "mlp": Model("mlp", layers=2, width=32, hidden=64),
    # smooth: rounding may move a ReLU's input across 0, which changes its gradient at once
    "convnet": Model("convnet", layers=2, width=16, hidden=32, activation="gelu_tanh"),
}
# shapes of images, where the smallest will not do
IMAGES = {"resnet": (8, 8, 1), "unet": (8, 8, 1), "lenet": (8, 8, 1), "vgg": (32, 32, 1), "googlenet": (32, 32, 1)}
IMAGES |= {"alexnet": (63, 63, 1)}


HISTORY = {"scale": 1.0, "amax": 0.0}  # of an operand under delayed scaling that was never used
PASSES = 3.0  # of online norm


class Ran(NamedTuple):
    """Loss, gradients and new extra of one step from random parameters, unpadded, and what ran."""

    loss: float
    gradients: object
    extra: object
    parts: Parts
    program: Program
    text: str


def recipe_of(model: Model, plan: str, **fields) -> Recipe:
    """A recipe of the tests' batch size."""
    return Recipe(model=model, plan=Plan.parse(plan), **{"batch": BATCH, "steps": 50, "warmup": 5, **fields})


def batch_of(recipe: Recipe, step: int = 0):
    """Random tokens or images and labels, one of them to be ignored."""
    rng = np.random.default_rng(step)
    if recipe.model.context:
        tokens = rng.integers(0, CLASSES, (recipe.batch, CONTEXT + 1)).astype(np.int32)
        inputs, labels = tokens[:, :-1], tokens[:, 1:].copy()
        labels[0, 0] = -1
        return inputs, labels
    example = IMAGES.get(recipe.model.name, (4, 4, 1))
    each = example[:-1] if recipe.model.name == "unet" else ()  # a class for each pixel
    images, labels = rng.normal(size=(recipe.batch, *example)), rng.integers(0, 10, (recipe.batch, *each))
    return images.astype(np.float32), labels.astype(np.int32)


def built(recipe: Recipe) -> tuple[Parts, Program]:
    """The parts and the program of a recipe, for the batches of `batch_of`."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in batch_of(recipe)]
    parts = assemble(recipe, *shapes, CLASSES if len(shapes[1].shape) == 2 else 10)
    return parts, program(parts)


def _inside(model: Model) -> bool:
    """Whether norms stand in its cells: layer scaling of what is nearly 0 would multiply rounding as well."""
    return model.name in ("rnn", "lstm") or (model.name == "gru" and model.norm is not None)


@functools.cache
def start(model: Model, precision: str = "fp32"):
    """Unpadded parameters and extra on the host: noise, about 1 for gains and variances, so that nothing drops out.

    The noise of language models is near that of GPT-2's initial values: the larger it is, the more rounding there is in
    the gradient of a key bias, which is 0 in truth. That of image models is larger: a head near 0 sends back gradients
    that cancel in batch norm. The histories of delayed scaling have seen one step.
    """
    recipe = recipe_of(model, f"precision={precision}")
    parts, made = built(recipe)
    rng, small = np.random.default_rng(7), 0.03 if model.context and not _inside(model) else 0.2

    def drawn(path, leaf):
        name = path[-1].key
        if name in HISTORY:
            return np.full(leaf.shape, HISTORY[name], leaf.dtype)
        if name == "passes":
            return np.full(leaf.shape, PASSES, leaf.dtype)
        around = 1 if name in ("gain", "variance") else 0
        deviation = (2 / math.prod(leaf.shape[-4:-1])) ** 0.5 if name == "kernel" else small
        return (around + deviation * rng.normal(size=leaf.shape)).astype(np.float32)

    trees = made.unpadded.params, made.unpadded.extra
    params, extra = (jax.tree_util.tree_map_with_path(drawn, tree) for tree in trees)
    if not remembers(recipe):
        return params, extra
    found = made.gradients(laid(made, parts, params, extra), made.place(batch_of(recipe)))
    return params, unpadded(made, found.gradients, found.extra)[1]


def remembers(recipe: Recipe) -> bool:
    """Whether its precision has state."""
    return family.pick("policies", recipe.plan.precision)().history is not None


def placed(recipe: Recipe, parts: Parts, made: Program):
    """A State with the parameters of `start` on the devices of the plan, and no optimizer."""
    return laid(made, parts, *start(recipe.model, recipe.plan.precision if remembers(recipe) else "fp32"))


def laid(made: Program, parts: Parts, params, extra) -> State:
    """A State of these on the devices of the plan, and no optimizer."""
    trees = zip(parts.model.dims, (params, extra), strict=True)
    padded = tuple(padding.pad(made.placement, dims, tree) for dims, tree in trees)
    params, extra = jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), padded, made.shapes[1:3])
    return State(jax.device_put(np.int32(0), made.shapes.step.sharding), params, extra, (), {})


def unpadded(made: Program, params, extra):
    """On the host, without the padding of the vocabulary and with layers in order."""
    trees = zip(made.words[1:3], (params, extra), made.unpadded[1:3], strict=True)
    return tuple(
        padding.unpad(made.placement, words, jax.tree.map(np.asarray, tree), like) for words, tree, like in trees
    )


def run(recipe: Recipe) -> Ran:
    """Compile loss and gradients once; run them, and keep the program's text."""
    parts, made = built(recipe)
    state, batch = placed(recipe, parts, made), made.place(batch_of(recipe))
    compiled = made.gradients.lower(state, batch).compile()
    loss, gradients, extra, _ = compiled(state, batch)
    return Ran(float(loss), *unpadded(made, gradients, extra), parts, made, compiled.as_text())


@functools.cache
def reference(model: Model) -> Ran:
    """The same on one device, without microbatches."""
    return run(recipe_of(model, "data=1"))


def losses(recipe: Recipe, steps: int) -> tuple[np.ndarray, object]:
    """Training losses of `steps` updates on the same few batches, and the last extra, unpadded."""
    _, made = built(recipe)
    state, found = made.init(), []
    compiled = made.step.lower(made.shapes, made.place(batch_of(recipe))).compile()
    for step in range(steps):
        state, metrics = compiled(state, made.place(batch_of(recipe, step % 4)))
        found.append(metrics["loss"])
    return np.asarray(jnp.stack(found)), unpadded(made, state.params, state.extra)[1]


@functools.cache
def reference_losses(model: Model, steps: int):
    """The same on one device."""
    return losses(recipe_of(model, "data=1"), steps)


def variant(model: Model, **fields) -> Model:
    """`model` with other fields."""
    return replace(model, **fields)
