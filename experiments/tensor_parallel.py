"""What does each way to spread a model over devices cost, and does it change the numbers?

Every scheme on several meshes of 8 and of 16 simulated devices, one step of a small GPT each: the largest difference of
its gradients from those of one device, the bytes that a device sends (predicted from shapes, counted in the compiled
program, and counted where XLA places the collectives of the same layouts, `partition=auto`), memory and time.

Expect: no gradient differs by more than rounding, 2e-6 of its largest entry. Predicted bytes are the compiled ones, to
the byte. Elements that a device sends in the forward pass of a block, for T tokens of width h over p devices:

    one_d, sequence:p   4 T h (p-1)/p                                   whatever p: 4 T h
    fsdp:p              12 h^2 (p-1)/p                                  less than 4 T h where T > 3 h
    two_d:rxc           [7 T h (c-1) + 12 h^2 (r-1)] / (r c)
    two_half_d:dxrxc    [7 T h (c-1)/d + 12 h^2 (r-1)] / (r c)
    three_d:ixjxk       [4 T h (j-1) + 12 h^2 (i-1) + 12 T h (k-1)] / (i j k)

and as much again backward, besides what is gathered a second time rather than kept: all of fsdp, half of sequence,
nothing of one_d. data=p sends its gradients, 24 h^2 (p-1)/p a block. Here T = 1024 and h = 128, so T = 8 h and weights
are cheap to move: data and fsdp send little, one_d much, sequence more than it; 2-D and 3-D meshes the less, the more
of their devices split rows alone; and 2.5-D ones of depth 4, or with one column, about as little as fsdp. one_d keeps
whole activations, and so takes most memory. XLA, given the same layouts, sends as much or more, in part since for CPU
it never joins a sum and a slice to a reduce-scatter. (Shoeybi et al. 2019, arXiv:1909.08053; Rajbhandari et al. 2020,
arXiv:1910.02054; Xu et al. 2021, arXiv:2104.05343; Wang et al. 2021, arXiv:2105.14500; Bian et al. 2021,
arXiv:2105.14450.)

Step times are of devices that share the cores of one machine: they say nothing of real links. Six
minutes on 2 busy cores.

    python -m experiments.tensor_parallel
    python -m experiments.tensor_parallel --devices 8 --plan data=2,tensor=three_d:1x2x2 --name one
"""

import functools
import itertools
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from jaxpar import Model, Plan, Recipe, Refused, family
from jaxpar.cli import exit_codes, parse
from jaxpar.core.refuse import Problem
from jaxpar.train.folder import of_study

BASE = Recipe(
    model=Model("gpt", layers=2, width=128, heads=16, context=64),
    batch=16,
    steps=5,  # that are timed
    optimizer="sgd",  # whose momentum after one step is the gradient
    weight_decay=0.0,
    clip=0.0,
)
DEVICES = (8, 16)
COLUMNS = {  # of the table: heading, and how a value is written
    "plan": ("plan", "{:<32}"),
    "error": ("gradient error", "{:>15.1e}"),
    "predicted": ("predicted MB", "{:>13.3f}"),
    "compiled": ("compiled MB", "{:>12.3f}"),
    "auto": ("auto MB", "{:>9.3f}"),
    "auto_error": ("auto error", "{:>11.1e}"),
    "memory": ("memory MB", "{:>10.2f}"),
    "auto_memory": ("auto memory", "{:>12.2f}"),
    "step_ms": ("step ms*", "{:>9.1f}"),
}
IN_MB = ("predicted", "compiled", "auto", "memory", "auto_memory")


def plans(devices: int) -> list[str]:
    """Every scheme of the family on two to four meshes of so many devices."""
    found = []
    for name in family.names("schemes"):
        count = len(family.parameters(family.pick("schemes", name)))
        found += [f"data={devices}"] if name == "single" else []
        for sizes in _meshes(devices, count):
            found.append(f"tensor={name}:{'x'.join(map(str, sizes))}")
        if count == 1:
            found.append(f"data=2,tensor={name}:{devices // 2}")
    return found


