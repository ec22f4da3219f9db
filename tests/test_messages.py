"""Trees of arrays as what pipeline stages send."""

import jax
import jax.numpy as jnp
import pytest
from parity import assert_equal

from jaxpar.step.messages import boundary

PAIR = {"map": jnp.arange(6.0).reshape(2, 3), "skips": (jnp.arange(4.0) + 10, jnp.full((1, 2), 7, jnp.bfloat16))}
ONE = jnp.arange(5.0)


def like(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize(
    ("given", "shapes"),
    [
        ([ONE, ONE], ((5,),)),
        ([PAIR, jax.tree.map(lambda leaf: leaf + 1, PAIR)], ((2, 3), (4,), (1, 2))),
        ([ONE, PAIR, ()], ((12,),)),  # filled up to the longest
    ],
)
def test_what_is_sent_is_received(given, shapes):
    found = boundary([like(one) for one in given], ())
    assert found.shapes == shapes and [leaf.shape for leaf in found.nothing()] == [*shapes]
    for one in given[:2]:
        message = found.send(one)
        assert [leaf.shape for leaf in message] == [*shapes]
        got = found.receive(message, like(one))
        assert jax.tree.map(lambda leaf: leaf.dtype, got) == jax.tree.map(lambda leaf: leaf.dtype, one)
        assert_equal(got, one, tolerance=0)
