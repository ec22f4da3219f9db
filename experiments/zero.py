"""What does ZeRO hold and send?  The paper's table from shapes alone, and the compiled programs of a small model.

First the table that everyone quotes: 7.5B parameters on 64 devices, mixed precision with Adam, so 2 bytes of a weight,
2 of its gradient and 12 of the optimizer (float32 copy and two moments). Expect 120 GB a device without ZeRO, and 31.4,
16.6 and 1.9 GB with stages 1, 2 and 3. No array is made: the shapes are those of a GPT of 36 layers and width 4096 (its
MLP a little wider than four times, to come to 7.5B), split as `plan.zero` splits them. Below it the same for a step of
jaxpar's as it is today, float32 throughout: 4 + 4 + 8 bytes.

Then a small model on 8 simulated devices, each stage compiled: the bytes of its arguments, predicted and as
`memory_analysis` says; and what each device sends in a step in units of the parameters, counted in the compiled
program. Expect 2, 2, 2 and 3 times the parameters (times 7/8, the share that a ring of 8 sends: the table divides it
out) if the batch is one microbatch; 3 is a little less here, since what no block holds is gathered once. With M
microbatches stage 2 scatters M times, and stage 3 also gathers 2 M times, or once with `regather=false`. Where
lectures draw stage 1 as an all-reduce of gradients and an all-gather of parameters, that is 3 times: so it comes from
XLA for CPU, which turns no all-reduce into a reduce-scatter, when it is left to it (`partition=auto`).
(Rajbhandari et al. 2020, arXiv:1910.02054, figure 1 and section 7.)

Two minutes on 2 idle cores; nothing is trained.

    python -m experiments.zero
    python -m experiments.zero --devices 1024 --name thousand
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.scaling import parts_of
from jaxpar import Model, Refused
from jaxpar.cli import exit_codes, flags
from jaxpar.core.refuse import Problem
from jaxpar.report.columns import aligned
from jaxpar.train.folder import of_study

LARGE = Model("gpt", layers=36, width=4096, heads=32, hidden=16512, context=1024, vocab=51200)
SMALL = Model("gpt", layers=8, width=128, heads=4, context=32, vocab=256)
STAGES = ("zero=0", "zero=1", "zero=2", "zero=3")
CLAIMED = {"zero=0": 120.0, "zero=1": 31.4, "zero=2": 16.6, "zero=3": 1.9}  # GB, on 64 devices
KINDS = ("parameters", "gradients", "optimizer")
SENT = {  # plan of 8 devices, and what is claimed to be sent, in parameters
    "zero=0": "2",
    "zero=1": "2",
    "zero=2": "2",
    "zero=3": "3",
    "zero=1,partition=auto": "3",
    "zero=1,zero_group=4": "2 within 4 devices, 2/4 between",
    "zero=1,microbatches=4": "2",
    "zero=2,microbatches=4": "4 + 1",
    "zero=3,microbatches=4": "4 x 3",
    "zero=3,regather=false,microbatches=4": "4 + 1",
}


@dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
        name: the folder in --runs-dir.
        runs_dir: where folders of runs lie.
        overwrite: write over the table that is there.
        devices: that share the large model; the paper's figures are for 64.
    """

    name: str = "zero"
    runs_dir: str = "runs"
    overwrite: bool = False
    devices: int = 64


def large(stage: str, devices: int) -> dict:
    """Bytes that each device holds of the large model: in mixed precision as the paper has it, and in float32."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxpar.plan import layout
    from jaxpar.report import memory

    parts = parts_of(LARGE, devices, f"data={devices},{stage}", "fp32")
    held = memory.held(parts)
    params = jax.eval_shape(parts.model.init, jax.random.key(0))[0]
    zero, scheme = parts.settings.zero, parts.settings.placement.scheme

    def share(tree, since: int) -> int:
        leaves = zip(jax.tree.leaves(tree), zero.leaves(), strict=True)
        return sum(
            leaf.size * leaf.dtype.itemsize // layout.size(scheme, layout.axes_of(rest.layout(zero.stage, since)))
            for leaf, rest in leaves
        )

    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    moments = jax.eval_shape(optax.scale_by_adam().init, params)
    optimizer = sum(share(tree, 1) for tree in (params, moments.mu, moments.nu))  # the first is the float32 copy
    mixed = {"parameters": share(weights, 3), "gradients": share(weights, 2), "optimizer": optimizer}
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    return {"stage": stage, "count": count, "mixed": mixed, "float32": {kind: held[kind] for kind in KINDS}}


def small(plan: str) -> dict:
    """Arguments of the small model's step, predicted and compiled; and what a device sends, in parameters."""
    import jax

    from jaxpar.report import bill, memory
    from jaxpar.step.program import program

    parts = parts_of(SMALL, 32, f"data=8,{plan}", "fp32")
    made = program(parts)
    compiled = made.step.lower(made.shapes, made.batch).compile()
    said, held = compiled.memory_analysis(), memory.held(parts)
    once = 4 * sum(leaf.size for leaf in jax.tree.leaves(made.unpadded.params))
    sent = {}
    for (axes, kind), size in bill.counted_in(parts, compiled.as_text()).sent.items():
        ring = math.prod(made.mesh.shape[axis] for axis in axes.split("+"))
        sent[kind] = sent.get(kind, 0.0) + size / once * ring / (ring - 1)
    found = {
        "predicted": sum(held.values()) - held["gradients"] + made.shapes.step.dtype.itemsize,
        "arguments": said.argument_size_in_bytes,
    }
    return {"plan": f"data=8,{plan}", "claimed": SENT[plan], "temp": said.temp_size_in_bytes, "sent": sent} | found


