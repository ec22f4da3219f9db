"""What does each precision cost: the time of a product and of a step, and in which dtype the hardware multiplies?

On a GPU or TPU each policy is timed, side by side, in rounds:

    product   y = x w of `--size` cubed with its backward pass, so three products, as a layer asks its Context for it
    step      a training step of a GPT

beside the chip's ceiling: the best rate of plain bfloat16 products that is measured in the same rounds.

Anywhere else the steps are compiled ahead of time for chips that are not here, and their products counted by the dtypes
of the operands. For GPUs that is done twice: as XLA chooses where it can try nothing out, which is Triton for all, and
with its libraries, among which it would choose on a card (`xla_gpu_enable_triton_gemm=false`). None of that runs.

Expect, on a Hopper GPU: under `fp8_current` and `fp8_delayed` every product with weights is one of 8 bits, forward and
back (`__cublas$lt$matmul$f8`), that of a gradient with E5M2 on its side; attention stays bfloat16. Under `fp8_block`
there is a product for each block, and the head is bfloat16. Under `bf16` both operands are bfloat16 in the backward
pass too. Needs `pip install 'jaxpar[aot-cuda12]'` for GPUs and `jaxpar[aot-tpu]` for TPUs; what is not installed is
left out, and said. Half a minute per policy and chip.

    python -m benchmarks.precision
    python -m benchmarks.precision --topologies h100:1x1x1 --policies bf16,fp8_current
"""

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar import Model, Plan, Recipe, Refused, program
from jaxpar.cli import exit_codes, flags
from jaxpar.core import family
from jaxpar.plan.context import Settings, context
from jaxpar.plan.contraction import Recorded
from jaxpar.plan.layout import SINGLE
from jaxpar.plan.wire import device_wire
from jaxpar.report import machine, operands, topology
from jaxpar.step.parts import Parts, assemble

MODEL = Model("gpt", layers=2, width=256, heads=4, hidden=1024, context=128, vocab=512)
LIBRARIES = {"xla_gpu_enable_triton_gemm": False}


@dataclass(frozen=True)
class Options:
    """What is timed or compiled.

    Attributes:
        model: sizes of the GPT.
        batch: sequences per step; as many per device that is compiled for.
        policies: members of policies/, with commas between them.
        topologies: what to compile for where no accelerator is here, with commas between them.
        size: rows, columns and contraction of the product that is timed.
        rounds: in which each policy is timed once; the order turns.
        json: file to write the figures to as well.
    """

    model: Model = field(default_factory=lambda: MODEL)
    batch: int = 8
    policies: str = "bf16,fp8_current,fp8_delayed,fp8_block"
    topologies: str = "h100:1x1x1,v6e:1x1,tpu7x:2x2x1"
    size: int = 8192
    rounds: int = 10
    json: str | None = None


def parts_of(options: Options, policy: str, devices: int = 1) -> Parts:
    """A run of the GPT on so many devices, each with `batch` sequences."""
    plan = Plan.parse(f"data={devices},precision={policy}")
    recipe = Recipe(model=options.model, plan=plan, batch=options.batch * devices)
    shape = jax.ShapeDtypeStruct((recipe.batch, options.model.context), jnp.int32)
    return assemble(recipe, shape, shape, options.model.vocab)


# Ahead of time.


def compiled_for(options: Options, policy: str, word: str, extra: dict) -> Counter[operands.Product]:
    """The products of a step compiled for a topology.

    Raises:
        Refused: if the compiler is not installed, or the word is no topology.
    """
    where = topology.parse(word)
    made = program(parts_of(options, policy, where.count), topology.devices(where))
    chosen = topology.compiler_options(where) | extra
    return operands.products(made.step.lower(made.shapes, made.batch).compile(chosen).as_text())


