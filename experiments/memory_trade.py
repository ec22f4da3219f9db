"""What does computing again save, and cost?  Section 3 of `experiments/memory.py`, which runs it and says more."""

import statistics
import time

from experiments.memory_layer import kept, parts_of, size
from jaxpar import Model
from jaxpar.report.columns import aligned
from jaxpar.report.pictures import COLORS

TRADED = {  # model, batch, side of an image
    "convnet": (Model("convnet", layers=16, width=64), 16, 32),
    "gpt": (Model("gpt", layers=12, width=768, heads=12, context=1024, vocab=50304), 16, 0),
}
TIMED = {
    "gpt": (Model("gpt", layers=12, width=128, heads=4, context=64, vocab=256), 16, 0),
    "convnet": (Model("convnet", layers=12, width=16), 16, 16),
}


def trade(name: str, topology: str) -> list[dict]:
    """Flops and bytes of a step in bfloat16 that keeps everything, products, or inputs of blocks."""
    import jax

    from jaxpar.report import flops
    from jaxpar.step.program import traced

    model, batch, side = TRADED[name]
    rows = []
    for policy in ("none", "dots", "block"):
        parts = parts_of(model, batch, side, f"precision=bf16,unroll=false,remat={policy}")
        trace = traced(parts)
        block, work = size(kept(parts, trace)), flops.executed(parts, trace)
        weights = 2 * sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(parts.model.init, jax.random.key(0))[0]))
        row = {"model": name, "remat": policy, "weights": weights, "kept": block * model.layers, "flops": work}
        first = rows[0] if rows else row
        row["again"] = first["kept"] // model.layers if rows else 0  # of the block that is computed again
        row["total"] = (weights + row["kept"]) / (weights + first["kept"])
        row["with_block"] = (weights + row["kept"] + row["again"]) / (weights + first["kept"])
        row |= {"of_old": work / first["flops"] - 1, "of_new": 1 - first["flops"] / work}
        row["compiled"] = temporary(parts, topology) if topology else ""
        rows.append(row)
    return rows


def temporary(parts, word: str) -> str:
    """Megabytes of temporaries of a step compiled for a chip that need not be there."""
    from jaxpar.report import compiled, topology

    try:
        return f"{compiled.compile_for(parts, topology.parse(word)).temporary / 1e6:,.1f}"
    except compiled.DoesNotFit:
        return "does not fit"


def timed(name: str, repeats: int) -> dict:
    """How much longer a small step takes with `remat=block`, in float32 on this machine: medians, in turn."""
    import jax
    import numpy as np

    from jaxpar.report import flops
    from jaxpar.step.program import program

    plans, ready, work, times = ("none", "block"), {}, {}, {"none": [], "block": []}
    for policy in plans:
        parts = parts_of(*TIMED[name], f"unroll=false,remat={policy}")
        made = program(parts)
        zeros = tuple(np.zeros(a.shape, a.dtype) for a in (parts.inputs, parts.labels))
        ready[policy] = [made.step, *made.step(made.init(), made.place(zeros))[:1], made.place(zeros)]
        work[policy] = flops.executed(parts)
    for turn in range(repeats + 1):
        for policy in plans if turn % 2 else plans[::-1]:
            step, state, batch = ready[policy]
            began = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch))
            times[policy].append(time.perf_counter() - began)
            ready[policy][1] = state
    pairs = zip(times["block"][1:], times["none"][1:], strict=True)
    ratios = sorted(block / none - 1 for block, none in pairs)
    quarter = len(ratios) // 4
    found = {"model": name, "longer": statistics.median(ratios), "half": [ratios[quarter], ratios[-1 - quarter]]}
    return found | {"flops": work["block"] / work["none"] - 1}


def table(rows: list[dict], times: list[dict]) -> str:
    """What was traded and timed as text."""
    head = ["stack", "remat", "weights", "kept", "and a block", "saved", "with the block"]
    head += ["flops of the old total", "of the new", "compiled"]
    lines = []
    for row in rows:
        sizes = [f"{row[key] / 1e6:,.1f}" for key in ("weights", "kept", "again")]
        shares = [f"{one:.1%}" for one in (1 - row["total"], 1 - row["with_block"], row["of_old"], row["of_new"])]
        lines.append([row["model"], row["remat"], *sizes, *shares, row["compiled"]])
    text = ["3. 25 % more compute saves 80 %? MB in bfloat16, from the trace", aligned(head, lines, head[2:])]
    head, lines = ["timed, float32", "flops", "longer", "middle half of pairs"], []
    for row in times:
        shares = [f"{one:+.1%}" for one in (row["flops"], row["longer"], *row["half"])]
        lines.append([row["model"], *shares[:2], " to ".join(shares[2:])])
    text += ["\n20-30 % slower? remat=block against none, in turn, on this machine", aligned(head, lines, head[1:])]
    return "\n".join(text)


def draw(axes, rows: list[dict]) -> None:
    """What is left of the memory against what more is computed."""
    for number, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        here = [row for row in rows if row["model"] == name]
        across, up = ([100 * row[key] for row in here] for key in ("of_new", "with_block"))
        axes.plot(across, up, "o-", color=COLORS[number], label=name)
        for x, y, row in zip(across, up, here, strict=True):
            offset = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 8, "color": COLORS[number]}
            axes.annotate(row["remat"], (x, y), **offset)
    axes.plot([25], [20], "k*", ms=11, label="claimed: 25 %, 20 % left", zorder=0)
    axes.set(xlim=(-1, 30), ylim=(0, 108), xlabel="% of the new total of flops that is computed again")
    axes.set_ylabel("% of the memory: weights, what is kept, a block")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("3. 25 % more compute saves 80 % of the memory", loc="left", fontsize=10)