def picture(path: Path, rows: list[dict], devices: int, lines: dict[str, list[tuple[int, float]]]) -> Path:
    """What a device holds by stage, and against the number of devices."""
    from matplotlib.figure import Figure

    from jaxpar.report.pictures import COLORS

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    bars, curves = figure.subplots(1, 2)
    for number, kind in enumerate(KINDS):
        sizes = [row["mixed"][kind] / 1e9 for row in rows]
        below = [sum(row["mixed"][one] for one in KINDS[:number]) / 1e9 for row in rows]
        bars.bar([row["stage"] for row in rows], sizes, bottom=below, color=COLORS[number], label=kind, width=0.6)
    for place, row in enumerate(rows):
        total = sum(row["mixed"].values()) / 1e9
        said = f", paper {CLAIMED[row['stage']]:g}" if devices == 64 else ""
        offset = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        bars.annotate(f"{total:.1f}{said}", (place, total), **offset)
    bars.set_title(f"{rows[0]['count'] / 1e9:.2f}B parameters on {devices} devices", loc="left", fontsize=10)
    bars.legend(frameon=False, fontsize=8)
    for number, (stage, line) in enumerate(lines.items()):
        counts, sizes = zip(*line, strict=True)
        curves.plot(counts, sizes, "o-", ms=3, color=COLORS[number], label=stage)
    curves.set(xscale="log", yscale="log", xlabel="devices that share")
    curves.set_title("as more devices share", loc="left", fontsize=10)
    curves.legend(frameon=False, fontsize=8)
    for axes in (bars, curves):
        axes.set_ylabel("GB of a device, mixed precision")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def main(options: Options) -> None:
    """What each stage of ZeRO holds and sends: the paper's table from shapes, and a small model compiled."""
    from jaxpar.plan.mesh import devices

    if options.devices < 2:
        raise Refused([Problem("devices", options.devices, "must be at least 2.", "64")])
    folder = of_study(options.runs_dir, options.name, options.overwrite)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    devices(8)

    table = [large(stage, options.devices) for stage in STAGES]
    print(f"{table[0]['count']:,} parameters on {options.devices} devices, GB of each (billions of bytes):")
    head, lines = ["stage", *KINDS, "mixed precision", "paper", "float32"], []
    for row in table:
        total = sum(row["mixed"].values())
        said = f"{CLAIMED[row['stage']]:.1f}" if options.devices == 64 else ""
        sizes = [f"{row['mixed'][kind] / 1e9:.2f}" for kind in KINDS]
        lines.append([row["stage"], *sizes, f"{total / 1e9:.1f}", said, f"{sum(row['float32'].values()) / 1e9:.1f}"])
    print(aligned(head, lines, head[1:]), flush=True)

    print("\nA small model on 8 simulated devices, compiled:", flush=True)
    rows, began = [], time.perf_counter()
    for done, plan in enumerate(SENT, 1):
        rows.append(small(plan))
        left = (time.perf_counter() - began) / done * (len(SENT) - done)
        print(f"  {done} of {len(SENT)}, about {left:.0f} s left", file=sys.stderr, flush=True)
    kinds = ("all_reduce", "reduce_scatter", "all_gather")
    head = [
        "plan",
        "arguments",
        "predicted",
        "temporary",
        *(kind.replace("_", "-") for kind in kinds),
        "sent",
        "claimed",
    ]
    lines = []
    for row in rows:
        sizes = [f"{row[key]:,}" for key in ("arguments", "predicted", "temp")]
        sent = [f"{row['sent'].get(kind, 0):.3f}" for kind in kinds]
        lines.append([row["plan"], *sizes, *sent, f"{sum(row['sent'].values()):.3f}", row["claimed"]])
    print(aligned(head, lines, head[1:-1]))
    print("arguments, predicted, temporary: bytes of a device; sent: times the parameters, of a ring of any size")

    counts = [2**power for power in range(11)]
    curves = {stage: [] for stage in STAGES}
    for stage in STAGES:
        for count in counts[1:]:
            curves[stage].append((count, sum(large(stage, count)["mixed"].values()) / 1e9))
    (folder / "table.json").write_text(json.dumps({"large": table, "small": rows}, indent=2) + "\n", encoding="utf-8")
    drawn = picture(folder / "zero.png", table, options.devices, curves)
    print(f"picture: {drawn}\ntable: {folder / 'table.json'}")


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}", Options()))
