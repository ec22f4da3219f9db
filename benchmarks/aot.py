"""Does jaxpar cost anything beside a step written by hand, on machines that are not here?

The same GPT, AdamW and clipping, compiled ahead of time for TPUs and GPUs in two ways:

    jaxpar   `program(assemble(recipe), devices).step`: collectives derived from layouts, in `jax.shard_map`
    twin     the step of this file: plain functions under `jax.jit`, layouts as sharding constraints, collectives by XLA

Both scan over equal blocks, in float32, without rematerialization, with XLA's attention. What stands in the table is
read from the two compiled programs, none of which ran: bytes that a device sends, flops, memory, the share of bytes
that travel while the device computes, and where the compiler counts cycles the estimated step and what of it is waiting
for others. On TPUs these estimates rank two programs for one chip, no more; for GPUs XLA states no cycles, and nothing
is autotuned. Ratios are jaxpar / twin: below 1 is better, for overlap above.

Expect: bytes at most those of the twin, since gradients are reduce-scattered where XLA's partitioner sums whole ones;
flops and memory alike. Needs `pip install 'jaxpar[aot-tpu]'` for TPUs and `jaxpar[aot-cuda12]` for GPUs: what is not
installed is left out, and said. Six minutes on 2 idle cores.

    python -m benchmarks.aot
    python -m benchmarks.aot --cases 0,1
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxpar import Model, Plan, Recipe, Refused, program
from jaxpar.cli import exit_codes, flags
from jaxpar.core.refuse import Problem, refuse
from jaxpar.report import compiled, topology
from jaxpar.report.columns import aligned
from jaxpar.step.parts import assemble

GPT2 = Model("gpt", layers=12, width=768, heads=12, hidden=3072, context=1024, vocab=50304)
LLAMA_1B = Model("gpt", layers=16, width=2048, heads=32, hidden=12288, context=1024, vocab=32000)
LLAMA_7B = Model("gpt", layers=32, width=4096, heads=32, hidden=16512, context=1024, vocab=32000)
CASES = (  # topology, model, sequences per step, plan
    ("v5e:2x4", "GPT-2 124M", GPT2, 16, "data=8"),
    ("v5e:2x4", "GPT-2 124M", GPT2, 16, "tensor=fsdp:8"),
    ("v5e:4x4", "1B", LLAMA_1B, 16, "tensor=fsdp:16"),
    ("v5e:4x4", "1B", LLAMA_1B, 16, "data=4,tensor=one_d:4"),
    ("v5p:4x4x4", "7B", LLAMA_7B, 64, "tensor=fsdp:64"),
    ("h100:1x1x8", "GPT-2 124M", GPT2, 16, "data=8"),
    ("h100:1x1x8", "GPT-2 124M", GPT2, 16, "tensor=fsdp:8"),
)
HEAD = ("case", "step", "GB sent", "Tflop", "GB held", "overlapped", "exposed ms", "step ms", "compile s")


@dataclass(frozen=True)
class Options:
    """What is compiled.

    Attributes:
        cases: numbers of cases from 0, with commas between them; all if empty.
        json: file to write the figures to as well.
    """

    cases: str = ""
    json: str | None = None


# The twin: a GPT as a JAX user would write it.


def normed(params, x):
    """Layer norm."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * params["gain"] + params["bias"]


def affine(params, x):
    """A projection with its bias."""
    return x @ params["weight"] + params["bias"]


def block(params, x, heads: int, inner):
    """Attention and MLP, each behind a norm and beside a residual; `inner` holds activations between two products."""
    params, branch = params["mlp"], params["attention"]
    h = normed(branch["norm"], x)
    wide = (inner(affine(branch["attention"][name], h)) for name in ("query", "key", "value"))
    q, k, v = (one.reshape(*x.shape[:2], heads, -1) for one in wide)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)), v)
    x = x + affine(branch["attention"]["out"], inner(mixed.reshape(x.shape)))
    h = jax.nn.gelu(inner(affine(params["mlp"]["up"], normed(params["norm"], x))), approximate=False)
    return x + affine(params["mlp"]["down"], h)


