"""Where stacked layers lie on the axis `pipe`, and that they are in order on disk, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.core.plan import scheme_of
from jaxpar.plan import layout, padding
from jaxpar.plan.layout import FILLER, SINGLE, place

DIMS = {
    "vector": "layers embed",
    "matrix": "layers embed mlp",
    "kernel": "layers - - embed channels",
    "one": "layers",
    "table": "vocab embed",
    "bias": "vocab",
}


@st.composite
def stacks(draw):
    """A number of devices, and a stack over them: all layers in any order, filler anywhere."""
    layers, pipe = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    places = -(-layers // pipe) * pipe + pipe * draw(st.integers(0, 2))
    return pipe, tuple(draw(st.permutations([*range(layers), *[FILLER] * (places - layers)])))


def drawn(layers, vocab=7):
    """Leaves of random bits with zeros of both signs among them."""
    shapes = {"vector": (layers, 2), "matrix": (layers, 2, 4), "kernel": (layers, 3, 3, 2, 4), "one": (layers,)}
    shapes |= {"table": (vocab, 2), "bias": (vocab,)}
    rng = np.random.default_rng(layers)
    return {name: rng.choice([-0.0, 0.0, 1.5, -2.5], shape).astype(np.float32) for name, shape in shapes.items()}


def assert_same_bits(got, want):
    for name, leaf in want.items():
        there = np.asarray(got[name])
        assert (there.shape, there.dtype, there.tobytes()) == (leaf.shape, leaf.dtype, leaf.tobytes()), name


@settings(max_examples=60, deadline=None)
@given(stacks(), st.sampled_from([np.asarray, jnp.asarray]))
def test_layers_go_to_their_places_and_back(drawn_stack, kind):
    pipe, stack = drawn_stack
    placement = place(scheme_of("one_d:2"), 1, {"batch": 8}, pipe=pipe, stack=stack)
    tree = drawn(max(stack) + 1)
    there = padding.pad(placement, DIMS, jax.tree.map(kind, tree))
    for name, words in DIMS.items():
        assert there[name].shape == padding.shape(placement, words, tree[name].shape)
        assert isinstance(there[name], np.ndarray) == (kind is np.asarray)
    for name in ("vector", "matrix", "kernel", "one"):
        for row, layer in zip(np.asarray(there[name]), stack, strict=True):
            want = np.zeros_like(row) if layer == FILLER else tree[name][layer]
            assert row.tobytes() == want.tobytes()
    assert there["table"].shape == (8, 2) and not np.any(there["table"][7:])
    assert_same_bits(padding.unpad(placement, DIMS, there, tree), tree)


def test_a_leaf_without_layers_is_not_touched():
    placement = place(scheme_of("single"), 1, {"batch": 8}, pipe=2, stack=(1, 0, 2, FILLER))
    leaf, words = np.arange(3.0), {"a": "embed", "b": "", "c": "- layers"}  # a `layers` dim that leads is the stack's
    tree = {"a": leaf, "b": leaf, "c": np.ones((2, 3))}
    assert all(padding.laid(placement.stack, words[name], leaf, leaf.shape) is leaf for name, leaf in tree.items())
    assert not any(padding.moves(placement.stack, one) for one in words.values())


def test_a_stack_as_on_disk_moves_nothing():
    for stack in ((), (0, 1, 2, 3)):
        placement = place(scheme_of("single"), 1, {"batch": 8}, pipe=2, stack=stack)
        leaf = np.ones((4, 2))
        assert padding.pad(placement, "layers embed", leaf) is leaf
        assert not padding.moves(placement.stack, "layers embed")


def test_another_number_of_layers_is_an_error():
    placement = place(scheme_of("single"), 1, {"batch": 8}, pipe=2, stack=(1, 0))
    with pytest.raises(ValueError, match=r"a leaf of 3 layers, but the stack .* has 2"):
        padding.pad(placement, "layers embed", np.ones((3, 2)))


@pytest.mark.parametrize("stack", [(0, 0), (0, 2), (0, 1, FILLER), (FILLER, 1)])
def test_a_stack_holds_each_layer_once(stack):
    with pytest.raises(ValueError, match="must hold each layer once"):
        place(scheme_of("single"), 1, {"batch": 8}, pipe=2, stack=stack)


@pytest.mark.parametrize("tensor", ["single", "one_d:2", "fsdp:2", "two_d:2x2", "two_half_d:2x1x2", "three_d:2x1x2"])
def test_layers_lie_over_pipe_and_nothing_else_does(tensor):
    bare = place(scheme_of(tensor), 2, {"batch": 8})
    piped = place(scheme_of(tensor), 2, {"batch": 8}, pipe=2, stack=(1, 0))
    for words in ("embed", "vocab", "embed mlp", "mlp embed", "vocab embed", "- - embed channels", "- embed", ""):
        assert layout.weight(piped, f"layers {words}") == (("pipe",), *layout.weight(bare, words))
        assert layout.weight(bare, f"layers {words}") == ((), *layout.weight(bare, words))
        assert layout.weight(piped, words) == layout.weight(bare, words)
    assert [*piped.scheme.axes.items()] == [("pipe", 2), *bare.scheme.axes.items()]
    assert layout.replicas(piped) == layout.replicas(bare)
    for beside in ("embed", "mlp"):
        assert layout.rows(piped, "batch", beside) == layout.rows(bare, "batch", beside)
    assert padding.parts(piped) == padding.parts(bare)


def test_without_a_stack_or_an_axis_layers_are_whole():
    unequal = place(scheme_of("single"), 1, {"batch": 8}, pipe=4)
    assert unequal.scheme.axes == {"pipe": 4} and layout.weight(unequal, "layers embed") == ((), ())
    alone = place(scheme_of("single"), 1, {"batch": 8}, pipe=1, stack=(1, 0))
    assert alone.scheme.axes == {} and layout.weight(alone, "layers embed") == ((), ())
    assert layout.weight(SINGLE, "layers embed mlp") == ((), (), ())


@pytest.mark.parametrize("optimizer", [optax.adamw(0.1, weight_decay=0.1), optax.sgd(0.1, momentum=0.9)])
def test_filler_stays_zero_under_an_optimizer(optimizer):
    placement = place(scheme_of("single"), 1, {"batch": 8}, pipe=2, stack=(2, FILLER, 0, 1))
    params = padding.pad(placement, DIMS, drawn(3))
    gradients, state = jax.tree.map(lambda leaf: leaf + 0.5 * (leaf != 0), params), optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    assert not np.any(params["matrix"][1]) and np.any(params["matrix"][2])
