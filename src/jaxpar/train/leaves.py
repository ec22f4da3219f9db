"""A State as named arrays without padding, layers in order: what a checkpoint holds of it."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxpar.core.refuse import Problem
from jaxpar.core.types import State
from jaxpar.plan import padding
from jaxpar.step.program import Program

NAMED = 8  # leaves that differ, in one message


def on_disk(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """Each leaf of the State by its name: its unpadded shape, and where it may lie between disk and program.

    A dim that is padded on the devices need not divide without padding, so it is not split; nor are layers that lie in
    another order there.
    """

    def one(words, leaf, padded):
        spec = [*padded.sharding.spec, *[None] * leaf.ndim][: leaf.ndim]
        same = [size == full for size, full in zip(leaf.shape, padded.shape, strict=True)]
        if padding.moves(program.placement.stack, words):
            same[0] = False
        kept = (axes if unmoved else None for axes, unmoved in zip(spec, same, strict=True))
        place = padded.sharding
        sharding = NamedSharding(place.mesh, PartitionSpec(*kept), memory_kind=place.memory_kind)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return flat(jax.tree.map(one, program.words, program.unpadded, program.shapes))


class Move(NamedTuple):
    """What becomes of one leaf between disk and devices; `between` is the sharding that `on_disk` gives it."""

    words: str
    shape: tuple[int, ...]
    between: NamedSharding
    sharding: NamedSharding


@functools.lru_cache(maxsize=8)  # compiled once per run, not once per checkpoint
def _mover(one: Callable, stack: tuple[int, ...], moves: tuple[Move, ...]) -> Callable:
    """A compiled function that does `one`, `padding.laid` or `padding.stored`, to several leaves.

    It works where no dim that changes is split, so values are only ever copied. Left to itself, the partitioner adds
    zeros to what it picks from a split dim, which makes 0 of -0.
    """

    def every(*leaves):
        held = [lax.with_sharding_constraint(leaf, move.between) for leaf, move in zip(leaves, moves, strict=True)]
        return tuple(one(stack, move.words, leaf, move.shape) for leaf, move in zip(held, moves, strict=True))

    return jax.jit(every, out_shardings=tuple(move.sharding for move in moves))


def _moved(program: Program, one: Callable, leaves: dict, wanted: dict) -> dict:
    """All leaves by name, those that are not the same on disk and devices with the shape and sharding in `wanted`."""
    stack, words, between, full = program.placement.stack, *map(flat, (program.words, on_disk(program), program.shapes))
    changed = [name for name in words if padding.moves(stack, words[name]) or between[name].shape != full[name].shape]
    moves = [Move(words[name], wanted[name].shape, between[name].sharding, wanted[name].sharding) for name in changed]
    move = _mover(one, stack, tuple(moves))
    return leaves | dict(zip(changed, move(*(leaves[name] for name in changed)), strict=True))


def unpadded(program: Program, state: State) -> dict[str, jax.Array]:
    """Each leaf of the State by its name, as it is on disk."""
    return _moved(program, padding.stored, flat(state), on_disk(program))


def padded(program: Program, found: dict[str, jax.Array]) -> State:
    """The State of these unpadded leaves, as `program.step` takes it."""
    wanted = flat(program.shapes)
    found = _moved(program, padding.laid, found, wanted)
    return jax.tree.unflatten(jax.tree.structure(program.shapes), [found[name] for name in wanted])


def differences(path: Path, there: dict, wanted: dict[str, jax.ShapeDtypeStruct]) -> list[Problem]:
    """One problem for each leaf that is not the same there; orbax itself would cast a dtype without a word."""
    found = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in there.items()}
    needed = {name: f"{jnp.dtype(leaf.dtype).name}{[*leaf.shape]}" for name, leaf in wanted.items()}
    wrong = sorted(name for name in found.keys() | needed.keys() if found.get(name) != needed.get(name))
    if not wrong:
        return []
    rule = f"is of another model or optimizer: {len(wrong)} leaves differ."
    named = [
        Problem(name, found.get(name, "missing"), f"the recipe needs {needed.get(name, 'nothing')}.")
        for name in sorted(wrong, key=lambda name: not name.startswith("params"))[:NAMED]
    ]
    return [Problem("checkpoint", path, rule, "the recipe that wrote it; another --name; or --overwrite"), *named]


def nested(leaves: dict) -> dict:
    """`{"params/table": a}` as `{"params": {"table": a}}`: a reader of the files finds its way without jaxpar."""
    tree = {}
    for name, leaf in leaves.items():
        *above, last = name.split("/")
        inner = functools.reduce(lambda inner, part: inner.setdefault(part, {}), above, tree)
        inner[last] = leaf
    return tree


def flat(tree) -> dict:
    """The leaves of any tree by the names of their paths, as `"opt/1/0/mu/table"`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
