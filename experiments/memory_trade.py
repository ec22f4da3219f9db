"""What does computing again save, and cost?  Section 3 of `experiments/memory.py`, which runs it and says more."""

import statistics
import time

from experiments.memory_layer import kept, parts_of, size
from jaxpar import Model

TRADED = {  # model, batch, side of an image
    "convnet": (Model("convnet", layers=16, width=64), 16, 32),
    "gpt": (Model("gpt", layers=12, width=768, heads=12, context=1024, vocab=50304), 16, 0),
}
TIMED = {
    "gpt": (Model("gpt", layers=12, width=128, heads=4, context=64, vocab=256), 16, 0),
    "convnet": (Model("convnet", layers=12, width=32), 16, 16),
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
