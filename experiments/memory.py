"""Where does the memory of a step go, and what does computing again save?  What lectures claim, measured.

1. *Activations dominate.* The predicted bill of steps of usual sizes, and of small ones next to the compiled step.
   Expect: true where there are many rows of data for each weight, as of convnets and long batches; else Adam wins.
2. *Storage against depth* (`memory_depth.py`). Temporary bytes of compiled steps, fitted as c + k depth^p, with c for
   one block at work. Expect p = 1 for residual stacks, also with `remat=block` (k is smaller); 1/2 for `sqrt`, 1/3 for
   `nested:3`, no growth for `binomial:4`; 2 for a densely connected chain, each layer of which takes all before it and
   stores the concatenation. Depths of nested segments are the nearest that they divide.
3. *25 % more compute saves 80 % of the memory* (`memory_trade.py`): of residual networks, batch 16, 16 bits, one copy
   of the weights, inputs of blocks kept, total = weights + activations. Flops are counted in the trace, and so are
   bytes: XLA for CPU keeps float32 beside bfloat16. Expect at most a quarter of the *new* total, since 4 forward passes
   instead of 3 are a third of the old one. And *a step takes 20-30 % longer*: two small ones timed in turn here.
4. *Bytes that a transformer's layer keeps* (`memory_layer.py`): what is found in the trace of ours, next to the
   formulas of Korthikanti et al. 2022, arXiv:2205.05198, equations 1 to 4 and table 2.

Section 2 compiles large programs, and only section 3 runs any, small ones: some minutes on 2 idle cores. With
`--topology v5e:1x1` (needs libtpu) section 3 is compiled for that chip too, which keeps 16 bits.

    python -m experiments.memory
    python -m experiments.memory --depths 4,16,64 --name short
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.memory_depth import GROWTH, growth
from experiments.memory_layer import CLAIMED, PAPER, TERMS, parts_of, transformer
from experiments.memory_trade import TIMED, TRADED, timed, trade
from jaxpar import Model
from jaxpar.cli import exit_codes, flags
from jaxpar.core.refuse import Collector, Problem, refuse
from jaxpar.report.columns import aligned
from jaxpar.report.pictures import COLORS
from jaxpar.train.folder import of_study

GPT2 = Model("gpt", layers=12, width=768, heads=12, context=1024, vocab=50304)
LARGE = Model("gpt", layers=24, width=2048, heads=16, context=2048, vocab=50304)
CONVNET, MLP = Model("convnet", layers=16, width=64), Model("mlp", layers=8, width=4096)
BILLS = {  # model, batch, side of an image, plan
    "GPT 124M, 8 x 1024 tokens": (GPT2, 8, 0, "data=1"),
    "the same, remat=block": (GPT2, 8, 0, "remat=block"),
    "GPT 1.3B, 4 x 2048 tokens": (LARGE, 4, 0, "data=1"),
    "GPT 1.3B, 1 x 128 tokens": (replace(LARGE, context=128), 1, 0, "data=1"),
    "convnet, 64 images of 64 x 64": (CONVNET, 64, 64, "data=1"),
    "MLP of width 4096, 256 rows": (MLP, 256, 8, "data=1"),
}
SMALL = {
    "small GPT": (Model("gpt", layers=4, width=128, heads=4, context=64, vocab=256), 16, 0, "data=1"),
    "small GPT, few tokens": (Model("gpt", layers=12, width=256, heads=4, context=16, vocab=256), 1, 0, "data=1"),
    "small convnet": (Model("convnet", layers=3, width=32), 16, 16, "data=1"),
}
KINDS = ("parameters", "gradients", "optimizer", "activations", "transient")
WIDTHS = {"float32": 4, "bfloat16": 2, "bool": 1}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        name: the folder in --runs-dir.
        runs_dir: where folders of runs lie.
        overwrite: write over the table that is there.
        depths: of stacks, with commas between them, at least three.
        repeats: how often each of two steps is timed.
        topology: a chip to compile section 3 for as well, such as v5e:1x1; none if empty.
    """

    name: str = "memory"
    runs_dir: str = "runs"
    overwrite: bool = False
    depths: str = "4,16,64,256,1024"
    repeats: int = 9
    topology: str = ""


def bill(name: str, case: tuple) -> dict:
    """Predicted bytes of a step by category; of a small one also those of the compiled step."""
    from jaxpar.report import memory
    from jaxpar.step.program import program

    parts = parts_of(*case)
    found = {"case": name} | memory.predicted(parts)
    found["share"] = (found["activations"] + found["transient"]) / sum(found[kind] for kind in KINDS)
    if name in SMALL:
        made = program(parts)
        said = made.step.lower(made.shapes, made.batch).compile().memory_analysis()
        fresh = said.output_size_in_bytes - said.alias_size_in_bytes
        found["compiled"] = said.argument_size_in_bytes + said.temp_size_in_bytes + fresh
    return found


