"""What a run leaves behind."""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import jax

from jaxpar.core.types import Dataset, State
from jaxpar.report.bill import Bill, as_json
from jaxpar.step.parts import Parts
from jaxpar.step.program import Program
from jaxpar.train.ahead import Compiled

SPEEDS = "step_ms", "data_ms", "tokens_per_second", "examples_per_second"


class Run(NamedTuple):
    """A finished run.

    Attributes:
        state: after the last step.
        losses: training loss of each step, in nats; nan for one that was skipped.
        held_out: (step, nats) of each evaluation.
        folder: where it is written; None if it is not.
        summary: what summary.json says.
        program: the functions it was trained by.
        parts: its model and the rest of what the recipe names.
        dataset: its data.
        bill: bytes that each device sent per step, predicted and compiled; None if no step was left to be compiled.
    """

    state: State
    losses: list[float]
    held_out: list[tuple[int, float]]
    folder: Path | None
    summary: dict
    program: Program
    parts: Parts
    dataset: Dataset
    bill: Bill | None


def finished(
    state: State,
    lines: list[dict],
    folder: Path | None,
    program: Program,
    parts: Parts,
    dataset: Dataset,
    run: Compiled,
) -> Run:
    """The run of which `lines` are all lines of metrics.jsonl."""
    losses = [_number(line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], _number(line["held_out_loss"])) for line in lines if "held_out_loss" in line]
    values = {name: [line[name] for line in lines if name in line] for name in SPEEDS}
    right = [line["held_out_accuracy"] for line in lines if "held_out_accuracy" in line]
    scales = [line["loss_scale"] for line in lines if "loss_scale" in line]
    summary = {
        "steps": int(state.step),
        "loss": next((line["loss"] for line in reversed(lines) if line.get("loss") is not None), None),
        "held_out_loss": next((line["held_out_loss"] for line in reversed(lines) if "held_out_loss" in line), None),
        **({"held_out_accuracy": right[-1]} if right else {}),
        "skipped": sum("skipped" in line for line in lines),
        **({"loss_scale": scales[-1]} if scales else {}),
        **{name: round(statistics.median(found), 3) for name, found in values.items() if found},
        "mfu": next((line["mfu"] for line in reversed(lines) if "mfu" in line), None),
        "model_flops": run.model_flops,
        "peak_flops": run.peak,
        "compile_s": round(sum(line.get("compile_s", 0) for line in lines), 3),
        "evaluate_s": round(sum(line.get("evaluate_s", 0) for line in lines), 3),
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.unpadded.params)),
        "mesh": dict(program.mesh.shape),
        "device": program.mesh.devices.flat[0].device_kind,
        "jax": jax.__version__,
        "data": dataset.source,
    }
    if run.bill:
        summary["comm"] = as_json(run.bill)
    return Run(state, losses, held_out, folder, summary, program, parts, dataset, run.bill)


def _number(value: float | None) -> float:
    """As metrics.jsonl has it: null is no number."""
    return math.nan if value is None else value
