"""GPT is nanoGPT's and the GRU is torch's, number by number; what their parts mean, and what they refuse."""

from dataclasses import replace
from functools import lru_cache, partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from laid_out import laid_out, pull
from networks import NETWORKS
from parity import assert_equal

from jaxpar.core import family
from jaxpar.core.parts import chain
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Model, Recipe
from jaxpar.layers.attention import attention
from jaxpar.layers.recurrent import GATES, gru
from jaxpar.models.gpt import gpt
from jaxpar.plan import padding
from jaxpar.step.parts import assemble
from jaxpar.step.program import program

VOCAB = 65  # of the golden model; no plan of several devices splits it evenly
SHARDED = ("tensor=two_half_d:2x2x2", "tensor=three_d:2x2x2")
each_plan = pytest.mark.parametrize("plan", ["data=1", *SHARDED])


def ready(recipe, batch, classes, params):
    """Program, its state with `params` after no step, and the placed batch; the model has no state of its own."""
    parts = assemble(recipe, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in batch), classes)
    made = program(parts)
    padded = padding.pad(parts.settings.placement, parts.model.dims[0], jax.tree.map(jnp.asarray, params))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), made.shapes)._replace(params=padded)
    return made, jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), state, made.shapes), made.place(batch)


def drawn(model, seed=0):
    """Parameters none of which is neutral, and the empty state of a model that has none."""
    params, extra = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), params), extra


# --- GPT against nanoGPT


def nanogpt(prefix):
    """The arrays `prefix`/* as the tree of models/gpt.py: blocks stacked, linears (in, out)."""
    arrays, width, layers = golden.load("gpt2_nanogpt_bias1"), 32, 2

    def read(name):
        return arrays[f"{prefix}/transformer.{name}"]

    def stacked(name, part=slice(None)):
        return np.stack([read(f"h.{layer}.{name}")[part].T for layer in range(layers)])

    def linear(name, place=None):
        part = slice(None) if place is None else slice(place * width, (place + 1) * width)
        return {"weight": stacked(f"{name}.weight", part), "bias": stacked(f"{name}.bias", part)}

    def branch(norm, name, inside):
        gains = {"gain": stacked(f"{norm}.weight"), "bias": stacked(f"{norm}.bias")}
        return {"norm": gains, name: inside, "dropout": {}}

    heads = {name: linear("attn.c_attn", place) for place, name in enumerate(("query", "key", "value"))}
    mlp = {"up": linear("mlp.c_fc"), "down": linear("mlp.c_proj")}
    return {
        "tokens": {"table": read("wte.weight")},
        "positions": {"table": read("wpe.weight")},
        "dropout": {},
        "blocks": {
            "attention": branch("ln_1", "attention", heads | {"out": linear("attn.c_proj")}),
            "mlp": branch("ln_2", "mlp", mlp),
        },
        "norm": {"gain": read("ln_f.weight"), "bias": read("ln_f.bias")},
    }


@lru_cache
def golden_step(plan):
    """The golden model after one step of its optimizer: program, new state, metrics, and logits before; all padded.

    Three examples do not split, so a fourth without labels stands beside them.
    """
    more = ((0, 1), (0, 0))
    tokens, labels = (golden.load("gpt2_nanogpt_bias1")[name].astype(np.int32) for name in ("idx", "targets"))
    tokens, labels = np.pad(tokens, more), np.pad(labels, more, constant_values=-1)
    fields = {"layers": 2, "width": 32, "heads": 2, "context": 16}
    model, recipe = gpt(vocab=VOCAB, **fields), Recipe(Model("gpt", **fields), plan=Plan.parse(plan), batch=4)
    recipe = replace(recipe, warmup=0, learning_rate=1e-3, weight_decay=0.1, clip=1.0)
    made, state, placed = ready(recipe, (tokens, labels), VOCAB, nanogpt("param"))
    logits = laid_out(model, plan, {"batch": 4, "context": 12}, ("batch context", "batch context vocab"))
    both = jax.jit(lambda state, placed: (*made.step(state, placed), logits(state.params, state.extra, tokens)[0]))
    return made, *both(state, placed)


def on_disk(made, params):
    """Parameters as a checkpoint holds them."""
    return padding.unpad(made.placement, made.words.params, params, made.unpadded.params)


