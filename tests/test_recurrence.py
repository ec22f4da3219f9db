"""A recurrence without a loop is the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.core.recurrence import BLOCK, prefix


def in_a_loop(decay, inputs, start):
    """The states after each entry, in float64."""
    decay, found = np.broadcast_to(np.asarray(decay, np.float64), inputs.shape), []
    for factor, entry in zip(decay, np.asarray(inputs, np.float64), strict=True):
        start = factor * start + entry
        found.append(start)
    return np.stack(found)


def check(decay, inputs, start=3.0):
    products, states = jax.jit(prefix, static_argnums=0 if isinstance(decay, float) else ())(decay, inputs)
    assert products.shape == states.shape == inputs.shape and products.dtype == states.dtype == inputs.dtype
    want = in_a_loop(decay, inputs, start)
    np.testing.assert_allclose(products * start + states, want, rtol=0, atol=3e-6 * abs(want).max())


@pytest.mark.parametrize("count", [1, BLOCK, 2 * BLOCK + 7])
@pytest.mark.parametrize("decay", [0.999, 0.5, 1.0, "of its own"])
def test_it_is_the_loop(decay, count):
    rng = np.random.default_rng(count)
    inputs = jnp.asarray(rng.normal(size=(count, 3)), jnp.float32)
    own = jnp.asarray(rng.uniform(-1, 1, (count, 3)), jnp.float32)
    check(own if decay == "of its own" else decay, inputs)


@pytest.mark.parametrize(("decay", "count"), [(0.002, BLOCK + 1), (0.9, BLOCK**2 + 1)])
def test_powers_may_be_less_than_any_number(decay, count):
    """Of 128 entries 0.002, of 128 x 128 0.9."""
    check(decay, jnp.asarray(np.random.default_rng(0).normal(size=(count, 1)), jnp.float32))


@settings(max_examples=4, deadline=None)
@given(st.floats(0.01, 1.0), st.integers(0, 2**32 - 1))
def test_a_stream_in_two_parts_is_one_stream(decay, seed):
    rng = np.random.default_rng(seed)
    inputs = jnp.asarray(rng.normal(size=(12, 2)), jnp.float32)
    for factor in (decay, jnp.asarray(rng.uniform(-1, 1, (12, 2)), jnp.float32)):
        parts = [
            (factor if isinstance(factor, float) else factor[half], inputs[half]) for half in np.split(np.r_[:12], [5])
        ]
        (_, first), (products, second) = (prefix(*part) for part in parts)
        whole = prefix(factor, inputs)[1]
        np.testing.assert_allclose(products * first[-1] + second, whole[5:], rtol=0, atol=3e-6 * abs(whole).max())


def test_in_float64():
    with jax.enable_x64(True):
        inputs = jnp.asarray(np.random.default_rng(0).normal(size=(300, 2)))
        products, states = prefix(0.999, inputs)
        np.testing.assert_allclose(products * 3 + states, in_a_loop(0.999, inputs, 3), rtol=1e-12)
