"""Checkpoints of whole arrays: written under one plan, restored under any other, bit by bit the same.

On disk there are no devices and no padding: each leaf of the State is one array of its full, unpadded shape, blocks in
layer order, named by its path in the State. The containers that optax uses are not on disk, so they may be any.

`checkpoints/STEP/` has `state/`, as orbax writes it, and `manifest.json`. It is made aside and gets its name when all
of it is on the disk, so what has a number for a name was complete.
"""

import gc
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxpar.core.refuse import Problem, Refused, refuse
from jaxpar.core.types import State
from jaxpar.step.program import Program
from jaxpar.train import leaves, manifest
from jaxpar.train.manifest import Damaged
from jaxpar.train.stop import NonFinite, NotSaved

STATE = "state"
KEPT = 3  # newest checkpoints of a run
SPARE = 1.2  # free space that a save asks for, in sizes of the state


class Found(NamedTuple):
    """The newest good checkpoint: its state, what its manifest says, and newer ones that are damaged."""

    state: State
    manifest: dict
    damaged: tuple[Damaged, ...]


def save(folder: Path, program: Program, state: State, about: dict) -> int:
    """Write `state` to `folder`, and return its step; when this returns the checkpoint is complete and on the disk.

    Older checkpoints beyond the newest `KEPT` are then deleted, but never the last two that are good.

    Args:
        folder: of all checkpoints of the run.
        program: knows the padded and unpadded shapes.
        state: global arrays.
        about: plain values for whoever finds the checkpoint; versions and the mesh are added.

    Raises:
        NonFinite: if the state holds a number that is none; nothing is written.
        NotSaved: if it could not be written; earlier checkpoints are untouched.
    """
    step, arrays = int(state.step), leaves.unpadded(program, state)
    digests = {name: manifest.leaf(_finite(name, np.asarray(leaf), step)) for name, leaf in arrays.items()}
    versions = {"jax": jax.__version__, "orbax": ocp.__version__, "mesh": dict(program.mesh.shape)}
    if reason := _written(folder, step, arrays, digests, versions | about):
        _sweep()
        raise NotSaved(
            f"the checkpoint of step {step} could not be written to {folder}: {reason}\n"
            "Earlier checkpoints are untouched; once this is mended, the same command goes on from them."
        )
    _forget(folder)
    return step


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, good or damaged, oldest first."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.name.isdecimal()]
    return sorted(int(name) for name in names if str(int(name)) == name)


def described(folder: Path, step: int) -> dict:
    """The manifest of `step`, of a format that this version reads.

    Raises:
        Damaged: if it is not what was written.
        Refused: if a later version of jaxpar wrote it.
    """
    found = manifest.read(folder / str(step))
    if found["format"] > manifest.FORMAT:
        rule = f"is of format {found['format']}, and this version reads formats up to {manifest.FORMAT}."
        raise Refused([Problem("checkpoint", folder / str(step), rule, "a newer jaxpar")])
    return found