def _meshes(devices: int, count: int) -> list[tuple[int, ...]]:
    """The most even mesh of `count` axes in two orders, and one with a long axis in the middle."""
    even = min(_factors(devices, count), key=lambda sizes: (sum(sizes), sizes), default=())
    long = (2, devices // 2, *[1] * (count - 2)) if count > 1 else even
    return list(dict.fromkeys(sizes for sizes in (even, even[::-1], long) if sizes))


def _factors(number: int, count: int):
    if count == 0:
        return []
    choices = [size for size in range(1, number + 1) if number % size == 0]
    return [
        sizes for sizes in itertools.product(choices, repeat=count) if functools.reduce(int.__mul__, sizes) == number
    ]


def measure(recipe: Recipe, batch, classes: int, reference) -> tuple[dict, object]:
    """One row of the table, and the gradients of the first step.

    Args:
        recipe: with the plan to measure.
        batch: (inputs, labels) of a whole batch.
        classes: of the data.
        reference: gradients of one device; None if this is that one.
    """
    parts, program, compiled = _compiled(recipe, batch, classes)
    from jaxpar.report import account, hlo

    counted = hlo.count(compiled.as_text(), dict(program.mesh.shape))
    gradients, step_ms = _run(recipe.steps, program, compiled, batch)
    row = {"plan": str(recipe.plan), "compiled": sum(counted.sent.values()), "step_ms": step_ms}
    row |= {"predicted": account.predicted(parts).total_sent, "memory": _memory(compiled)}
    row |= {"error": 0.0 if reference is None else _error(gradients, reference), "warnings": list(counted.unknown)}
    return row, gradients


def measure_auto(recipe: Recipe, batch, classes: int, reference) -> dict:
    """What XLA makes of the same layouts: bytes, memory and error."""
    from jaxpar.report import hlo

    _, program, compiled = _compiled(replace(recipe, plan=replace(recipe.plan, partition="auto")), batch, classes)
    counted = hlo.count(compiled.as_text(), dict(program.mesh.shape))
    gradients, _ = _run(0, program, compiled, batch)
    row = {"auto": sum(counted.sent.values()), "auto_memory": _memory(compiled)}
    row |= {"auto_sent": {f"{kind} over {axes}": sent for (axes, kind), sent in sorted(counted.sent.items())}}
    return row | {"auto_error": _error(gradients, reference), "auto_warnings": list(counted.unknown)}


def _compiled(recipe: Recipe, batch, classes: int):
    import jax

    from jaxpar import program
    from jaxpar.step.parts import assemble

    parts = assemble(recipe, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in batch), classes)
    made = program(parts)
    return parts, made, made.step.lower(made.shapes, made.batch).compile()


def _run(steps: int, program, compiled, batch):
    """Gradients of the first step, on the host and without padding, and the median time of `steps` more, in ms."""
    import jax
    import optax

    from jaxpar.plan.padding import unpad

    placed, times = program.place(batch), []
    state, _ = compiled(program.init(), placed)
    found = jax.device_get(optax.tree_utils.tree_get(state.opt, "trace"))
    gradients = unpad(program.placement, program.words.params, found, program.unpadded.params)
    for _ in range(steps):
        began = time.perf_counter()
        state, metrics = compiled(state, placed)
        jax.block_until_ready((state, metrics))
        times.append((time.perf_counter() - began) * 1e3)
    return gradients, median(times) if times else None


def _memory(compiled) -> int:
    """Bytes of one device: its parts of state and batch, and what the step holds besides at its worst."""
    found = compiled.memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes


def _error(got, want) -> float:
    """The largest difference of any leaf, over its largest value or a thousandth of the largest of all."""
    import jax
    import numpy as np

    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    floor = 1e-3 * max(np.abs(leaf).max() for _, leaf in pairs)
    return float(max(np.abs(one - leaf).max() / max(np.abs(leaf).max(), floor) for one, leaf in pairs))


