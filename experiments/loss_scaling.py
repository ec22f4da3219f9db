"""Which loss scale keeps gradients of 8 bits alive?  Too small a one flushes them to zero; a floor holds it up.

A small MLP learns digits; every factor of every product, forward and back, is rounded to e5m2, whose smallest number is
2^-16 and whose largest 57344 (emulated; sums are float32). The gradient of the loss is scaled, and all that is rounded
with it; each scale is run from the same weights and on the same batches, beside float32 without rounding.

Expect:

- of the true gradients (of float32, at the beginning, after a tenth of the steps and at the end) a scale flushes the
  fewer to zero the larger it is, and most of them at the end, when few images are still wrong;
- a scale that flushes nearly all of them trains nothing, or worse, as Adam makes full steps of what little is left. For
  ResNet-50 Mellempudi et al. 2019 (arXiv:1905.12334, section 3.1) compare 1000, 4000 and 10000: float16 does with the
  first, e5m2 needs the last. The gradients of this network are larger: its scales fail below 0.1;
- `dynamic` and `enhanced` find one by themselves. But where batches that are no numbers come again and again, `dynamic`
  takes each for an overflow and sinks, until nothing is left of gradients, for good. The floors of `enhanced`, which
  in the paper are 8192 from step 40,000 on and 32768 from 150,000 (GNMT), hold it up. Here every eighth batch is
  spoiled, and floors come after a fifth and three quarters of the steps.

What the paper says is of larger networks, so the order compares, and the numbers do not.

One to two minutes on 2 idle cores.

    python -m experiments.loss_scaling
    python -m experiments.loss_scaling --steps 1000 --name long
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from jaxpar import Data, Model, Plan, Recipe
from jaxpar.cli import exit_codes, flags
from jaxpar.core.refuse import Problem, Refused
from jaxpar.report.columns import aligned
from jaxpar.train.folder import of_study

BASE = Recipe(model=Model("mlp", layers=2, width=32), data=Data("digits"), batch=256, weight_decay=0.0)
STATIC = (0.001, 0.01, 0.1, 1.0, 1000.0, 4000.0, 10000.0)
CLAIMED = {1000.0: "worse than float32", 4000.0: "between", 10000.0: "as float32"}  # ResNet-50
INTERVAL = 50  # finite steps before a scale grows: runs are short
FLOORS = ((0.2, 8192), (0.75, 32768))  # the paper's for GNMT, from these shares of the steps on
SPOILED = 8  # of so many batches the last
LEAST, MOST = 20, 100_000


@dataclass(frozen=True)
class Options:
    """What is trained.

    Attributes:
        name: the folder in --runs-dir.
        runs_dir: where folders of runs lie.
        overwrite: write over the table that is there.
        steps: of each run.
        learning_rate: the largest.
        seed: of parameters and batches.
    """

    name: str = "loss_scaling"
    runs_dir: str = "runs"
    overwrite: bool = False
    steps: int = 300
    learning_rate: float = 3e-3
    seed: int = 0


def e5m2():
    """A policy: every factor of a product is rounded to e5m2, to nearest; what is too large is an infinity."""
    import jax.numpy as jnp

    from jaxpar.core.formats import FORMATS, nearest
    from jaxpar.core.policy import Operand, Policy

    def enter(a, site):
        return Operand(nearest(a, FORMATS["e5m2"], saturate=False)), None

    return Policy(
        cast=lambda a, role: a,
        enter=enter,
        dot=lambda multiply, a, b: multiply(a.array, b.array, jnp.float32),
        tolerance=1e-1,
    )


def spoiled(*, batch: int, seed: int):
    """A dataset: digits, every eighth batch of which no loss is a number of."""
    import numpy as np

    from jaxpar.datasets.digits import digits

    found = digits(batch=batch, seed=seed)

    def of(step):
        inputs, labels = found.batch(step)
        return (np.full_like(inputs, 3e38) if step % SPOILED == SPOILED - 1 else inputs), labels

    return found._replace(batch=of)


def trained(precision: str, loss_scale: str, data: str, options: Options) -> dict:
    """One run: its losses and scales, and what it comes to; of float32 also the true gradients at some moments."""
    import jax
    import numpy as np

    from jaxpar.step.parts import prepare
    from jaxpar.step.program import program

    own = f"{Path(__file__).resolve()}:"
    recipe = replace(
        BASE,
        data=Data(own + data if data == "spoiled" else data),
        plan=Plan(precision=own + precision if precision == "e5m2" else precision),
        loss_scale=loss_scale,
        **{name: getattr(options, name) for name in ("steps", "learning_rate", "seed")},
    )
    parts, dataset = prepare(recipe)
    made, probe = program(parts), _probe(parts) if precision == "fp32" and data == "digits" else None
    moments = {0: "beginning", options.steps // 10: "a tenth", options.steps: "end"} if probe else {}
    state, told, true = made.init(), [], {}
    for step in range(options.steps + 1):
        batch = made.place(dataset.batch(step))
        if step in moments:
            true[moments[step]] = probe(state, batch)
        if step < options.steps:
            state, metrics = made.step(state, batch)
            told.append(metrics)
    told = [{name: float(value) for name, value in metrics.items()} for metrics in jax.device_get(told)]
    held_out = [made.place(dataset.held_out(i)) for i in range(dataset.held_out_batches)]
    nats, count, right = np.sum([made.evaluate(state.params, state.extra, batch) for batch in held_out], 0)
    fine = [line["loss"] for line in told if not line["skipped"]]
    found = {"precision": precision, "loss_scale": loss_scale, "data": data, "skipped": len(told) - len(fine)}
    found |= {"loss": _mean(fine[-20:]), "held_out": float(nats / count), "accuracy": float(right / count)}
    scales = [line.get("loss_scale", 1.0) for line in told]
    curve = [None if line["skipped"] else line["loss"] for line in told]
    return found | {"curve": curve, "scales": scales, "true": true}


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def _probe(parts):
    """`probe(state, batch)`: magnitudes of all gradients that enter a product, in float32; zeros left out."""
    import jax
    import numpy as np

    from jaxpar.step.program import program

    seen, policy = [], parts.settings.policy

    def enter(a, site):
        if site.role == "gradient":
            jax.debug.callback(lambda leaf: seen.append(np.abs(leaf).ravel()), a)
        return policy.enter(a, site)

    found = program(parts._replace(settings=parts.settings._replace(policy=policy._replace(enter=enter)))).gradients

    def probe(state, batch):
        seen.clear()
        jax.block_until_ready(found(state, batch))
        jax.effects_barrier()
        every = np.concatenate(seen)
        return every[every > 0]

    return probe


def flushed(true: dict, scale: float) -> dict[str, float]:
    """The share of gradients, at each moment, that e5m2 has no number but zero for once they are scaled."""
    import numpy as np

    from jaxpar.core.formats import FORMATS, nearest

    def share(magnitudes) -> float:
        return float(np.mean(np.asarray(nearest(magnitudes * np.float32(scale), FORMATS["e5m2"])) == 0))

    return {moment: share(magnitudes) for moment, magnitudes in true.items()}


def table(rows: list[dict]) -> str:
    """One line for each run, with what it flushed and what the paper says of such a scale."""
    head = ["data", "loss scale", "at the end", "skipped", "loss", "held out", "accuracy"]
    moments, lines = [*rows[1]["flushed"]], []
    for row in rows:
        values = [f"{row['scales'][-1]:g}", row["skipped"], *(f"{row[name]:.4f}" for name in ("loss", "held_out"))]
        shares = [f"{row['flushed'][moment]:.1%}" if row["flushed"] else "" for moment in moments]
        name = "none, float32" if row["precision"] == "fp32" else row["loss_scale"].replace(f":interval={INTERVAL}", "")
        lines.append([row["data"], name, *map(str, values), f"{row['accuracy']:.3f}", *shares, row["paper"]])
    head = [*head, *(f"flushed, {moment}" for moment in moments)]
    return aligned([*head, "paper, ResNet-50"], lines, head[2:])


def picture(path: Path, rows: list[dict]) -> Path:
    """Flushed shares against the scale; losses; and the scales of `dynamic` and `enhanced`, batches spoiled or not."""
    from matplotlib.figure import Figure

    from jaxpar.report.pictures import COLORS

    figure = Figure(figsize=(15, 4.3), dpi=150, layout="constrained")
    shares, losses, scales = figure.subplots(1, 3)
    static = [row for row in rows if row["loss_scale"].startswith("static")]
    for number, moment in enumerate(static[0]["flushed"]):
        points = [(row["scales"][0], 100 * row["flushed"][moment]) for row in static]
        shares.plot(*zip(*points, strict=True), "o-", ms=4, color=COLORS[number], label=f"gradients at: {moment}")
    shares.set(xscale="log", xlabel="loss scale", ylabel="% of gradients flushed to zero", ylim=(-2, 102))
    shares.set_title("what e5m2 has no number for", loc="left", fontsize=10)
    shares.legend(frameon=False, fontsize=8)
    plain = [row for row in rows if row["data"] == "digits" and row["precision"] != "fp32"]
    losses.plot(_smooth(rows[0]["curve"]), color="black", lw=4, alpha=0.25, label="float32")
    for number, row in enumerate(plain):
        look = {"color": COLORS[number % len(COLORS)], "ls": "-" if number < len(COLORS) else "--", "lw": 1.2}
        losses.plot(_smooth(row["curve"]), **look, label=row["loss_scale"].partition(":interval")[0])
    losses.set(yscale="log", xlabel="step", ylabel="training loss, nats (mean of 10 steps)")
    losses.set_title("every batch good", loc="left", fontsize=10)
    losses.legend(frameon=False, fontsize=8)
    for number, row in enumerate(row for row in rows if row["loss_scale"].startswith(("dynamic", "enhanced"))):
        name, hurt = row["loss_scale"].partition(":")[0], row["data"] == "spoiled"
        label = f"{name}, every {SPOILED}th batch spoiled: loss {row['loss']:.3f}" if hurt else name
        scales.plot(row["scales"], color=COLORS[number], ls="-" if hurt else ":", lw=1.5, label=label)
    scales.set(yscale="log", xlabel="step", ylabel="loss scale")
    scales.set_title("scales that find their own size", loc="left", fontsize=10)
    scales.legend(frameon=False, fontsize=8)
    for axes in (shares, losses, scales):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def _smooth(curve: list[float | None]) -> list[float]:
    """Means of ten steps, those that were skipped left out."""
    known = [[value for value in curve[max(0, n - 9) : n + 1] if value is not None] for n in range(len(curve))]
    return [_mean(values) if values else float("nan") for values in known]


def main(options: Options) -> None:
    """Train a small MLP in emulated e5m2 under static, dynamic and enhanced loss scales."""
    from jaxpar.plan.mesh import devices

    if not LEAST <= options.steps <= MOST:
        raise Refused([Problem("steps", options.steps, f"must be from {LEAST} to {MOST}.", str(Options.steps))])
    folder = of_study(options.runs_dir, options.name, options.overwrite)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    devices(1)
    floors = "+".join(f"{round(share * options.steps)}={floor}" for share, floor in FLOORS)
    own = [f"dynamic:interval={INTERVAL}", f"enhanced:interval={INTERVAL}+{floors}"]
    work = [("fp32", "none", "digits"), *(("e5m2", f"static:{scale:g}", "digits") for scale in STATIC)]
    work += [("e5m2", text, "digits") for text in own] + [("fp32", "none", "spoiled")]
    work += [("e5m2", text, "spoiled") for text in own]
    rows, true, began = [], {}, time.perf_counter()
    for done, one in enumerate(work, 1):
        row = trained(*one, options)
        true = row.pop("true") or true
        row["flushed"] = flushed(true, row["scales"][-1]) if one[0] == "e5m2" else {}
        row["paper"] = CLAIMED.get(row["scales"][0], "") if one[1].startswith("static") else ""
        rows.append(row)
        left = (time.perf_counter() - began) / done * (len(work) - done)
        print(f"  {done} of {len(work)}, about {left:.0f} s left", file=sys.stderr, flush=True)
    print(table(rows))
    print("loss: mean of the last 20 steps, nats; flushed: of the gradients of float32, by the scale of the last step")
    (folder / "table.json").write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(f"\npicture: {picture(folder / 'loss_scaling.png', rows)}\ntable: {folder / 'table.json'}")


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}", Options()))
