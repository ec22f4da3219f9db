"""Does online norm help recurrent networks, and more than layer norm does?  A character model of one layer.

An RNN (tanh) and an LSTM, with no norm, layer norm and online norm inside the cells: one norm for each gate, on the sum
of its products, and in the LSTM one on the cell. All runs of one model see the same batches from the same weights; each
norm has the learning rate of those tried with which it ends best on held-out text.

Expect the order of Chiley et al. 2019 (arXiv:1905.05894, section 5; medians of its published code): perplexity per
*word* of Penn Treebank, one layer of 200, batches of 20 sequences of 128 words, SGD:

    RNN   none 172.0   layer 141.9   online 129.2         LSTM   none 124.4   layer 121.6   online 113.4

Here perplexity is per *byte* of other text, in a run of minutes and with Adam, so that only the order compares, and
what a norm takes off the perplexity without one. Decays are per example, and a recurrence has an example at each
position of each sequence: 1 - 2^-14 forward and 1 - 2^-7 back for the RNN (2^-13 and 2^-5 for the LSTM) average over
6.4 (3.2) and 1/20 (1/80) of the examples of a step of the paper. Here they do over as many steps.

The text is Python's own source; with --data-dir FOLDER it is the tiny Shakespeare that lies there. Some five minutes on
2 idle cores.

    python -m experiments.recurrent
    python -m experiments.recurrent --steps 3000 --seeds 3 --name long
    python -m experiments.recurrent --data-dir ../data/text --name shakespeare
"""

import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from jaxpar import Data, Model, Recipe
from jaxpar.cli import exit_codes, flags
from jaxpar.core.refuse import Problem, refuse
from jaxpar.report.columns import aligned
from jaxpar.train.folder import of_study

BASE = Recipe(Model(layers=1, width=128, hidden=128, context=64), Data("stdlib_text"), batch=20, weight_decay=0.0)
NORMS = ("none", "layer", "online")
PUBLISHED = {  # perplexity per word of Penn Treebank, and decays of online norm: 1 - these
    "rnn": ({"none": 172.0, "layer": 141.9, "online": 129.2}, (2.0**-14, 2.0**-7)),
    "lstm": ({"none": 124.4, "layer": 121.6, "online": 113.4}, (2.0**-13, 2.0**-5)),
}
PER_STEP = 20 * 128  # examples of one step of the paper
POINTS, HELD_OUT = 8, 16  # evaluations of a run, and batches of each


@dataclass(frozen=True)
class Options:
    """What is trained.

    Attributes:
        name: the folder in --runs-dir.
        runs_dir: where folders of runs lie.
        overwrite: write over the table that is there.
        data_dir: folder with tiny Shakespeare; by default the text is Python's own source.
        models: with commas between them.
        steps: of each run.
        rates: largest learning rates to try, with commas between them.
        seeds: runs of each, whose median is told.
    """

    name: str = "recurrent"
    runs_dir: str = "runs"
    overwrite: bool = False
    data_dir: str | None = None
    models: str = "rnn,lstm"
    steps: int = 300
    rates: str = "0.003,0.01"
    seeds: int = 1


def norm_of(model: str, norm: str) -> str:
    """The norm with its arguments: online norm's decays average over as many steps as those of the paper."""
    if norm != "online":
        return norm
    times = PER_STEP / (BASE.batch * BASE.model.context)
    forward, backward = (1 - min(share * times, 0.5) for share in PUBLISHED[model][1])
    return f"online:forward={forward!r}+backward={backward!r}"


def trained(model: str, norm: str, rate: float, seed: int, options: Options) -> dict:
    """One run: perplexity on held-out text after some of its steps, and how long a step took."""
    import jax
    import numpy as np

    from jaxpar.step.parts import prepare
    from jaxpar.step.program import program

    recipe = replace(
        BASE,
        model=replace(BASE.model, name=model, norm=norm_of(model, norm)),
        data=Data("tiny_shakespeare") if options.data_dir else BASE.data,
        steps=options.steps,
        learning_rate=rate,
        seed=seed,
    )
    parts, dataset = prepare(recipe, options.data_dir)
    made = program(parts)
    state = made.init()
    step = made.step.lower(state, made.place(dataset.batch(0))).compile()
    held_out = [made.place(dataset.held_out(i)) for i in range(min(HELD_OUT, dataset.held_out_batches))]
    ends = sorted({round(options.steps * n / POINTS) for n in range(1, POINTS + 1)})
    curve, losses, seconds = [], [], 0.0
    for end in ends:
        began = time.perf_counter()
        while len(losses) < end:
            state, metrics = step(state, made.place(dataset.batch(len(losses))))
            losses.append(metrics["loss"])
        jax.block_until_ready(state)
        seconds += time.perf_counter() - began
        nats, count, *_ = np.sum([made.evaluate(state.params, state.extra, batch) for batch in held_out], 0)
        curve.append((end, math.exp(nats / count)))
    found = {"model": model, "norm": norm, "rate": rate, "seed": seed, "curve": curve, "source": dataset.source}
    return found | {"losses": [float(loss) for loss in losses], "step_ms": 1e3 * seconds / options.steps}


