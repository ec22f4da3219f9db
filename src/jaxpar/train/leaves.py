"""A State as named arrays without padding: what a checkpoint holds of it."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpar.core.refuse import Problem
from jaxpar.core.types import State
from jaxpar.step.program import Program

NAMED = 8  # leaves that differ, in one message


def on_disk(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """Each leaf of the State by its name: its unpadded shape, and where it may lie between disk and program.

    A dim that is padded on the devices need not divide without padding, so it is not split.
    """

    def one(leaf, padded):
        spec = [*padded.sharding.spec, *[None] * leaf.ndim][: leaf.ndim]
        kept = (axes if size == full else None for axes, size, full in zip(spec, leaf.shape, padded.shape, strict=True))
        sharding = NamedSharding(padded.sharding.mesh, PartitionSpec(*kept))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return flat(jax.tree.map(one, program.unpadded, program.shapes))


@functools.lru_cache(maxsize=8)  # compiled once per run, not once per checkpoint
def _resizer(targets):
    """A compiled function that cuts arrays to, or fills them up with zeros to, the (shape, sharding) in `targets`."""

    def one(leaf, shape):
        kept = leaf[tuple(map(slice, shape))]
        return jnp.pad(kept, [(0, size - there) for size, there in zip(shape, kept.shape, strict=True)])

    def resize(*leaves):
        return tuple(one(leaf, shape) for leaf, (shape, _) in zip(leaves, targets, strict=True))

    return jax.jit(resize, out_shardings=tuple(sharding for _, sharding in targets))


def unpadded(program: Program, state: State) -> dict[str, jax.Array]:
    """Each leaf of the State by its name, cut to what is on disk."""
    wanted = on_disk(program)
    leaves = dict(zip(wanted, jax.tree.leaves(state), strict=True))
    long = [name for name, leaf in leaves.items() if leaf.shape != wanted[name].shape]
    cut = _resizer(tuple((wanted[name].shape, wanted[name].sharding) for name in long))
    return leaves | dict(zip(long, cut(*(leaves[name] for name in long)), strict=True))


def padded(program: Program, found: dict[str, jax.Array]) -> State:
    """The State of these unpadded leaves, as `program.step` takes it."""
    wanted = on_disk(program)
    shapes = dict(zip(wanted, jax.tree.leaves(program.shapes), strict=True))
    short = [name for name in wanted if wanted[name].shape != shapes[name].shape]
    pad = _resizer(tuple((shapes[name].shape, shapes[name].sharding) for name in short))
    found = found | dict(zip(short, pad(*(found[name] for name in short)), strict=True))
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