def measured(options: Options, depths: list[int]) -> dict[str, list[dict]]:
    """The rows of each section; the time that is left goes to stderr."""
    work = [("bills", partial(bill, *case)) for case in (BILLS | SMALL).items()]
    work += [("depth", partial(growth, *key, depths)) for key in GROWTH]
    work += [("trade", partial(trade, name, options.topology)) for name in TRADED]
    work += [("time", partial(timed, name, options.repeats)) for name in TIMED]
    work += [("layer", partial(transformer, *key)) for key in CLAIMED]
    found, began = {}, time.perf_counter()
    for done, (section, one) in enumerate(work, 1):
        rows = one()
        found.setdefault(section, []).extend(rows if isinstance(rows, list) else [rows])
        left = (time.perf_counter() - began) / done * (len(work) - done)
        print(f"  {done} of {len(work)}, about {left:.0f} s left", file=sys.stderr, flush=True)
    return found


def tables(found: dict[str, list[dict]]) -> str:
    """The rows of all sections as text."""
    head = ["step", *KINDS, "total", "activations are", "compiled"]
    lines = []
    for row in found["bills"]:
        sizes = [f"{row[kind] / 1e6:,.1f}" for kind in (*KINDS, "total")]
        compiled = f"{row['compiled'] / 1e6:,.1f}" if "compiled" in row else ""
        lines.append([row["case"], *sizes, f"{row['share']:.0%}", compiled])
    text = ["1. Activations dominate? MB of a step, predicted", aligned(head, lines, head[1:])]

    head = ["stack", "remat", "claimed p", "p", "MB of c", "largest error", "slope without c", "grown", "flops"]
    lines = []
    for row in found["depth"]:
        law = [
            row["told"],
            f"{row['constant'] / 1e6:.1f}",
            f"{row['error']:.1%}",
            f"{row['slope']:.2f}",
        ]
        ends = row["line"][-1][0] / row["line"][0][0]
        law += [f"{row['grown']:.1f} x in {ends:.0f} x depth", f"{row['work']:.3f} x"]
        lines.append([row["model"], row["remat"], row["claimed"], *law])
    text += ["\n2. Temporary bytes, compiled: c + k depth^p", aligned(head, lines, head[2:])]

    head = ["stack", "remat", "weights", "kept", "and a block", "saved", "with the block"]
    head += ["flops of the old total", "of the new", "compiled"]
    lines = []
    for row in found["trade"]:
        sizes = [f"{row[key] / 1e6:,.1f}" for key in ("weights", "kept", "again")]
        shares = [f"{one:.1%}" for one in (1 - row["total"], 1 - row["with_block"], row["of_old"], row["of_new"])]
        compiled = f"{row['compiled'] / 1e6:,.1f}" if "compiled" in row else ""
        lines.append([row["model"], row["remat"], *sizes, *shares, compiled])
    text += ["\n3. 25 % more compute saves 80 %? MB in bfloat16, from the trace", aligned(head, lines, head[2:])]
    head = ["timed, float32", "flops", "longer", "middle half of pairs"]
    lines = [
        [row["model"], f"{row['flops']:+.1%}", f"{row['longer']:+.1%}", "{:+.1%} to {:+.1%}".format(*row["half"])]
        for row in found["time"]
    ]
    text += ["\n20-30 % slower? remat=block against none, in turn, on this machine", aligned(head, lines, head[1:])]

    unit = PAPER["s"] * PAPER["b"] * PAPER["h"]
    head = ["scheme", "remat", "ours", "theirs", "ratio", "formula holds"]
    lines = []
    for row in found["layer"]:
        ours = f"{sum(row['ours'].values()) / unit:.2f}"
        told = [f"{row['theirs'] / unit:.2f}", f"{row['ratio']:.2f}", "at {} of {} shapes".format(*row["holds"])]
        lines.append([row["scheme"], row["remat"].partition(":")[0], ours, *told])
    shape = ", ".join(f"{name}={count}" for name, count in PAPER.items())
    text += [f"\n4. Bytes of a layer in units of s b h, at {shape}", aligned(head, lines, head[2:])]
    terms, lines = found["layer"][0]["terms"], []
    for term, count in terms.items():
        theirs, what = TERMS.get(term, (0, "statistics of norms and softmax, not counted in theirs"))
        lines.append(
            [term, str(count), str(count * WIDTHS[term.split()[-1]] * (4 if "4h" in term else 1)), str(theirs), what]
        )
    head = ["one_d, none", "arrays", "bytes", "theirs", "what it is"]
    return "\n".join([*text, "", aligned(head, lines, head[1:4])])