def summary(runs: list[dict]) -> list[dict]:
    """For each model and norm: the rate that ended best, the median over seeds, and what the paper has."""
    rows = []
    for model in dict.fromkeys(run["model"] for run in runs):
        for norm in NORMS:
            own = [run for run in runs if (run["model"], run["norm"]) == (model, norm)]
            ends = {rate: [run["curve"][-1][1] for run in own if run["rate"] == rate] for rate in _rates(own)}
            best = min(ends, key=lambda rate: statistics.median(ends[rate]))
            rows.append({"model": model, "norm": norm, "rate": best, "seeds": sorted(ends[best])})
            rows[-1] |= {"perplexity": statistics.median(ends[best]), "paper": PUBLISHED[model][0][norm]}
            rows[-1] |= {"step_ms": statistics.median(run["step_ms"] for run in own)}
            rows[-1] |= {"tried": {f"{rate:g}": statistics.median(values) for rate, values in ends.items()}}
    for row in rows:
        (plain,) = [one for one in rows if one["model"] == row["model"] and one["norm"] == "none"]
        row |= {name: row[of] / plain[of] for name, of in (("ratio", "perplexity"), ("paper_ratio", "paper"))}
        row["times"] = row["step_ms"] / plain["step_ms"]
    return rows


def _rates(runs: list[dict]) -> list[float]:
    return list(dict.fromkeys(run["rate"] for run in runs))


def table(rows: list[dict]) -> str:
    """One line for each model and norm, with the published numbers beside ours."""
    head = ["model", "norm", "rate", "per byte, here", "over none", "per word, paper", "over none", "step ms", "x none"]
    lines = []
    for row in rows:
        spread = f" ({row['seeds'][0]:.2f} to {row['seeds'][-1]:.2f})" if len(row["seeds"]) > 1 else ""
        lines.append([row["model"], row["norm"], f"{row['rate']:g}", f"{row['perplexity']:.3f}{spread}"])
        lines[-1] += [f"{row['ratio']:.3f}", f"{row['paper']:.1f}", f"{row['paper_ratio']:.3f}"]
        lines[-1] += [f"{row['step_ms']:.0f}", f"{row['times']:.1f}"]
    return aligned(head, lines, head[2:])


def picture(path: Path, runs: list[dict], rows: list[dict]) -> Path:
    """Perplexity against the step for each model, and what norms take off it, here and in the paper."""
    from matplotlib.figure import Figure

    from jaxpar.report.pictures import COLORS

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5 * len(models) + 4.5, 4.3), dpi=150, layout="constrained")
    *curves, bars = figure.subplots(1, len(models) + 1)
    for axes, model in zip(curves, models, strict=True):
        for color, row in zip(COLORS, (row for row in rows if row["model"] == model), strict=False):
            label = f"{row['norm']}: {row['perplexity']:.2f}"
            chosen = [run for run in runs if all(run[key] == row[key] for key in ("model", "norm", "rate"))]
            for run in chosen:
                axes.plot(*zip(*run["curve"], strict=True), "o-", ms=3, color=color, lw=1.4, label=label)
                label = None
        axes.set(xlabel="step", ylabel="perplexity per byte, held out", yscale="log")
        ticks = [2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        ends = [value for run in runs if run["model"] == model for _, value in run["curve"]]
        axes.set(ylim=(0.95 * min(ends), 1.05 * min(max(ends), 60)))
        axes.minorticks_off()
        axes.set_title(f"{model}: each norm at its best rate", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=9)
    for place, row in enumerate(rows):
        for shift, key, color in ((-0.2, "ratio", COLORS[0]), (0.2, "paper_ratio", "#b0b0b0")):
            bars.barh(place + shift, row[key], height=0.38, color=color)
            text = {"xytext": (3, 0), "textcoords": "offset points", "fontsize": 8, "va": "center"}
            bars.annotate(f"{row[key]:.3f}", (row[key], place + shift), **text)
    bars.set_yticks(range(len(rows)), [f"{row['model']}, {row['norm']}" for row in rows], fontsize=9)
    bars.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, 1.2), xlabel="perplexity over that without a norm")
    bars.set_title("blue: here, per byte; grey: paper, per word", loc="left", fontsize=10)
    for axes in (*curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def chosen(options: Options) -> tuple[list[str], list[float]]:
    """Models and rates of the options.

    Raises:
        Refused: naming every option that is wrong.
    """
    models, found = [name.strip() for name in options.models.split(",")], []
    for name in models:
        if name not in PUBLISHED:
            found.append(Problem("models", name, "there are no published numbers of it.", "rnn,lstm"))
    try:
        rates = [float(rate) for rate in options.rates.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(0 < rate < math.inf for rate in rates):
        found.append(Problem("rates", options.rates, "must be positive numbers with commas between.", Options.rates))
    for name, least in (("steps", 2), ("seeds", 1)):
        if getattr(options, name) < least:
            found.append(Problem(name, getattr(options, name), f"must be at least {least}.", str(least)))
    refuse(found)
    return models, rates


def main(options: Options) -> None:
    """Train character models with norms inside their cells."""
    models, rates = chosen(options)
    folder = of_study(options.runs_dir, options.name, options.overwrite)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    work = [(m, norm, r, seed) for m in models for norm in NORMS for r in rates for seed in range(options.seeds)]
    runs, began = [], time.perf_counter()
    for done, one in enumerate(work, 1):
        runs.append(trained(*one, options))
        left = (time.perf_counter() - began) / done * (len(work) - done)
        print(f"  {done} of {len(work)}, about {left:.0f} s left", file=sys.stderr, flush=True)
    rows = summary(runs)
    print(f"{runs[0]['source']}\n\n{table(rows)}\n\nperplexity on held-out text; rates tried: {options.rates}")
    written = json.dumps({"rows": rows, "runs": runs}, indent=2)
    (folder / "table.json").write_text(written + "\n", encoding="utf-8")
    print(f"picture: {picture(folder / 'recurrent.png', runs, rows)}\ntable: {folder / 'table.json'}")


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}", Options()))