def restore(folder: Path, program: Program, step: int) -> State:
    """The State of `step`, laid out and padded for `program`, whatever plan wrote it.

    Raises:
        Damaged: if a file or an array is not what was written.
        Refused: naming each leaf whose name, shape or dtype differs from what the program takes; or if what is there
            cannot be read or restored.
    """
    wanted, place = leaves.on_disk(program), folder / str(step)
    written = described(folder, step)["leaves"]
    refuse(leaves.differences(place, written, wanted))
    manifest.verify(place)
    try:
        with _orbax() as reader:
            target = leaves.nested(wanted)
            how = ocp.args.PyTreeRestore(item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
            found = leaves.flat(reader.restore(place.absolute() / STATE, args=how))
    except Exception as error:  # orbax raises bare errors of any type
        reason = str(error).partition("\n")[0] or type(error).__name__
        rule = f"is as it was written, and yet could not be restored: {reason}."
        raise Refused(
            [Problem("checkpoint", place, rule, "the same again; a smaller model, if memory ran out")]
        ) from error
    for name in wanted:
        if manifest.leaf(np.asarray(found[name])) != written[name]:
            raise Damaged(place, name, "has other values than were written")
    return leaves.padded(program, found)


def newest(folder: Path, program: Program, note: Callable[[str], None]) -> Found | None:
    """The newest good checkpoint; None if there are none at all. Nothing on the disk is changed.

    Args:
        folder: of all checkpoints of a run.
        program: as for `restore`.
        note: is told of each damaged one.

    Raises:
        Refused: if there are checkpoints and none is good, or they are of another model.
    """
    there, damaged = steps(folder), []
    for step in reversed(there):
        try:
            state = restore(folder, program, step)
            return Found(state, described(folder, step), tuple(damaged))
        except Damaged as error:
            if (folder / str(step)).exists():  # else the run that it belongs to goes on, and has deleted it
                note(f"WARNING: {error}; going back to the checkpoint before it")
                damaged.append(error)
    if there and steps(folder)[-1:] != there[-1:]:
        return newest(folder, program, note)
    if not damaged:
        return None
    rule = f"none of the {len(damaged)} checkpoints is good: " + "; ".join(map(str, damaged)) + "."
    legal = "a copy of that folder, if you have one; or --overwrite to delete the run and start anew"
    raise Refused([Problem("checkpoint", folder, rule, legal)])


def tidy(folder: Path, damaged: tuple[Damaged, ...] = ()) -> None:
    """Delete what a killed save or deletion left, and move damaged checkpoints out of the way, to `damaged/`.

    Only for the holder of the run's lock.
    """
    for left in [*folder.glob("*.part*"), *folder.glob("*.gone")] if folder.is_dir() else []:
        _remove(left)
    for one in damaged:
        away = folder.parent / "damaged"
        away.mkdir(exist_ok=True)
        taken = len([*away.glob(f"{one.step}*")])
        os.rename(folder / str(one.step), away / (f"{one.step}-{taken}" if taken else str(one.step)))


def _finite(name: str, a: np.ndarray, step: int) -> np.ndarray:
    if jnp.issubdtype(a.dtype, jnp.floating) and not np.isfinite(a).all():
        raise NonFinite(f"step {step}: {name} holds numbers that are none, so the state was not saved.")
    return a


def _ask_for_room(folder: Path, size: int) -> None:
    """Raise OSError if `size` bytes and some more do not fit: before orbax begins, since it fails in many words.

    The space is taken and given back at once: what a disk says is free, a quota may withhold.
    """
    needed, free = int(SPARE * size) + 1, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(None, f"{needed:,} bytes are needed and {free:,} are free; free some, or --runs-dir")
    if hasattr(os, "posix_fallocate"):
        with tempfile.TemporaryFile(dir=folder) as space:
            os.posix_fallocate(space.fileno(), 0, needed)


def _written(folder: Path, step: int, arrays: dict, digests: dict, about: dict) -> str:
    """Write a checkpoint aside and give it its name; why that could not be, in one line, or nothing."""
    aside, logged = folder / f"{step}.part", logging.root.manager.disable
    logging.disable(logging.ERROR)  # orbax logs each of its writes that failed; one message is enough
    try:
        folder.mkdir(parents=True, exist_ok=True)
        manifest.sync(folder.parent)
        _ask_for_room(folder, sum(leaf.nbytes for leaf in arrays.values()))
        _remove(aside)
        with _orbax() as writer:
            writer.save(aside.absolute() / STATE, args=ocp.args.PyTreeSave(leaves.nested(arrays)))
        manifest.write(aside, step, digests, about)
        os.rename(aside, folder / str(step))
        manifest.sync(folder)
    except Exception as error:  # orbax raises bare ValueError and others, such as for a full disk
        _give_back(aside)
        return str(getattr(error, "strerror", None) or error).partition("\n")[0] or type(error).__name__
    finally:
        logging.disable(logged)
    return ""


def _give_back(aside: Path) -> None:
    """Delete what was half written, so that a full disk gets its space back; orbax may be writing on for a moment."""
    for _ in range(20):
        shutil.rmtree(aside, ignore_errors=True)
        if not aside.exists():
            return
        time.sleep(0.05)


def _sweep() -> None:
    """Let go of orbax's other writes, when one failed, without a page of "Exception ignored in" on stderr."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None
    gc.collect()
    sys.unraisablehook = before


def _forget(folder: Path) -> None:
    """Delete checkpoints beyond the newest `KEPT`, if one more than the newest of these is good."""
    *others, _ = kept = steps(folder)[-KEPT:]
    old = steps(folder)[: -len(kept)]
    if not (old and any(_is_good(folder / str(step)) for step in reversed(others))):
        return
    try:
        for step in old:
            gone = folder / f"{step}.gone"
            os.rename(folder / str(step), gone)  # at once, so that no half-deleted checkpoint has a number
            _remove(gone)
    except OSError as error:
        warnings.warn(f"the new checkpoint is saved, but an old one cannot be deleted: {error}", stacklevel=2)


def _is_good(place: Path) -> bool:
    try:
        return bool(manifest.verify(place))
    except (Damaged, Refused):
        return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)


def _orbax() -> ocp.Checkpointer:
    """A new writer or reader, since one that failed raises its old error again; it returns when all is written."""
    # else each copy of an array writes a share of it, and every share is first compiled: seconds, to save milliseconds
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry))
