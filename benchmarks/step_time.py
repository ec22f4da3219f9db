"""How fast is a training step of jaxpar beside one written by hand?

The same GPT-2 (exact GELU, biases, tied head), the same parameters, AdamW and clipping, on one CPU device, three ways:

    jaxpar          `program(assemble(recipe)).step`
    plain JAX       the step of this file: plain functions, `jax.value_and_grad`, optax, nothing else
    PyTorch         the step of this file, where torch can be imported

once with its blocks unrolled and once in one scan (PyTorch has no scan). Losses of the first steps are compared before
anything is timed. Rounds of a few steps are interleaved, so that what else the machine does slows all of them alike,
and the ratio is the median over rounds of jaxpar's speed beside the other's in the same round: by the clock, and by
the time of all cores, which other work disturbs less.

Expect: at least 0.97 of plain JAX, both ways. A minute or two on 2 cores. Believe it where the load before is below 1.

    python -m benchmarks.step_time
    python -m benchmarks.step_time --rounds 20 --model.width 256 --model.hidden 1024
"""

import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jaxpar import Model, Plan, Recipe, program
from jaxpar.step.parts import assemble
from jaxpar.step.rates import learning_rate

try:
    import torch
except ImportError:
    torch = None

VOCAB = 256
MODEL = Model("gpt", layers=4, width=128, heads=4, hidden=512, context=64)
TARGET = 0.97


@dataclass(frozen=True)
class Options:
    """What is timed.

    Attributes:
        model: sizes of the GPT.
        batch: sequences per step.
        rounds: interleaved rounds.
        steps: steps per round and contender.
    """

    model: Model = field(default_factory=lambda: MODEL)
    batch: int = 12
    rounds: int = 40
    steps: int = 4


class Contender(NamedTuple):
    """`step(state, ids) -> (state, loss)` with `ids[batch, context + 1]` on the host; and the state to begin with."""

    name: str
    step: Callable
    state: Any


class Seconds(NamedTuple):
    """What a step took: by the clock, and of all cores together."""

    wall: float
    cpu: float


def recipe_of(options: Options, unroll: bool) -> Recipe:
    """The run that all contenders are given, with everything that is timed but the data."""
    plan = Plan(unroll=str(unroll).lower())
    return Recipe(model=options.model, plan=plan, batch=options.batch, steps=1000, warmup=10)


def jaxpar_step(recipe: Recipe) -> Contender:
    """The step as `jaxpar.fit` compiles it."""
    shape = jax.ShapeDtypeStruct((recipe.batch, recipe.model.context), jnp.int32)
    made = program(assemble(recipe, shape, shape, VOCAB))
    compiled = made.step.lower(made.shapes, made.batch).compile()

    def step(state, ids):
        state, metrics = compiled(state, made.place((ids[:, :-1], ids[:, 1:])))
        return state, metrics["loss"]

    return Contender("jaxpar", step, made.init())


# Plain JAX: activations are x[tokens, width] between the blocks, since XLA for CPU is slower on gradients of batches.


def normed(params, x):
    """Layer norm over the last dim."""
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * params["gain"] + params["bias"]


def affine(params, x):
    """x times a matrix, plus a bias."""
    return x @ params["weight"] + params["bias"]