def picture(path: Path, found: dict[str, list[dict]]) -> Path:
    """Four panels: the bill, memory against depth, the trade, and a layer's bytes beside the paper's."""
    figure = Figure(figsize=(12, 8.5), dpi=130, layout="constrained")
    (bills, depth), (trades, layers) = figure.subplots(2, 2)
    draw_bills(bills, found["bills"])
    draw_depth(depth, found["depth"])
    draw_trade(trades, found["trade"])
    draw_layers(layers, found["layer"])
    for axes in (bills, depth, trades, layers):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def draw_bills(axes, rows: list[dict]) -> None:
    """Shares of categories, a bar for each step."""
    places = range(len(rows))
    below = [0.0] * len(rows)
    for number, kind in enumerate(KINDS):
        sizes = [100 * row[kind] / sum(row[one] for one in KINDS) for row in rows]
        axes.barh(places, sizes, left=below, color=COLORS[number], label=kind, height=0.65)
        below = [a + b for a, b in zip(below, sizes, strict=True)]
    for place, row in zip(places, rows, strict=True):
        total = row["total"] / 1e9
        axes.text(101, place, f"{total:.1f} GB" if total >= 1 else f"{1e3 * total:.0f} MB", va="center", fontsize=8)
    axes.set_yticks(list(places), [row["case"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 112), xlabel="% of a step's bytes, float32 and Adam, predicted")
    axes.legend(frameon=False, fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.4, 1.0), columnspacing=1)
    axes.set_title("1. Activations dominate where data is plenty", loc="left", fontsize=10, pad=22)


def draw_depth(axes, rows: list[dict]) -> None:
    """Compiled temporary bytes against depth, in log-log."""
    for number, row in enumerate(row for row in rows if row["model"] in ("mlp", "connected")):
        chain = row["model"] == "connected"
        depths, sizes = zip(*row["line"], strict=True)
        label = f"{'densely connected' if chain else 'remat=' + row['remat']}: p {row['told']}"
        style = {"marker": "s" if chain else "o", "ls": "--" if chain else "-", "ms": 4, "color": COLORS[number]}
        axes.plot(depths, [one / 1e6 for one in sizes], label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="layers", ylabel="MB of temporaries, compiled")
    ticks = sorted({depth for row in rows for depth, _ in row["line"] if depth.bit_count() == 1})
    axes.set_xticks(ticks, list(map(str, ticks)), minor=False)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("2. c + k depth^p: residual MLPs, and a densely connected one", loc="left", fontsize=10)


def draw_trade(axes, rows: list[dict]) -> None:
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


def draw_layers(axes, rows: list[dict]) -> None:
    """Bytes of a layer by dtype, beside the paper's."""
    unit = PAPER["s"] * PAPER["b"] * PAPER["h"]
    below = [0.0] * len(rows)
    for number, dtype in enumerate(WIDTHS):
        sizes = [sum(n for term, n in row["ours"].items() if term.endswith(f" {dtype}")) / unit for row in rows]
        axes.bar([n - 0.2 for n in range(len(rows))], sizes, 0.38, bottom=below, color=COLORS[number], label=dtype)
        below = [a + b for a, b in zip(below, sizes, strict=True)]
    theirs = [row["theirs"] / unit for row in rows]
    axes.bar([n + 0.2 for n in range(len(rows))], theirs, 0.38, color="#bbbbbb", label="Korthikanti et al.")
    for place, pair in enumerate(zip(below, theirs, strict=True)):
        for at, height in zip((place - 0.2, place + 0.2), pair, strict=True):
            axes.text(at, height, f"{height:.3g}", ha="center", va="bottom", fontsize=8)
    labels = [f"{row['scheme']}\n{row['remat'].partition(':')[0]}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylabel("bytes of a layer and device, in s b h")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("4. A transformer's layer in bfloat16 (22B: t = 8)", loc="left", fontsize=10)


def chosen(options: Options) -> list[int]:
    """The depths that the flags name.

    Raises:
        Refused: for fewer than three depths, one out of range, fewer than two repeats, and a topology that is none or
            has more than one device.
    """
    from jaxpar.report import topology
    from jaxpar.step.checks import MOST_LAYERS

    words, problems = [word.strip() for word in options.depths.split(",")], []
    fine = all(word.isdecimal() and 1 < int(word) <= MOST_LAYERS for word in words)
    if not fine or len(set(map(int, words))) < 3:
        rule = f"must be three different depths or more, each 2 to {MOST_LAYERS}."
        problems.append(Problem("depths", options.depths or "(nothing)", rule, Options.depths))
    if options.repeats < 2:
        problems.append(Problem("repeats", options.repeats, "must be at least 2.", str(Options.repeats)))
    where = Collector(problems).attempt(topology.parse, options.topology) if options.topology else None
    if where and where.count > 1:
        problems.append(Problem("topology", options.topology, "has several devices.", "v5e:1x1"))
    refuse(problems)
    return sorted(set(map(int, words)))


def main(options: Options) -> None:
    """Measure what is claimed of activations and of computing them again."""
    from jaxpar.plan.mesh import devices

    depths = chosen(options)
    folder = of_study(options.runs_dir, options.name, options.overwrite)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    devices(1)
    found = measured(options, depths)
    print(tables(found))
    (folder / "table.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"\npicture: {picture(folder / 'memory.png', found)}\ntable: {folder / 'table.json'}")


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}", Options()))
