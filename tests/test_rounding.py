"""Updates rounded onto the grid of stored weights: exactly there, the same on every layout, right on average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpar.core import compat
from jaxpar.core.formats import FORMATS, fixed, nearest
from jaxpar.plan import padding
from jaxpar.step.rounding import Origin, counters, rounded

GRIDS = [FORMATS[name] for name in ("bf16", "fp16", "fp169", "e5m2")] + [fixed(8, 16)]
COUNT = 50_000


def numbers(rng, fmt, finest: int):
    """Of either sign and any size down to 2^finest, evenly by logarithm."""
    highest = int(np.floor(np.log2(fmt.largest)))
    size = np.ldexp(rng.uniform(1, 2, COUNT), rng.integers(finest, highest, COUNT))
    return (size * rng.choice([-1, 1], COUNT)).astype(np.float32)


@pytest.mark.parametrize("fmt", GRIDS, ids=lambda fmt: fmt.name)
def test_what_is_added_leads_exactly_onto_the_grid(fmt):
    rng = np.random.default_rng(0)
    finest = max(int(np.log2(fmt.quantum)) - 2, -90)  # else sums are flushed
    p = np.asarray(nearest(numbers(rng, fmt, finest), fmt))
    near = -p * (1 + rng.choice([-1, 1], COUNT) * np.ldexp(rng.uniform(0, 2, COUNT), -rng.integers(1, 30, COUNT)))
    u = np.where(rng.random(COUNT) < 0.5, near, numbers(rng, fmt, finest - 5)).astype(np.float32)
    for stochastic in (False, True):
        made = rounded(fmt, stochastic, seed=1)

        @jax.jit
        def update(u, p, made=made):
            moves, _ = made.update(u, made.init(p), p)
            return optax.apply_updates(p, moves)

        q = np.asarray(update(u, p))
        assert np.array_equal(nearest(q, fmt), q) and np.any(q != p)
        if not stochastic:
            differ = q != np.asarray(nearest(p + u, fmt))
            far = (np.abs(q) * 2.0 ** (fmt.mantissa - 22) > np.abs(p)) & (np.sign(p) != np.sign(q))
            assert np.mean(differ) < 2e-3 and np.all(far[differ])


def test_parameters_of_a_smaller_dtype_get_what_they_can_hold():
    p = jnp.asarray([1.0, 300.0], jnp.bfloat16)
    u = jnp.asarray([2.0**-9, -1.2], jnp.float32)
    made, means = rounded(FORMATS["bf16"], seed=1), np.zeros(2)
    state, update = made.init(p), jax.jit(made.update)
    for _ in range(400):
        moves, state = update(u, state, p)
        means += np.asarray(p, np.float64) / 400 + np.asarray(moves, np.float64) / 400
    assert moves.dtype == jnp.float32 and state.count == 400
    assert np.array_equal(optax.apply_updates(p, moves).astype(jnp.float32), p.astype(jnp.float32) + moves)
    steps = np.array([2.0**-7, 2.0]) * np.sqrt([0.25 * 0.75, 0.4 * 0.6]) / 20
    assert np.all(np.abs(means - [1 + 2.0**-9, 298.8]) < 4 * steps)
    moves, _ = rounded(FORMATS["bf16"], False).update(u, state, p)
    assert np.array_equal(moves, [0, -2])
    with pytest.raises(ValueError, match="needs the parameters"):
        made.update(u, state)


WORDS = {
    "head": "embed vocab",
    "twin": "embed vocab",
    "table": "vocab embed",
    "deep": "layers vocab embed",
    "stack": "layers embed mlp",
    "kernel": "- - embed channels",
}
SHAPES = {
    "head": (4, 6),
    "twin": (4, 6),
    "table": (6, 4),
    "deep": (3, 6, 4),
    "stack": (3, 4, 8),
    "kernel": (2, 2, 4, 8),
}
STACK = (2, -1, 0, 1)  # as a pipeline may lay three layers out, with filler


def drawn(origin=None, seed=0, steps=0, place=lambda tree: tree):
    """Which entries of updates of half a step each are rounded up, laid out as `origin` says."""
    p = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    if origin:
        sizes = {
            "head": (4, 8),
            "twin": (4, 8),
            "table": (8, 4),
            "deep": (4, 8, 4),
            "stack": (4, 4, 8),
            "kernel": SHAPES["kernel"],
        }
        p = {name: padding.laid(origin.stack, WORDS[name], p[name], sizes[name]) for name in p}
    made = rounded(FORMATS["bf16"], True, seed, origin)
    u = jax.tree.map(lambda p: p * np.float32(2.0**-8), p)
    moves, _ = jax.jit(made.update)(*place((u, made.init(p)._replace(count=jnp.int32(steps)), p)))
    return {name: np.asarray(leaf) > 0 for name, leaf in moves.items()}


def test_random_bits_follow_the_rows_on_disk():
    shapes = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in SHAPES.items()}
    origin = Origin(WORDS, shapes, STACK)
    plain, laid = drawn(), drawn(origin)
    for name, up in laid.items():
        back = padding.stored(STACK, WORDS[name], up, SHAPES[name])
        assert np.array_equal(back, plain[name]) and up.sum() == plain[name].sum(), "filler and padding stay zeros"
        assert 0.2 < plain[name].mean() < 0.8
    mesh = compat.make_mesh((2, 2), ("x", "y"), jax.devices()[:4])

    def place(tree):
        spread = NamedSharding(mesh, PartitionSpec("x", "y")), NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda leaf: jax.device_put(leaf, spread[jnp.ndim(leaf) < 2]), tree)

    for name, up in drawn(origin, place=place).items():
        assert np.array_equal(up, laid[name]), "nor do they depend on who holds what"
    flat = [np.concatenate([leaf.ravel() for leaf in tree.values()]) for tree in (plain, drawn(seed=1), drawn(steps=1))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert 0.35 < np.mean(flat[one] == flat[other]) < 0.65, "other seeds and steps draw others"
    assert not np.array_equal(plain["head"], plain["twin"]), "and so do other tensors"


def test_no_two_entries_share_a_counter():
    for shape in [*SHAPES.values(), (5,)]:
        high, low = map(np.ravel, counters(shape, shape))
        assert len(set(zip(high.tolist(), low.tolist(), strict=True))) == np.prod(shape)