@each_plan
def test_gpt_gives_the_logits_loss_and_gradients_of_nanogpt(plan):
    made, after, metrics, logits = golden_step(plan)
    want = golden.load("gpt2_nanogpt_bias1")
    got = metrics["loss"], metrics["grad_norm"], logits[:3, :, :VOCAB]
    assert_equal(got, (want["loss"], want["grad_norm"], want["logits"]), tolerance=2e-6)
    clipped = optax.tree_utils.tree_get(after.opt, "mu")  # after one step: (1 - 0.9) gradient / norm
    gradients = jax.tree.map(lambda leaf: leaf / (1 - 0.9) * metrics["grad_norm"], clipped)
    for kind in ("grad", "grad64"):
        assert_equal(on_disk(made, gradients), nanogpt(kind), tolerance=1e-5)


@each_plan
def test_a_clipped_step_of_adamw_on_gpt_is_that_of_nanogpt(plan):
    want = nanogpt("after_adamw")
    made, after, *_ = golden_step(plan)
    got = on_disk(made, after.params)
    for leaf, reference in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(leaf, reference, rtol=0, atol=1e-5)  # entries move by 1e-3


@pytest.mark.parametrize("plan", SHARDED)
def test_tokens_that_padding_adds_get_no_probability_and_learn_nothing(plan):
    _, after, _, logits = golden_step(plan)
    logits, table = np.asarray(logits), np.asarray(after.params["tokens"]["table"])
    probability = np.exp(logits - logits.max(-1, keepdims=True))  # times a constant
    assert logits.shape[-1] == len(table) > VOCAB
    assert not probability[..., VOCAB:].any()
    assert not table[VOCAB:].any()


# --- GRU against torch


def test_two_recurrent_layers_give_the_states_and_gradients_of_torch():
    arrays = golden.load("rnn_torch")

    def named(kind):
        """torch holds the gates of a matrix in one, (3 out, in)."""
        tree = {"first": {}, "second": {}}
        for number, params in enumerate(tree.values()):
            for side, short in (("in", "ih"), ("hidden", "hh")):
                pair = [np.split(arrays[f"gru/{kind}/{part}_{short}_l{number}"], 3) for part in ("weight", "bias")]
                for gate, weight, bias in zip(GATES, *pair, strict=True):
                    params[f"{gate}_{side}"] = {"weight": weight.T, "bias": bias}
        return tree

    x, dy, y, dx = (np.moveaxis(arrays[f"gru/{name}"], 1, 0) for name in ("x", "gy", "y", "grad_x"))
    layer = chain({"first": gru(5, 7), "second": gru(7, 7)})
    apply = laid_out(layer, "data=1", {"batch": 4, "context": 9}, ("batch context embed", "batch context mlp"))
    got = jax.jit(partial(pull, apply))(named("param"), drawn(layer)[1], x, dy)
    assert_equal((got.y, got.gradients), (y, (named("grad"), dx)), tolerance=2e-6)


# --- meaning

SMALL = {"vocab": 6, "context": 6, "layers": 1, "width": 8, "hidden": 8, "heads": 2, "example": (2, 3)}
IMAGE = 64, 64, 1  # the least that all networks for images take


def small(name, **fields):
    """A small model of the family; of language, if it can be one."""
    build = family.pick("models", name)
    known = {key: value for key, value in SMALL.items() if key != "example" or name not in models_with("tied")}
    if name in NETWORKS:
        known |= vars(NETWORKS[name]) | {"vocab": 6, "example": IMAGE}
    return build(**family.accepted(build, known | fields))


def models_with(field):
    return [name for name in family.names("models") if field in family.parameters(family.pick("models", name))]


def on_one_device(model, name, **mode):
    """`apply(params, extra, x) -> (logits, extra)` and an x for it."""
    if name not in models_with("tied"):
        example = IMAGE if name in NETWORKS else SMALL["example"]
        words = "batch height width -" if name in NETWORKS else "batch - -"
        x, dims = jax.random.normal(jax.random.key(1), (2, *example)), (words, "batch vocab")
    else:
        x, dims = jnp.arange(12).reshape(2, 6) % 6, ("batch context", "batch context vocab")
    return laid_out(model, "data=1", {"batch": 2, "context": 6}, dims, **mode), x


@pytest.mark.parametrize("name", models_with("tied"))
def test_logits_of_a_language_model_depend_on_this_and_all_earlier_tokens_alone(name):
    model = small(name, tied=False)  # so that a row of the table matters only where its token stands
    params, extra = drawn(model)
    apply, tokens = on_one_device(model, name)

    @jax.jit
    @jax.jacrev
    def by_table(table):
        logits, _ = apply(params | {"tokens": {"table": table}}, extra, tokens)
        return (logits[0] * jnp.arange(6)).sum(-1)

    depends = np.abs(by_table(params["tokens"]["table"])).sum(-1) > 0  # [position, token]; token n stands at n
    assert_equal(depends, np.tril(np.ones((6, 6))), tolerance=0)


