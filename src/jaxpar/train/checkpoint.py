"""Checkpoints of whole arrays: written under one plan, restored under any other, bit by bit the same.

On disk there are no devices and no padding: each leaf of the State is one array of its full, unpadded shape, blocks in
layer order, named by its path in the State. The containers that optax uses are not on disk, so they may be any.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpar.core.refuse import Problem, Refused, refuse
from jaxpar.core.types import State
from jaxpar.step.program import Program

FORMAT = 1  # of what is on disk; a higher number is refused
KEPT = 3  # newest checkpoints of a run
NAMED = 8  # leaves that differ, in one message


def save(folder: Path, program: Program, state: State, about: dict) -> int:
    """Write `state` to `folder`, and return its step; when this returns the checkpoint is complete.

    Args:
        folder: of all checkpoints of the run.
        program: knows the padded and unpadded shapes.
        state: global arrays.
        about: plain values for whoever finds the checkpoint; format, step and versions are added.

    Raises:
        RuntimeError: if it could not be written; earlier checkpoints are untouched.
    """
    step = int(state.step)
    wanted = _on_disk(program)
    leaves = dict(zip(wanted, jax.tree.leaves(state), strict=True))
    long = [name for name, leaf in leaves.items() if leaf.shape != wanted[name].shape]
    cut = _resizer(tuple((wanted[name].shape, wanted[name].sharding) for name in long))
    leaves |= zip(long, cut(*(leaves[name] for name in long)), strict=True)
    about = {"format": FORMAT, "step": step, "jax": jax.__version__, "orbax": ocp.__version__} | about
    try:
        with _manager(folder, create=True) as manager:
            items = ocp.args.Composite(state=ocp.args.PyTreeSave(_nested(leaves)), about=ocp.args.JsonSave(about))
            saved = manager.save(step, args=items)
    except Exception as error:  # orbax raises bare ValueError, OSError and others, such as for a full disk
        raise RuntimeError(f"the checkpoint of step {step} could not be written to {folder}: {error}") from error
    if not saved:
        raise RuntimeError(f"orbax wrote no checkpoint of step {step} to {folder}, which already has {steps(folder)}.")
    return step


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    with _manager(folder) as manager:
        return sorted(manager.all_steps())


def about(folder: Path, step: int) -> dict:
    """What was written beside the state of `step`.

    Raises:
        Refused: if it cannot be read, or a later version of jaxpar wrote it.
    """
    with _reading(folder, step), _manager(folder) as manager:
        found = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
    if not found["format"] <= FORMAT:
        rule = f"is of format {found['format']}, and this version reads formats up to {FORMAT}."
        raise Refused([Problem("checkpoint", folder / str(step), rule, "a newer jaxpar")])
    return found


def described(folder: Path, step: int) -> dict:
    """Each leaf on disk by its name, with `shape` and `dtype`; no array is read."""
    with _reading(folder, step), _manager(folder) as manager:
        return _flat(manager.item_metadata(step).state.tree)


def restore(folder: Path, program: Program, step: int) -> State:
    """The State of `step`, laid out and padded for `program`, whatever plan wrote it.

    Raises:
        Refused: naming each leaf whose name, shape or dtype differs from what the program takes.
    """
    wanted = _on_disk(program)
    with _reading(folder, step), _manager(folder) as manager:
        there = described(folder, step)
        refuse(_differences(folder / str(step), there, wanted))
        target = _nested(wanted)
        how = ocp.args.PyTreeRestore(item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
        found = _flat(manager.restore(step, args=ocp.args.Composite(state=how)).state)
    shapes = dict(zip(wanted, jax.tree.leaves(program.shapes), strict=True))
    short = [name for name in wanted if wanted[name].shape != shapes[name].shape]
    pad = _resizer(tuple((shapes[name].shape, shapes[name].sharding) for name in short))
    found |= zip(short, pad(*(found[name] for name in short)), strict=True)
    return jax.tree.unflatten(jax.tree.structure(program.shapes), [found[name] for name in wanted])


def _on_disk(program: Program) -> dict[str, jax.ShapeDtypeStruct]:
    """Each leaf of the State by its name: its unpadded shape, and where it may lie between disk and program.

    A dim that is padded on the devices need not divide without padding, so it is not split.
    """

    def one(leaf, padded):
        spec = [*padded.sharding.spec, *[None] * leaf.ndim][: leaf.ndim]
        kept = (axes if size == full else None for axes, size, full in zip(spec, leaf.shape, padded.shape, strict=True))
        sharding = NamedSharding(padded.sharding.mesh, PartitionSpec(*kept))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return _flat(jax.tree.map(one, program.unpadded, program.shapes))


@functools.lru_cache(maxsize=8)  # compiled once per run, not once per checkpoint
def _resizer(targets):
    """A compiled function that cuts arrays to, or fills them up with zeros to, the (shape, sharding) in `targets`."""

    def one(leaf, shape):
        kept = leaf[tuple(map(slice, shape))]
        return jnp.pad(kept, [(0, size - there) for size, there in zip(shape, kept.shape, strict=True)])

    def resize(*leaves):
        return tuple(one(leaf, shape) for leaf, (shape, _) in zip(leaves, targets, strict=True))

    return jax.jit(resize, out_shardings=tuple(sharding for _, sharding in targets))


def _manager(folder: Path, create: bool = False) -> ocp.CheckpointManager:
    # else each copy of an array writes a share of it, and every share is first compiled: seconds, to save milliseconds
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    state = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    handlers = {"state": state, "about": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEPT,
        create=create,
        cleanup_tmp_directories=create,  # what a killed run left
        enable_async_checkpointing=False,  # the error of a failed save would come late or never
    )
    return ocp.CheckpointManager(folder.absolute(), item_handlers=handlers, options=options)


@contextmanager
def _reading(folder: Path, step: int) -> Iterator[None]:
    """Name the checkpoint in what orbax raises, a bare error of any type."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        legal = "delete that folder to resume from the checkpoint before it, or start anew by --overwrite"
        raise Refused([Problem("checkpoint", folder / str(step), f"cannot be read: {reason}.", legal)]) from error


def _differences(path: Path, there: dict, wanted: dict[str, jax.ShapeDtypeStruct]) -> list[Problem]:
    """One problem for each leaf that is not the same there; orbax itself would cast a dtype without a word."""
    found, needed = (
        {name: f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in leaves.items()}
        for leaves in (there, wanted)
    )
    wrong = sorted(name for name in found.keys() | needed.keys() if found.get(name) != needed.get(name))
    if not wrong:
        return []
    rule = f"is of another model or optimizer: {len(wrong)} leaves differ."
    named = [
        Problem(name, found.get(name, "missing"), f"the recipe needs {needed.get(name, 'nothing')}.")
        for name in sorted(wrong, key=lambda name: not name.startswith("params"))[:NAMED]
    ]
    return [Problem("checkpoint", path, rule, "the recipe that wrote it; another --name; or --overwrite"), *named]


def _nested(leaves: dict) -> dict:
    """`{"params/table": a}` as `{"params": {"table": a}}`: a reader of the files finds its way without jaxpar."""
    tree = {}
    for name, leaf in leaves.items():
        *above, last = name.split("/")
        inner = functools.reduce(lambda inner, part: inner.setdefault(part, {}), above, tree)
        inner[last] = leaf
    return tree


def _flat(tree) -> dict:
    """The leaves of any tree by the names of their paths, as `"opt/1/0/mu/table"`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
