"""The two recipes of 8 bits that are emulated: which operand is rounded how, what becomes of it, and that it trains."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from harness import SMALL, recipe_of, run

from jaxpar.core import chunked, family
from jaxpar.core.formats import FORMATS, nearest
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Data, Model, Recipe
from jaxpar.plan.context import context
from jaxpar.plan.layout import SINGLE
from jaxpar.plan.product import Settings
from jaxpar.plan.wire import device_wire
from jaxpar.step.parts import prepare
from jaxpar.step.program import program

POLICIES = ("fp8_chunked", "fp8_mixed")
SITES = {  # product, role, and the format of each policy's operand
    ("embed mlp", "activation"): ("fp152", "e5m2"),
    ("embed mlp", "weight"): ("fp152", "e5m2"),
    ("embed mlp", "gradient"): ("fp152", "e5m2"),
    ("- embed", "activation"): ("fp169", "fp16"),  # the first layer
    ("- embed", "weight"): ("fp152", "fp16"),
    ("- embed", "gradient"): ("fp152", "fp16"),
    ("embed vocab", "activation"): ("fp169", "fp16"),  # the last one
    ("embed vocab", "weight"): ("fp169", "fp16"),
    ("embed vocab", "gradient"): ("fp169", "fp16"),
}


def policy(name):
    return family.pick("policies", name)()


@pytest.mark.parametrize("name", POLICIES)
def test_each_operand_is_on_the_grid_of_its_place(name):
    rng = np.random.default_rng(0)
    a = (rng.normal(size=(64, 32)) * 2.0 ** rng.integers(-12, 4, (64, 32))).astype(np.float32)
    a[0, :3] = 1e10, np.inf, np.nan
    bits = rng.integers(0, 2**32, a.shape, np.uint32)
    for (product, role), formats in SITES.items():
        fmt = FORMATS[formats[POLICIES.index(name)]]
        site = SimpleNamespace(name=product, role=role, bits=lambda: bits)
        operand, history = policy(name).enter(a, site)
        got = np.asarray(operand.array, np.float32)
        assert history is None and operand.scale is None
        assert np.array_equal(nearest(got, fmt, saturate=False), got, equal_nan=True)
        small = {"fp152": 1, "e5m2": 1, "fp16": 2}.get(fmt.name, 4)
        assert operand.array.dtype.itemsize == small, "what travels is as small as there is a dtype for it"
        assert got[0, 0] == (np.inf if role == "gradient" else fmt.largest), "gradients tell of what is too large"
        assert got[0, 1] == np.inf and np.isnan(got[0, 2])
        drawn = name == "fp8_mixed" and product == "embed mlp" and role != "weight"
        close = np.asarray(nearest(a, fmt, saturate=role != "gradient"))
        assert np.array_equal(got, close, equal_nan=True) != drawn
        if drawn:
            rest, _ = policy(name).enter(a, SimpleNamespace(name=product, role=role, bits=None))
            assert np.array_equal(np.asarray(rest.array, np.float32), close, equal_nan=True), "not in evaluation"


def product(name, x, w, dy, key=None):
    """y, dx and dw of one product under a policy, on one device."""
    settings = Settings(SINGLE, policy(name), device_wire(), key=key)
    y, pull = jax.vjp(lambda x, w: context(settings).dot(x, w, "embed mlp"), x, w)
    return y, *pull(dy)


def test_each_product_is_summed_in_chunks():
    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=size).astype(np.float32) for size in ((130, 70), (70, 65), (130, 65)))
    got = jax.jit(lambda *a: product("fp8_chunked", *a))(x, w, dy)
    eight, sixteen = FORMATS["fp152"], FORMATS["fp169"]
    x8, w8, dy8 = (nearest(a, eight) for a in (x, w, dy))
    multiply = jax.jit(chunked.matmul, static_argnums=(2, 3))
    want = [multiply(a, b, 64, sixteen) for a, b in ((x8, w8), (dy8, w8.T), (x8.T, dy8))]
    assert all(map(np.array_equal, got, want))
    assert not np.array_equal(got[2], x8.T @ dy8) and not np.array_equal(got[2], multiply(x8.T, dy8, 999, sixteen))


def test_the_noise_of_activations_and_errors_has_no_mean():
    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=size).astype(np.float32) for size in ((6, 5), (5, 4), (6, 4)))
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 2000))
    draw = jax.jit(jax.vmap(lambda key: product("fp8_mixed", x, w, dy, jax.random.wrap_key_data(key))))
    w8 = np.asarray(nearest(w, FORMATS["e5m2"]))
    for got, want in zip(draw(keys), (x @ w8, dy @ w8.T, x.T @ dy), strict=True):
        error = np.asarray(got).std(0) / np.sqrt(len(keys))
        assert np.all(np.abs(np.asarray(got).mean(0) - want) < 5 * error + 1e-6) and np.all(error > 0)


def test_random_bits_are_those_of_one_device_on_any_layout():
    """So hardly an entry differs; two layers run in a scan where weights are split, and one by one on one device."""
    plans = ("data=1", "tensor=two_d:2x2,microbatches=2")
    want, got = (run(recipe_of(SMALL["mlp"], f"{plan},precision=fp8_mixed")) for plan in plans)
    assert got.loss == pytest.approx(want.loss, rel=1e-6)
    for one, other in zip(*map(jax.tree.leaves, (got.gradients, want.gradients)), strict=True):
        assert np.mean(abs(one - other) > 1e-5 * np.max(abs(other))) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_digits_are_learned_as_in_float32(name):
    """With the loss scale and the parameters that the policy asks for."""
    base = Recipe(Model("mlp", layers=2, width=32, hidden=64), Data("digits"), batch=64, steps=200)
    exact, emulated = (held_out(replace(base, plan=Plan(precision=one))) for one in ("fp32", name))
    assert exact < 0.35 and abs(emulated - exact) < 0.05


def held_out(recipe):
    parts, dataset = prepare(recipe)
    made = program(parts)
    state = made.init()
    for step in range(recipe.steps):
        state, _ = made.step(state, made.place(dataset.batch(step)))
    batches = map(made.place, map(dataset.held_out, range(dataset.held_out_batches)))
    nats, labels, _ = np.sum([made.evaluate(state.params, state.extra, batch) for batch in batches], 0)
    return nats / labels