def picture(path: Path, rows: list[dict], title: str) -> Path:
    """Bars of the bytes that a device sends by plan: predicted, compiled, left to XLA; a panel per count of devices."""
    from matplotlib.figure import Figure

    counts = sorted({row["devices"] for row in rows})
    heights = [sum(row["devices"] == count for row in rows) for count in counts]
    figure = Figure(figsize=(9, 1.6 + 0.42 * sum(heights)), dpi=150, layout="constrained")
    panels = figure.subplots(len(counts), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    bars = {
        "predicted": ("#8fb8de", "predicted"),
        "compiled": ("#0b5394", "compiled"),
        "auto": ("#e0a030", "left to XLA"),
    }
    for count, axes in zip(counts, panels, strict=True):
        here = sorted((row for row in rows if row["devices"] == count), key=lambda row: row["compiled"])
        for number, (key, (color, label)) in enumerate(bars.items()):
            places = [place + 0.27 * (number - 1) for place in range(len(here))]
            axes.barh(places, [row[key] / 1e6 for row in here], height=0.27, color=color, label=label)
        axes.set_yticks(range(len(here)), [row["plan"] for row in here], fontsize=8)
        axes.set_ylim(len(here) - 0.4, -0.6)
        axes.set_title(f"{count} devices", fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("megabytes that each device sends in a step")
    panels[0].legend(frameon=False, loc="upper right", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
    return path


def written(row: dict | None = None) -> str:
    """A row of the table as text, or its head; bytes in millions."""
    cells = []
    for key, (head, form) in COLUMNS.items():
        if row is None:
            cells.append(form.replace(".1e", "").replace(".1f", "").replace(".2f", "").replace(".3f", "").format(head))
        else:
            cells.append(form.format(row[key] / 1e6 if key in IN_MB else row[key]))
    return " ".join(cells)


def main(options) -> None:
    """Measure every tensor-parallel scheme on several meshes of simulated devices."""
    from jaxpar import prepare
    from jaxpar.plan.mesh import devices, needed
    from jaxpar.step.parts import assemble
    from jaxpar.train.cache import use_cache

    recipe = replace(options.recipe, plan=replace(options.recipe.plan, partition="manual"))
    parts, dataset = prepare(recipe, options.data_dir)
    one, own = recipe.plan != Plan(), needed(recipe.plan)
    if one and options.devices not in (None, own):
        raise Refused([Problem("devices", options.devices, f"the plan {recipe.plan} needs {own}.", f"{own}")])
    counts = (own,) if one else (options.devices,) if options.devices else DEVICES
    work = [(count, plan) for count in counts for plan in ([str(recipe.plan)] if one else plans(count))]
    for _, plan in work:  # refused now, rather than after those before it
        assemble(replace(recipe, plan=Plan.parse(plan)), parts.inputs, parts.labels, dataset.classes)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA tells at length which layouts it cannot reach well
    devices(max(counts))  # all are made here; a plan takes as many as it needs
    use_cache()
    alone = replace(recipe, plan=Plan())
    folder, batch = of_study(options.runs_dir, options.name, options.overwrite), dataset.batch(0)
    first, reference = measure(alone, batch, dataset.classes, None)
    print(f"one device: {first['step_ms']:.1f} ms, {first['memory'] / 1e6:.2f} MB\n\n{written()}")

    rows, began = [], time.perf_counter()
    for done, (count, plan) in enumerate(work):
        here = replace(recipe, plan=Plan.parse(plan))
        row = {"devices": count} | measure(here, batch, dataset.classes, reference)[0]
        rows.append(row | measure_auto(here, batch, dataset.classes, reference))
        print(written(rows[-1]), flush=True)
        left = (time.perf_counter() - began) / (done + 1) * (len(work) - done - 1)
        print(f"  {done + 1} of {len(work)}, about {left:.0f} s left", file=sys.stderr, flush=True)
    print("\n* on devices that share the cores of one machine; bytes are per device and step.")
    about = {"recipe": json.loads(recipe.to_json()), "data": dataset.source, "one_device": first, "rows": rows}
    (folder / "table.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    title = f"{recipe.model.name}, {recipe.model.layers} layers of width {recipe.model.width}, batch {recipe.batch}"
    print(f"picture: {picture(folder / 'bytes.png', rows, title)}\ntable: {folder / 'table.json'}")


if __name__ == "__main__":
    with exit_codes():
        main(parse(BASE, main, "tensor_parallel", None))
