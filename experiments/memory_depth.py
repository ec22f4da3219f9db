"""How does the memory of a step grow with depth?  Section 2 of `experiments/memory.py`, which runs it and says more.

Stacks of the package under several `remat`, and a densely connected chain, which is a model of this file: compiled, and
fitted by a law. (Chen et al. 2016, arXiv:1604.06174; Huang et al. 2016, arXiv:1608.06993.)
"""

import math
from dataclasses import replace

from matplotlib.ticker import NullLocator

from experiments.memory_layer import kept, parts_of, size
from jaxpar import Model
from jaxpar.report.columns import aligned
from jaxpar.report.pictures import COLORS

STACKS = {  # as above; many rows of data for each weight, so that slices of weights hide nothing
    "mlp": (Model("mlp", width=16), 32768, 4),
    "convnet": (Model("convnet", width=8), 128, 16),
    "gpt": (Model("gpt", width=16, heads=4, context=64, vocab=64), 256, 0),
    "connected": (Model(f"{__file__}:connected", width=16), 8192, 4),
}
POLICIES = {"none": "1", "block": "1", "sqrt": "1/2", "nested:3": "1/3", "binomial:4": "0"}
GROWTH = {("mlp", policy): p for policy, p in POLICIES.items()} | {
    (name, policy): POLICIES[policy] for name in ("convnet", "gpt") for policy in ("none", "block", "sqrt")
}
GROWTH["connected", "none"] = "2"
CONNECTED = (8, 16, 32, 64)  # layers of a densely connected chain, which is no scan


def connected(*, example: tuple[int, ...], vocab: int, layers: int, width: int):
    """A classifier whose every layer takes the concatenation of all before it, each stored for its weight's gradient.

    Args:
        example, vocab, layers, width: as of `models.mlp`.
    """
    import jax
    import jax.numpy as jnp

    from jaxpar.core.parts import chain, function, join
    from jaxpar.core.types import Layer
    from jaxpar.layers.dense import dense
    from jaxpar.layers.embedding import head

    inside = {f"layer_{n}": dense((n + 1) * width, width, "embed embed", bias=False) for n in range(layers)}
    init, dims = join(inside)

    def apply(params, extra, x, ctx):
        before = [x]
        for name in inside:
            y = ctx.dot(jnp.concatenate(before, -1), params[name]["weight"], "embed embed")
            before.append(jax.nn.relu(y))
        return before[-1], extra

    flat = function(lambda x, ctx: x.reshape(x.shape[0], -1))
    stem = dense(math.prod(example), width, "- embed")
    return chain({"flatten": flat, "stem": stem, "layers": Layer(init, apply, dims), "head": head(width, vocab)})


def growth(name: str, policy: str, depths: list[int]) -> dict:
    """Temporary bytes of compiled gradients at each depth, the law that fits them, and what is computed at the last."""
    from jaxpar.report import flops
    from jaxpar.step.program import program

    model, batch, side = STACKS[name]
    line, work = [], []
    unrolled = name == "connected"
    for depth in CONNECTED if unrolled else sorted({even(depth, policy) for depth in depths}):
        deep = replace(model, layers=depth)
        parts = parts_of(deep, batch, side, f"remat={policy}" if unrolled else f"remat={policy},unroll=false")
        made = program(parts)
        compiled = made.gradients.lower(made.shapes, made.batch).compile()
        line.append((depth, compiled.memory_analysis().temp_size_in_bytes))
    for one in ("none", policy):
        work.append(flops.executed(parts_of(deep, batch, side, f"remat={one}")))
    found = {"model": name, "remat": policy, "claimed": GROWTH[name, policy], "line": line, "work": work[1] / work[0]}
    if policy in ("none", "block") and not unrolled:  # of the last layers: compiled, and what the trace says is kept
        found["layer"] = (line[-1][1] - line[-2][1]) / (line[-1][0] - line[-2][0])
        found["traced"] = size(kept(parts))
    return found | law(line)


def even(depth: int, policy: str) -> int:
    """The depth next to this one that segments within segments divide: a square, a cube."""
    from jaxpar.plan import remat

    levels = remat.parse(policy).count if policy.startswith(("sqrt", "nested")) else 1
    return max(2, round(depth ** (1 / levels))) ** levels


def law(line: list[tuple[int, int]]) -> dict:
    """The p of c + k depth^p (c, k >= 0) that comes nearest, in relative errors; and the slope in log-log without c."""
    import numpy as np

    depths, sizes = np.array(line, float).T
    best = (np.inf, 0.0, 0.0)
    for p in np.arange(0.02, 3, 0.01):
        basis = np.stack([1 / sizes, depths**p / sizes], 1)
        (c, k), *_ = np.linalg.lstsq(basis, np.ones(len(sizes)), rcond=None)
        if c < 0:
            c, k = 0.0, float(basis[:, 1].sum() / (basis[:, 1] ** 2).sum())
        error = float(np.abs(basis @ [c, k] - 1).max())
        if k >= 0 and error < best[0]:
            best = (error, float(p), float(c))
    slope, grown = np.polyfit(np.log(depths), np.log(sizes), 1)[0], float(sizes[-1] / sizes[0])
    found = {"p": best[1], "constant": best[2], "error": best[0], "slope": float(slope), "grown": grown}
    return found | {
        "told": f"{best[1]:.2f}" if grown > 1.1 else "flat"
    }  # a power of depth says nothing of what is flat


def table(rows: list[dict]) -> str:
    """The laws as text."""
    head = ["stack", "remat", "claimed p", "p", "MB of c", "largest error", "slope without c", "grown", "flops"]
    head += ["MB a layer", "traced"]
    lines = []
    for row in rows:
        law = [
            row["told"],
            f"{row['constant'] / 1e6:.1f}",
            f"{row['error']:.1%}",
            f"{row['slope']:.2f}",
        ]
        ends = row["line"][-1][0] / row["line"][0][0]
        law += [f"{row['grown']:.1f} x in {ends:.0f} x depth", f"{row['work']:.3f} x"]
        law += [f"{row[key] / 1e6:.4f}" if key in row else "" for key in ("layer", "traced")]
        lines.append([row["model"], row["remat"], row["claimed"], *law])
    return "2. Temporary bytes, compiled: c + k depth^p\n" + aligned(head, lines, head[2:])


def draw(axes, rows: list[dict]) -> None:
    """Compiled temporary bytes against depth, in log-log."""
    for number, row in enumerate(row for row in rows if row["model"] in ("mlp", "connected")):
        chain = row["model"] == "connected"
        depths, sizes = zip(*row["line"], strict=True)
        told = "flat" if row["told"] == "flat" else f"p = {row['told']}"
        label = f"{'densely connected' if chain else 'remat=' + row['remat']}: {told}"
        style = {"marker": "s" if chain else "o", "ls": "--" if chain else "-", "ms": 4, "color": COLORS[number]}
        axes.plot(depths, [one / 1e6 for one in sizes], label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="layers", ylabel="MB of temporaries, compiled")
    ticks = sorted({depth for row in rows for depth, _ in row["line"] if depth.bit_count() == 1})
    axes.set_xticks(ticks, list(map(str, ticks)), minor=False)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("2. c + k depth^p: residual MLPs, and a densely connected one", loc="left", fontsize=10)