def twin(recipe: Recipe, made, optimizer):
    """The step by hand, jitted for the mesh of `made`, and the shapes that it takes: (step, state, batch)."""
    mesh, heads, hold = made.mesh, recipe.model.heads, jax.lax.with_sharding_constraint
    rows = tuple(axis for axis in mesh.axis_names if axis in ("data", "shard"))

    def over(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    def inner(x):  # 1-D tensor parallelism: features between two products lie over `tensor`
        return hold(x, over(rows, None, "tensor")) if "tensor" in mesh.axis_names else x

    def place(path, leaf):
        name, kind = path[-2].key, path[-1].key
        if "shard" in mesh.axis_names:  # each leaf in equal parts along its first dim that divides
            for dim in range(len(leaf.shape) - 1, -1, -1):
                if leaf.shape[dim] % mesh.shape["shard"] == 0:
                    return over(*[None] * dim, "shard")
        elif "tensor" in mesh.axis_names and name in ("query", "key", "value", "up"):
            return over(*[None] * (len(leaf.shape) - 1), "tensor")
        elif "tensor" in mesh.axis_names and name in ("out", "down") and kind == "weight":
            return over(None, "tensor")
        elif "tensor" in mesh.axis_names and name == "tokens":
            return over("tensor")
        return over()

    def gathered(params):  # the weights of one block, or of the ends, whole: fully sharded data parallelism
        return jax.tree.map(lambda leaf: hold(leaf, over()), params) if "shard" in mesh.axis_names else params

    def one(x, own):
        return hold(block(gathered(own), x, heads, inner), over(rows)), None

    def loss(params, batch):
        inputs, labels = batch
        table = gathered(params["tokens"])["table"]
        x = hold(table[inputs] + gathered(params["positions"])["table"], over(rows))
        x, _ = jax.lax.scan(one, x, params["blocks"])
        logits = normed(gathered(params["norm"]), x) @ table.T
        if "tensor" in mesh.axis_names:
            logits = hold(logits, over(rows, None, "tensor"))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(state, batch):
        params, opt = state
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, opt = optimizer.update(gradients, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), made.unpadded.params)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(path, leaf)), shapes
    )
    opt = optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own.sharding),
        jax.eval_shape(optimizer.init, shapes),
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=over()),
    )
    size = recipe.batch, recipe.model.context
    batch = (jax.ShapeDtypeStruct(size, jnp.int32, sharding=over(rows)),) * 2
    state = params, opt
    kept = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(kept, over())), state, batch


# Both, compiled and read.


def measure(word: str, model: Model, sequences: int, plan: str) -> list[compiled.Compiled]:
    """What the two compiled steps say, jaxpar's first.

    Raises:
        Refused: if the compiler for the topology is not installed.
    """
    recipe = Recipe(model=model, plan=Plan.parse(plan), batch=sequences)
    tokens, where = jax.ShapeDtypeStruct((sequences, model.context), jnp.int32), topology.parse(word)
    parts = assemble(recipe, tokens, tokens, model.vocab)
    made, found = program(parts, topology.devices(where)), []
    for step, *arguments in ((made.step, made.shapes, made.batch), twin(recipe, made, parts.optimizer)):
        lowered, began = step.lower(*arguments), time.perf_counter()
        done = lowered.compile(compiler_options=topology.compiler_options(where))
        found.append(compiled.read(parts, made, done, time.perf_counter() - began, where))
    return found


def figures(found: compiled.Compiled) -> list[float | None]:
    """The columns of the table, as numbers."""
    sent, played = sum(found.sent.values()), found.played
    exposed, seconds = (played.exposed * 1e3, played.seconds * 1e3) if played else (None, None)
    sizes = [sent / 1e9, found.flops / 1e12, found.held / 1e9, found.beside / sent]
    return [*sizes, exposed, seconds, found.compile_seconds]


def written(name: str, found: list[compiled.Compiled]) -> list[tuple[str, ...]]:
    """The rows of a case: jaxpar, the twin, and their ratio."""
    forms = ("{:.4f}", "{:.3f}", "{:.3f}", "{:.0%}", "{:.2f}", "{:.2f}", "{:.0f}")
    values = [figures(one) for one in found]
    ratios = [first / second if second and second > 1e-3 else None for first, second in zip(*values, strict=True)]
    rows = [("jaxpar", values[0], forms), ("twin", values[1], forms), ("ratio", ratios, ("{:.3f}",) * len(forms))]
    return [
        (name if who == "jaxpar" else "", who)
        + tuple("-" if value is None else form.format(value) for form, value in zip(shown, row, strict=True))
        for who, row, shown in rows
    ]


def main(options: Options) -> None:
    """Compile jaxpar's step and one written by hand for TPUs and GPUs that are not here, and compare the programs."""
    words = options.cases.split(",") if options.cases else [f"{number}" for number in range(len(CASES))]
    refuse(
        Problem("cases", word, "there is no such case.", f"0 to {len(CASES) - 1}, with commas between them")
        for word in words
        if not (word.isdecimal() and int(word) < len(CASES))
    )
    numbers = map(int, words)
    rows, kept = [], []
    for number in numbers:
        word, size, model, sequences, plan = CASES[number]
        name = f"{size}, {plan}, {word}"
        try:
            found = measure(word, model, sequences, plan)
        except Refused as refused:
            print(f"{name}: left out. {refused}", flush=True)
            continue
        rows += written(name, found)
        kept.append({"case": name, "jaxpar": figures(found[0]), "twin": figures(found[1]), "columns": HEAD[2:]})
        print(aligned(HEAD, rows[-3:], HEAD[2:]), flush=True)
        for who, one in zip(("jaxpar", "twin"), found, strict=True):
            print("".join(f"  {who}: {sentence}\n" for sentence in one.warnings), end="", flush=True)
    if rows:
        print(f"\n{aligned(HEAD, rows, HEAD[2:])}\ncompiled ahead of time by {found[0].compiler}, and not run")
    if options.json:
        Path(options.json).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}"))