DROPPING = [
    pytest.param(name, marks=pytest.mark.slow) if name == "googlenet" else name for name in models_with("dropout")
]


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_of_rate_0_in_training_is_any_rate_in_evaluation(name):
    params, extra = drawn(small(name))

    def logits(rate, train):
        apply, x = on_one_device(small(name, dropout=rate), name, train=train, key=jax.random.key(3))
        return apply(params, extra, x)[0]

    zero, still, dropped = jax.jit(lambda: (logits(0.0, True), logits(0.5, False), logits(0.5, True)))()
    assert_equal(zero, still, tolerance=0)
    assert np.abs(dropped - still).max() > 0.1 * np.abs(still).max()


@lru_cache
def dropped_found(plan):
    """Loss and gradients of a small GPT that drops a third, whose four query heads share two."""
    fields = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "context": 8, "dropout": 1 / 3, "bias": False}
    tokens = np.random.default_rng(0).integers(0, 13, (4, 9), np.int32)
    recipe, params = Recipe(Model("gpt", **fields), plan=Plan.parse(plan), batch=4), drawn(gpt(vocab=13, **fields))[0]
    made, state, placed = ready(recipe, (tokens[:, :-1], tokens[:, 1:]), 13, params)
    loss, gradients, *_ = made.gradients(state, placed)
    return loss, on_disk(made, gradients)


@pytest.mark.parametrize(
    "plan", ["unroll=false", pytest.param("data=2,microbatches=2,tensor=one_d:4", id="more shards than kv heads")]
)
def test_neither_scan_nor_microbatches_nor_shards_change_what_dropout_drops(plan):
    (loss, gradients), (want_loss, want_gradients) = dropped_found(plan), dropped_found("data=1")
    assert_equal(loss, want_loss, tolerance=1e-6)
    assert_equal(gradients, want_gradients, tolerance=5e-6)


@lru_cache
def attended(kv_heads, plan, repeated=False):
    """Values and gradients of four query heads that share `kv_heads`; or of four, each with a copy of its own."""
    heads, width, sizes = 4, 8, {"batch": 2, "context": 6, "kv_heads": 4 if repeated else kv_heads}
    shared = attention(width, heads, kv_heads)
    layer = attention(width, heads, heads) if repeated else shared
    apply = laid_out(layer, plan, sizes, ("batch context embed",) * 2)

    def copied(leaf):
        by_head = leaf.reshape(*leaf.shape[:-1], kv_heads, width // heads)
        return jnp.repeat(by_head, heads // kv_heads, axis=-2).reshape(*leaf.shape[:-1], width)

    def attend(params, extra, x):
        copies = {name: jax.tree.map(copied, params[name]) for name in ("key", "value")}
        return apply(params | copies if repeated else params, extra, x)

    x, dy = np.random.default_rng(1).normal(size=(2, 2, 6, width)).astype(np.float32)
    return jax.jit(partial(pull, attend))(*drawn(shared), x, dy)


@pytest.mark.parametrize(
    "kv_heads, plan",
    [(1, "data=1"), (1, "tensor=one_d:4"), (2, "tensor=one_d:4"), (2, "tensor=two_d:2x2"), (4, "tensor=one_d:4")],
)
def test_a_shared_key_value_head_is_one_copied_for_each_query_head(kv_heads, plan):
    want = attended(kv_heads, "data=1", repeated=True)
    assert_equal(attended(kv_heads, plan), want, tolerance=5e-5)  # a key bias has no gradient but rounding


# --- what is refused


def test_more_positions_than_the_context_are_refused():
    model = gpt(vocab=6, context=4, layers=1, width=8, heads=2)
    apply, tokens = on_one_device(model, "gpt")
    with pytest.raises(ValueError, match=r"6 positions, but model\.context = 4"):
        jax.eval_shape(apply, *drawn(model), tokens)


@pytest.mark.parametrize("name", models_with("activation"))
def test_an_unknown_activation_is_answered_with_the_likeliest(name):
    with pytest.raises(ValueError, match=r"model\.activation = gellu: .*did you mean `gelu`\?"):
        small(name, activation="gellu")