def ahead(options: Options) -> dict:
    """By topology and policy, the products of a compiled step; printed as it goes."""
    found = {}
    for word in options.topologies.split(","):
        for extra in ({}, LIBRARIES) if topology.parse(word).platform == "cuda" else ({},):
            for policy in options.policies.split(","):
                name = f"{word}{' by libraries' if extra else ''}, {policy}"
                try:
                    found[name] = operands.shown(compiled_for(options, policy, word, extra))
                except Refused as missing:
                    found[name] = [str(missing.problems[0])]
                print(f"\n{name}: compiled ahead of time, not run")
                print("\n".join(f"  {line}" for line in found[name]), flush=True)
    return found


# On an accelerator.


def product_of(policy: str, size: int) -> Callable[[], None]:
    """A product with its backward pass, compiled, for arrays of random numbers; a call waits until it is done."""
    chosen = family.pick("policies", policy)()
    ctx = context(Settings(SINGLE, chosen, device_wire()))
    begin = chosen.history and {role: chosen.history() for role in ("activation", "weight", "gradient")}
    x, w, dy = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))

    @jax.jit
    def both(x, w, dy, begin):
        def run(x, w, begin):
            return ctx.dot(x, Recorded(w, begin) if begin else w, "embed mlp").astype(jnp.bfloat16)

        y, pull = jax.vjp(run, x, w, begin)
        return y, pull(dy)

    both(x, w, dy, begin)  # compiles
    return lambda: jax.block_until_ready(both(x, w, dy, begin))


def plain_product(size: int) -> Callable[[], None]:
    """Three plain products of bfloat16, likewise: what their backward pass asks of a product without any policy."""
    x, w = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    three = jax.jit(lambda x, w: [a @ b for a, b in ((x, w), (x.T, w), (x, w.T))])
    three(x, w)
    return lambda: jax.block_until_ready(three(x, w))


def step_of(options: Options, policy: str) -> Callable[[], None]:
    """A training step, compiled; its state goes on from call to call."""
    made = program(parts_of(options, policy))
    step, held = made.step.lower(made.shapes, made.batch).compile(), [made.init()]
    shape = (options.batch, options.model.context + 1)
    ids = np.random.default_rng(0).integers(0, options.model.vocab, shape).astype(np.int32)
    batch = made.place((ids[:, :-1], ids[:, 1:]))

    def once():
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready(metrics["loss"])

    once()
    return once


def seconds(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The median time of each call over rounds, in which all take their turn."""
    names, spent = list(calls), {name: [] for name in calls}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            calls[name]()
            spent[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in spent.items()}


def timed(options: Options) -> dict:
    """Rates of products, and steps, beside the ceiling; printed."""
    names = options.policies.split(",")
    products = {"ceiling": plain_product(options.size)} | {name: product_of(name, options.size) for name in names}
    took = seconds(products, options.rounds)
    steps = seconds({name: step_of(options, name) for name in names}, options.rounds)
    ceiling, tokens = 6.0 * options.size**3 / took["ceiling"], options.batch * options.model.context
    print(f"{jax.devices()[0].device_kind}: plain bfloat16 products {ceiling / 1e12:,.4g} Tflop/s")
    print(f"{'policy':<14}{'product ms':>12}{'Tflop/s':>10}{'/ ceiling':>11}{'step ms':>10}{'tokens/s':>12}")
    found = {"ceiling": ceiling}
    for name in names:
        rate = 6.0 * options.size**3 / took[name]
        found[name] = {"product": took[name], "rate": rate, "step": steps[name], "tokens": tokens / steps[name]}
        line = f"{name:<14}{took[name] * 1e3:>12.3f}{rate / 1e12:>10,.4g}{rate / ceiling:>11.2f}"
        print(f"{line}{steps[name] * 1e3:>10.2f}{tokens / steps[name]:>12,.0f}")
    return found


def main(options: Options) -> None:
    """Time, or compile ahead of time, and print."""
    here = machine.chips() is not None
    if not here:
        jax.config.update("jax_platforms", "cpu")
    found = timed(options) if here else ahead(options)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}"))
