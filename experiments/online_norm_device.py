"""All images on the device, changed there: so that an accelerator need not wait for `experiments/online_norm.py`."""

import importlib
import sys
import time
from typing import Any

EVALUATE = 10  # epochs between two looks at all test images


def feed(images: Any, colours: Any, made: Any, batch: int, seed: int):
    """`make(step) -> batch`: what `made.place(dataset.batch(step))` gives, of pixels that lie on the devices.

    Only indices and offsets are sent for a step. The inputs agree to rounding; the choices are the same ones.

    Args:
        images: `core.images.Images`, of which the training images are used.
        colours: that they are normalized by.
        made: the program, for where a batch lies.
        batch: images per step.
        seed: of the run.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxpar.core import augment, order

    pad, count = 4, images.train
    size = images.pixels.shape[1:]
    scale = jnp.asarray(1 / (255 * np.array(colours.deviation)), jnp.float32)
    shift = jnp.asarray(np.array(colours.mean) / np.array(colours.deviation), jnp.float32)

    def changed(pixels, labels, rows, choices):
        padded = jnp.pad(pixels[rows], ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        cut = jax.vmap(lambda one, down, right: jax.lax.dynamic_slice(one, (down, right, 0), size))
        moved = cut(padded, *choices[:2])
        moved = jnp.where(choices[2][:, None, None, None], moved[:, :, ::-1], moved)
        return (moved.astype(jnp.float32) * scale - shift)[None], labels[rows][None]

    jitted = jax.jit(changed, out_shardings=tuple(one.sharding for one in made.batch))
    everywhere = jax.sharding.NamedSharding(made.mesh, jax.sharding.PartitionSpec())
    arrays = np.asarray(images.pixels[:count]), np.asarray(images.labels[:count], np.int32)
    pixels, labels = jax.device_put(arrays, everywhere)

    def make(step: int):
        rows = order.example(seed, step, batch, count).astype(np.int32)
        choices = augment.choices(seed, step * batch + np.arange(batch), pad)
        return jitted(pixels, labels, rows, tuple(choice.astype(np.int32) for choice in choices[:2]) + choices[2:])

    return make


def trained(recipe: Any, norm: str, data_dir: str | None) -> dict:
    """One run of all its steps, with looks at all test images: the row of the table, without its share."""
    import jax

    from experiments.online_norm import at_once, held_out, scored
    from jaxpar.core.cifar import cifar_images
    from jaxpar.step.parts import prepare
    from jaxpar.step.program import program

    member = importlib.import_module(f"jaxpar.datasets.{recipe.data.name}")
    images = cifar_images(member.KIND, data_dir)
    parts, dataset = prepare(recipe, data_dir)
    made, began = program(parts), time.perf_counter()
    make, state = feed(images, member.COLOURS, made, recipe.batch, recipe.seed), made.init()
    step = made.step.lower(state, make(0)).compile()
    looks, others = at_once(recipe, data_dir)
    tests, curve, every = held_out(looks, others), [], max(1, EVALUATE * images.train // recipe.batch)
    for number in range(1, recipe.steps + 1):
        state, metrics = step(state, make(number - 1))
        if number % every == 0 or number == recipe.steps:
            nats, accuracy = scored(looks, state, tests)
            curve.append([number * recipe.batch / images.train, nats, accuracy])
            left = (time.perf_counter() - began) / number * (recipe.steps - number)
            said = f"{norm}: step {number} of {recipe.steps}, loss {float(metrics['loss']):.3f}, {accuracy:.1%} right"
            print(f"{said}, about {left / 60:.0f} min left", file=sys.stderr, flush=True)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began
    found = {"norm": norm, "batch": recipe.batch, "steps": recipe.steps, "curve": curve, "source": dataset.source}
    found |= {"epochs": recipe.steps * recipe.batch / images.train, "seconds": seconds}
    found |= {"loss": min(nats for _, nats, _ in curve), "accuracy": max(share for *_, share in curve)}
    return found | {"images_per_second": recipe.steps * recipe.batch / seconds}