def attention(params, x, batch: int, heads: int):
    """Causal softmax attention of `x[tokens, width]`."""
    q, k, v = (
        affine(params[name], x).reshape(batch, -1, heads, x.shape[-1] // heads) for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)), v)
    return affine(params["out"], y.reshape(x.shape))


def block(params, x, batch: int, heads: int):
    """Attention and an MLP, each on a branch."""
    branch = params["attention"]
    x = x + attention(branch["attention"], normed(branch["norm"], x), batch, heads)
    branch = params["mlp"]
    hidden = jax.nn.gelu(affine(branch["mlp"]["up"], normed(branch["norm"], x)), approximate=False)
    return x + affine(branch["mlp"]["down"], hidden)


def plain_loss(params, ids, heads: int, unroll: bool):
    """Mean nats of the next token, of a GPT-2 with a tied head."""
    inputs, labels = ids[:, :-1], ids[:, 1:]
    table = params["tokens"]["table"]
    x = table[inputs] + params["positions"]["table"][: inputs.shape[1]]
    run = functools.partial(block, batch=len(ids), heads=heads)
    x = x.reshape(-1, x.shape[-1])
    if unroll:
        for layer in range(jax.tree.leaves(params["blocks"])[0].shape[0]):
            x = run(jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"]), x)
    else:
        x, _ = jax.lax.scan(lambda x, one: (run(one, x), None), x, params["blocks"])
    logits = normed(params["norm"], x) @ table.T
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels.reshape(-1)).mean()


def plain_step(recipe: Recipe, params) -> Contender:
    """One update as a JAX user would write it."""
    matrices = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("weight", "table"), params)
    rate = learning_rate(recipe)
    adamw = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=recipe.weight_decay, mask=matrices)
    optimizer = optax.chain(optax.clip_by_global_norm(recipe.clip), adamw)
    loss = functools.partial(plain_loss, heads=recipe.model.heads, unroll=recipe.plan.unroll == "true")

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, ids):
        params, opt = state
        value, gradients = jax.value_and_grad(loss)(params, ids)
        updates, opt = optimizer.update(gradients, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    params = jax.tree.map(jnp.array, params)
    return Contender("plain JAX", lambda state, ids: update(state, jnp.asarray(ids)), (params, optimizer.init(params)))


def torch_step(recipe: Recipe, params) -> Contender:
    """One update of the same model in PyTorch, eager."""
    rates = np.asarray(jax.jit(learning_rate(recipe))(np.arange(recipe.steps)))
    leaves = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf), requires_grad=True), params)
    flat = jax.tree_util.tree_leaves_with_path(leaves)
    decayed = [leaf for path, leaf in flat if path[-1].key in ("weight", "table")]
    rest = [leaf for path, leaf in flat if path[-1].key not in ("weight", "table")]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    linear, normal = torch.nn.functional.linear, torch.nn.functional.layer_norm

    def affine(params, layer, x):
        return linear(x, params["weight"][layer].T, params["bias"][layer])

    def normed(params, x, *layer):
        return normal(x, x.shape[-1:], params["gain"][layer], params["bias"][layer])

    def loss(ids):
        table, blocks = leaves["tokens"]["table"], leaves["blocks"]
        x = table[ids[:, :-1]] + leaves["positions"]["table"][: ids.shape[1] - 1]
        shape = (*x.shape[:2], recipe.model.heads, -1)
        for layer in range(recipe.model.layers):
            branch = blocks["attention"]
            h = normed(branch["norm"], x, layer)
            q, k, v = (
                affine(branch["attention"][n], layer, h).view(shape).transpose(1, 2) for n in ("query", "key", "value")
            )
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + affine(branch["attention"]["out"], layer, y.transpose(1, 2).reshape(x.shape))
            branch = blocks["mlp"]
            h = torch.nn.functional.gelu(affine(branch["mlp"]["up"], layer, normed(branch["norm"], x, layer)))
            x = x + affine(branch["mlp"]["down"], layer, h)
        logits = normed(leaves["norm"], x) @ table.T
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def step(count, ids):
        for group in optimizer.param_groups:
            group["lr"] = float(rates[count])
        optimizer.zero_grad()
        value = loss(torch.tensor(ids, dtype=torch.long))
        value.backward()
        torch.nn.utils.clip_grad_norm_([*decayed, *rest], recipe.clip)
        optimizer.step()
        return count + 1, value.detach()

    return Contender("PyTorch", step, 0)


def contenders(options: Options, unroll: bool) -> list[Contender]:
    """All that are there, from equal parameters."""
    recipe = recipe_of(options, unroll)
    first = jaxpar_step(recipe)
    params = jax.device_get(first.state.params)
    others = [torch_step(recipe, params)] if torch and unroll else []
    return [first, plain_step(recipe, params), *others]


def batch_of(options: Options, step: int) -> np.ndarray:
    """Random ids `[batch, context + 1]`."""
    return np.random.default_rng(step).integers(0, VOCAB, (options.batch, options.model.context + 1)).astype(np.int32)


