"""What a trained byte-level language model writes: from a run in memory, or from the checkpoint of one on the disk."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Problem, Refused, refuse
from jaxpar.core.types import State
from jaxpar.plan import padding
from jaxpar.step.generate import Trained, generate
from jaxpar.step.parts import Parts, assemble, prepare
from jaxpar.step.program import Program, program
from jaxpar.train import checkpoint, folder, record
from jaxpar.train.manifest import Damaged
from jaxpar.train.run import Run

MOST = 1_000_000  # bytes at once
COLDEST = 1e-6  # logits over less would overflow


class Writer(NamedTuple):
    """A language model of bytes, and how many of the last ones it sees."""

    trained: Trained
    window: int


def sample(
    run: Run | Writer | str | Path,
    prompt: str,
    *,
    count: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """Continue `prompt` by `count` bytes, on one device whatever the plan of the run.

    Args:
        run: of a model of bytes: from `fit`, or the folder of one, or what `restored` gave.
        prompt: at least one character.
        count: bytes to add.
        temperature: what logits are divided by, above 0; small values keep to the likeliest bytes.
        top_k: draw from that many of the likeliest bytes; by default from all.
        seed: of the draws.

    Returns:
        Prompt and continuation; bytes that are no UTF-8 as replacement characters.

    Raises:
        Refused: if the run is none or not of text, the prompt is empty or a number out of range.
    """
    refuse(wrong(prompt, count, temperature, top_k, seed))
    if isinstance(run, Run):
        run = _writer(run.program, run.parts, run.state, run.dataset.classes)
    elif not isinstance(run, Writer):
        run = restored(Path(run))
    found = generate(
        run.trained,
        [*prompt.encode()],
        count=count,
        window=run.window,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    return bytes(found.astype(np.uint8)).decode(errors="replace")


def restored(
    path: Path,
    step: int | None = None,
    data_dir: str | None = None,
    note: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Writer:
    """The model of the run in the folder `path`, on one device of those that there are.

    Its precision is that of the run; everything else of its plan is left behind.

    Args:
        path: of the run.
        step: of the checkpoint; by default the newest that is good.
        data_dir: with the files of the dataset, for checkpoints that do not say the shapes of a batch.
        note: is told of damaged checkpoints that were passed over.

    Raises:
        Refused: if it is no run, has no such checkpoint, cannot be read or is not of text.
    """
    chosen = record.recipe(path / folder.RECIPE, "run")
    there = checkpoint.steps(path / folder.CHECKPOINTS)
    if not there:
        rule = f"{path} has no checkpoint yet."
        raise Refused([Problem("run", path.name, rule, "a run with one; --checkpoint-every makes them come sooner")])
    if step is not None and step not in there:
        legal = ", ".join(map(str, there))
        raise Refused([Problem("step", step, f"{path} has no checkpoint of this step.", legal)])
    checkpoints = path / folder.CHECKPOINTS
    parts, classes = _parts(_on_one_device(chosen), _batch(checkpoints, there if step is None else [step]), data_dir)
    refuse(_not_text(parts, classes))
    laid_out = program(parts)
    try:
        if step is not None:
            state = checkpoint.restore(checkpoints, laid_out, step)
        else:
            found = checkpoint.newest(checkpoints, laid_out, note)
            if found is None:  # deleted just now
                raise Refused([Problem("run", path.name, f"{path} has no checkpoint any more.", "another run")])
            state = found.state
    except Damaged as damaged:
        legal = "another --step, or none for the newest that is good"
        raise Refused([Problem("step", step, f"{damaged}.", legal)]) from damaged
    return _writer(laid_out, parts, state, classes)


def _batch(checkpoints: Path, steps: Sequence[int]) -> dict | None:
    """What the newest manifest that can be read says of a batch."""
    for step in reversed(steps):
        with suppress(Damaged):
            return checkpoint.described(checkpoints, step)["about"].get("batch")
    return None


def _on_one_device(chosen: Recipe) -> Recipe:
    kept = Plan(precision=chosen.plan.precision, reducer=chosen.plan.reducer)
    return dataclasses.replace(chosen, plan=kept)


def _parts(chosen: Recipe, said: dict | None, data_dir: str | None) -> tuple[Parts, int]:
    """The parts of a run, and the number of its classes: without its data, if the checkpoint says its shapes."""
    if said is None:
        parts, dataset = prepare(chosen, data_dir)
        return parts, dataset.classes
    shapes = (jax.ShapeDtypeStruct(tuple(said[key]["shape"]), said[key]["dtype"]) for key in ("inputs", "labels"))
    return assemble(chosen, *shapes, said["classes"]), said["classes"]


def _writer(laid_out: Program, parts: Parts, state: State, classes: int) -> Writer:
    refuse(_not_text(parts, classes))
    like = laid_out.unpadded
    params, extra = (
        padding.unpad(laid_out.placement, words, jax.tree.map(np.asarray, tree), to)
        for words, tree, to in zip(laid_out.words[1:3], state[1:3], like[1:3], strict=True)
    )
    return Writer(Trained(parts.model, parts.settings, params, extra), parts.inputs.shape[1])


def _not_text(parts: Parts, classes: int):
    if len(parts.labels.shape) != 2 or classes > 256:
        rule = f"is of a model of {classes} classes with labels of shape {[*parts.labels.shape]}, not of bytes of text."
        yield Problem("run", "this run", rule, "one whose data is text, such as stdlib_text")


def wrong(prompt: str, count: int, temperature: float, top_k: int | None, seed: int) -> Iterator[Problem]:
    """What `sample` cannot be asked for; arguments as there."""
    if not prompt:
        yield Problem("prompt", repr(prompt), "must have at least one character.", "'def '")
    elif not prompt.isprintable() and any(0xD800 <= ord(letter) < 0xE000 for letter in prompt):
        yield Problem("prompt", repr(prompt), "must be text.", "'def '")
    if not 1 <= count <= MOST:
        yield Problem("count", count, f"must lie in 1 to {MOST:,}.", "200")
    if not COLDEST <= temperature <= 1 / COLDEST:
        rule = f"must lie in {COLDEST:g} to {1 / COLDEST:g}."
        yield Problem("temperature", temperature, rule, "0.8; 0.01 for the likeliest bytes")
    if top_k is not None and top_k < 1:
        yield Problem("top_k", top_k, "must be at least 1.", "40, or none for all")
    if not 0 <= seed < 2**32:
        yield Problem("seed", seed, "must fit in 32 bits.", f"0 to {2**32 - 1}")
