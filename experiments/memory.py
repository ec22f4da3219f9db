"""Where does the memory of a step go, and what does computing again save?  What lectures claim, measured.

1. *Activations dominate.* The predicted bill of steps of usual sizes, and of small ones next to the compiled step.
   Expect: true where there are many rows of data for each weight, as of convnets and long batches; else weights do.
2. *Storage against depth* (`memory_depth.py`). Temporary bytes of compiled steps, fitted as c + k depth^p, with c for
   one block at work. Expect p = 1 for residual stacks, also with `remat=block` (k is smaller); 1/2 for `sqrt`, 1/3 for
   `nested:3`, no growth for `binomial:4`; 2 for a densely connected chain, each layer of which takes all before it and
   stores the concatenation (1 + 2 + .. + n arrays, and some for each layer, so p is a little less). Depths of
   nested segments are the nearest that they divide.
3. *25 % more compute saves 80 % of the memory* (`memory_trade.py`): of residual networks, batch 16, 16 bits, one copy
   of the weights, inputs of blocks kept, total = weights + activations. Flops are counted in the trace, and so are
   bytes: XLA for CPU keeps float32 beside bfloat16. Expect at most a quarter of the *new* total, since the work of 4
   forward passes instead of 3 is a third of the old one. And *a step takes 20-30 % longer*:
   two small ones, timed in turn on this machine.
4. *Bytes that a transformer's layer keeps* (`memory_layer.py`): what is found in the trace of ours, next to the
   formulas of Korthikanti et al. 2022, arXiv:2205.05198, table 2.

Section 2 compiles large programs, and only section 3 runs any, small ones: some minutes on 2 idle cores. With
`--topology v6e:1x1` (needs libtpu; minutes for each of six steps) section 3 is compiled for that chip too, which keeps
16 bits, but pads dims to its tiles.

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

from experiments import memory_depth, memory_layer, memory_trade
from experiments.memory_layer import parts_of
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
SECTIONS = ("bills", "depth", "trade", "time", "layer")


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        name: the folder in --runs-dir.
        runs_dir: where folders of runs lie.
        overwrite: write over the table that is there.
        depths: of stacks, with commas between them, at least three.
        repeats: how often each of two steps is timed.
        topology: a chip to compile section 3 for as well, such as v6e:1x1; none if empty.
    """

    name: str = "memory"
    runs_dir: str = "runs"
    overwrite: bool = False
    depths: str = "4,16,64,256,1024"
    repeats: int = 9
    topology: str = ""


def bill(name: str, case: tuple) -> dict:
    """Predicted bytes of a step by category; of a small one also those of the compiled step.

    Not all of them are data: XLA for CPU also copies weights, slices of stacks and transposed ones. So `of_data` is the
    share that comes on top if the batch is twice as large.
    """
    from jaxpar.report import memory
    from jaxpar.step.program import program

    model, batch, side, plan = case
    parts = parts_of(*case)
    found, twice = ({"case": name} | memory.predicted(one) for one in (parts, parts_of(model, 2 * batch, side, plan)))
    between, more = (one["activations"] + one["transient"] for one in (found, twice))
    everything = sum(found[kind] for kind in KINDS)
    found |= {"share": between / everything, "of_data": max(0, more - between) / everything}
    if name in SMALL:
        made = program(parts)
        said = made.step.lower(made.shapes, made.batch).compile().memory_analysis()
        fresh = said.output_size_in_bytes - said.alias_size_in_bytes
        found["compiled"] = said.argument_size_in_bytes + said.temp_size_in_bytes + fresh
    return found


def measured(options: Options, depths: list[int]) -> dict[str, list[dict]]:
    """The rows of each section; the time that is left goes to stderr."""
    work = [("bills", partial(bill, *case)) for case in (BILLS | SMALL).items()]
    work += [("depth", partial(memory_depth.growth, *key, depths)) for key in memory_depth.GROWTH]
    work += [("trade", partial(memory_trade.trade, name, options.topology)) for name in memory_trade.TRADED]
    work += [("time", partial(memory_trade.timed, name, options.repeats)) for name in memory_trade.TIMED]
    work += [("layer", partial(memory_layer.transformer, *key)) for key in memory_layer.CLAIMED]
    found, began = {section: [] for section in SECTIONS}, time.perf_counter()
    for done, (section, one) in enumerate(work, 1):
        rows = one()
        found[section].extend(rows if isinstance(rows, list) else [rows])
        left = (time.perf_counter() - began) / done * (len(work) - done)
        print(f"  {done} of {len(work)}, about {left:.0f} s left", file=sys.stderr, flush=True)
    return found


def table(rows: list[dict]) -> str:
    """The bills as text."""
    head = ["step", *KINDS, "total", "activations are", "of data", "compiled"]
    lines = []
    for row in rows:
        sizes = [f"{row[kind] / 1e6:,.1f}" for kind in (*KINDS, "total")]
        compiled = f"{row['compiled'] / 1e6:,.1f}" if "compiled" in row else ""
        lines.append([row["case"], *sizes, f"{row['share']:.0%}", f"{row['of_data']:.0%}", compiled])
    return "1. Activations dominate? MB of a step, predicted\n" + aligned(head, lines, head[1:])


def picture(path: Path, found: dict[str, list[dict]]) -> Path:
    """Four panels: the bill, memory against depth, the trade, and a layer's bytes beside the paper's."""
    figure = Figure(figsize=(12, 8.5), dpi=130, layout="constrained")
    (bills, depth), (trades, layers) = figure.subplots(2, 2)
    draw(bills, found["bills"])
    memory_depth.draw(depth, found["depth"])
    memory_trade.draw(trades, found["trade"])
    memory_layer.draw(layers, found["layer"])
    for axes in (bills, depth, trades, layers):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def draw(axes, rows: list[dict]) -> None:
    """Shares of categories, a bar for each step."""
    places = range(len(rows))
    below = [0.0] * len(rows)
    for number, kind in enumerate(KINDS):
        sizes = [100 * row[kind] / sum(row[one] for one in KINDS) for row in rows]
        axes.barh(places, sizes, left=below, color=COLORS[number], label=kind, height=0.65)
        below = [a + b for a, b in zip(below, sizes, strict=True)]
    for place, row in zip(places, rows, strict=True):
        total = row["total"] / 1e9
        told = f"{total:.1f} GB" if total >= 1 else f"{1e3 * total:.0f} MB"
        axes.text(101, place, f"{told}, data {row['of_data']:.0%}", va="center", fontsize=8)
    axes.set_yticks(list(places), [row["case"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 128), xticks=range(0, 101, 20), xlabel="% of a step's bytes, float32 and Adam, predicted")
    axes.legend(frameon=False, fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.4, 1.0), columnspacing=1)
    axes.set_title("1. Activations dominate where data is plenty", loc="left", fontsize=10, pad=22)


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
    texts = [table(found["bills"]), memory_depth.table(found["depth"])]
    texts += [memory_trade.table(found["trade"], found["time"]), memory_layer.table(found["layer"])]
    print("\n\n".join(texts))
    (folder / "table.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"\npicture: {picture(folder / 'memory.png', found)}\ntable: {folder / 'table.json'}")


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}", Options()))