def agree(found: list[Contender], options: Options, steps: int = 5) -> tuple[list[Contender], float]:
    """Run the first steps of each, and the largest relative difference of a loss from jaxpar's.

    Raises:
        SystemExit: if they do not do the same; times of different work say nothing.
    """
    losses, after = [], []
    for one in found:
        state, values = one.state, []
        for step in range(steps):
            state, loss = one.step(state, batch_of(options, step))
            values.append(float(loss))
        losses.append(values)
        after.append(one._replace(state=state))
    want = np.asarray(losses[0])
    off = max(float(np.abs(np.asarray(values) / want - 1).max()) for values in losses)
    if not off < 1e-4:
        said = "\n".join(f"  {one.name}: {values}" for one, values in zip(found, losses, strict=True))
        raise SystemExit(f"losses differ by {off:.1e}, so this would time different work:\n{said}")
    return after, off


def times(found: list[Contender], options: Options) -> list[list[Seconds]]:
    """Of one step of each contender in each round; the order turns from round to round."""
    states, seconds = [one.state for one in found], [[] for _ in found]
    batches = [batch_of(options, step) for step in range(options.steps)]
    for turn in range(options.rounds):
        for place in range(len(found)):
            number = (place + turn) % len(found)
            wall, cpu = time.perf_counter(), time.process_time()
            for ids in batches:
                states[number], loss = found[number].step(states[number], ids)
            float(loss)  # waits for the last step
            spent = time.perf_counter() - wall, time.process_time() - cpu
            seconds[number].append(Seconds(*(value / options.steps for value in spent)))
    return seconds


def row(name: str, own: list[Seconds], first: list[Seconds], tokens: int) -> tuple[str, float]:
    """A line of the table, and how fast `first` is beside this contender."""
    wall, cpu = zip(*own, strict=True)
    faster, faster_by_cpu = (
        statistics.median(theirs / ours for ours, theirs in zip(*pair, strict=True))
        for pair in zip(zip(*first, strict=True), (wall, cpu), strict=True)
    )
    low, middle, high = (value * 1e3 for value in statistics.quantiles(wall, n=4))
    spread, busy = f"({low:.1f} to {high:.1f})", statistics.median(cpu) * 1e3
    line = f"{name:<22}{tokens / middle * 1e3:>9,.0f}{middle:>9.1f}{spread:>19}{busy:>9.1f}"
    return (line if own is first else f"{line}{faster:>12.3f}{faster_by_cpu:>9.3f}"), faster


def main(options: Options) -> float:
    """Print the table; the smallest ratio to plain JAX."""
    model, ratios = options.model, []
    print(
        f"gpt: {model.layers} layers, width {model.width}, {model.heads} heads, hidden {model.hidden}, context "
        f"{model.context}, vocab {VOCAB}, batch {options.batch}; one {jax.devices()[0].platform} device\n"
        f"{options.rounds} rounds of {options.steps} steps; torch: {torch.__version__ if torch else 'not installed'}\n"
        f"load before: {os.getloadavg()[0]:.1f}\n\n"
        f"{'':<22}{'tokens/s':>9}{'ms':>9}{'(quartiles)':>19}{'CPU ms':>9}{'jaxpar is':>12}{'by CPU':>9}"
    )
    for unroll in (True, False):
        found, off = agree(contenders(options, unroll), options)
        seconds = times(found, options)
        for one, own in zip(found, seconds, strict=True):
            name = f"{one.name}, {'unrolled' if unroll else 'scanned'}"
            line, ratio = row(name, own, seconds[0], options.batch * model.context)
            print(line, flush=True)
            ratios += [ratio] if one.name == "plain JAX" else []
        print(f"  first losses agree within {off:.0e}")
    met = "met" if min(ratios) >= TARGET else "missed"
    print(f"\nload after: {os.getloadavg()[0]:.1f}; at least {TARGET} of plain JAX: {met}, {min(ratios):.3f}")
    return min(ratios)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.partition("\n\n")[0], config=(tyro.conf.FlagCreatePairsOff,)))
