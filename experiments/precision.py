"""What does each policy of precision do to what is learned, and which gradients does it lose?

A small GPT on text and a small MLP on digits, with the same seed in every policy: so with the same first parameters and
the same batches. All begin with the loss scale that the policy asks for; float16 also without one, and float16 and
bfloat16 with 2^-10. That stands for what comes with size: the loss is a mean, so that gradients of activations shrink
with the tokens of a batch, of which large models take a thousand times as many.

1. *Loss.* Expect: every policy ends within the noise of float32. float16 whose gradients are 2^10 smaller learns less
   or nothing, bfloat16 as ever. Micikevicius et al. 2018 (arXiv:1710.03740, table 2): SSD has 76.9 % mAP in float32,
   diverges in float16 unscaled, and has 77.1 % with a scale of 8. Kalamkar et al. 2019 (arXiv:1905.12322, section 4):
   bfloat16 as float32, without a scale or other changes. FP8 Formats (Micikevicius et al. 2022, arXiv:2209.05433,
   section 4): within the noise of 16 bits, with E4M3 forward and E5M2 back.
2. *Gradients.* Exponents of a float32 run's gradients after its last step, and the share of those that are not 0 which
   each policy flushes to 0. Expect: most lie below what e4m3 holds and near the end of float16's range, with much of it
   unused above; scaled by the policy next to none are lost, but some by formats of 8 bits. (1710.03740, figure 3: of
   SSD's activation gradients 67 % are 0, and most others below 2^-24, where float16 has nothing left; figure 2b: about
   5 % of a speech model's weight gradients lie there.)
3. *Time* of a step, of all policies in turn, over that of float32. This machine computes few bits by way of float32; of
   accelerators this says nothing (`benchmarks/precision.py` does). Policies whose note says so are emulated everywhere.

A policy whose step is more than ten times as long as that of float32 is trained for a fifth of the steps. Some five
minutes on 2 idle cores, most of them to compile.

    python -m experiments.precision
    python -m experiments.precision --policies fp32,bf16,fp16 --steps 1000 --name long
"""

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from experiments import precision_gradients, precision_report
from jaxpar import Data, Model, Plan, Recipe, family
from jaxpar.cli import exit_codes, flags
from jaxpar.core.refuse import Collector, Problem, near_miss, refuse
from jaxpar.train.folder import of_study

BASES = {
    "text": Recipe(Model("gpt", layers=2, width=64, heads=4, context=32), Data("stdlib_text"), batch=16),
    "digits": Recipe(Model("mlp", layers=2, width=64), Data("digits"), batch=64),
}
OTHERS = {  # than the policy's own: a small scale stands for a large batch
    "fp16, no scale": ("fp16", "none"),
    "fp16, scale 2^-10": ("fp16", "static:0.0009765625"),
    "bf16, scale 2^-10": ("bf16", "static:0.0009765625"),
}
TIMES, SHARE = 10, 5  # of float32's time, and of the steps


@dataclass(frozen=True)
class Options:
    """What is trained.

    Attributes:
        name: the folder in --runs-dir.
        runs_dir: where folders of runs lie.
        overwrite: write over the table that is there.
        policies: with commas between them; all of them if empty.
        steps: of each run.
        repeats: how often a step of each is timed.
        seed: of parameters, batches and rounding.
    """

    name: str = "precision"
    runs_dir: str = "runs"
    overwrite: bool = False
    policies: str = ""
    steps: int = 300
    repeats: int = 9
    seed: int = 0


class Ready(NamedTuple):
    """A run after its last step: what it takes to do one more."""

    parts: Any
    step: Any
    state: Any
    batch: Any


def cases(policies: list[str]) -> dict[str, tuple[str, str]]:
    """Policy and loss scale of each run, by its name; float32 first."""
    own = {name: (name, "auto") for name in sorted(policies, key=lambda name: (name != "fp32", name))}
    return own | {name: case for name, case in OTHERS.items() if case[0] in policies}


def trained(recipe: Recipe, limit: float) -> tuple[dict, Ready]:
    """One run: losses, the loss scale at the end, and how long a step took.

    Args:
        recipe: what to train.
        limit: seconds of a step from which on only a fifth of the steps is done.
    """
    import jax
    import numpy as np

    from jaxpar.step.parts import prepare
    from jaxpar.step.program import program

    parts, dataset = prepare(recipe)
    made = program(parts)
    state = made.init()
    step = made.step.lower(state, made.place(dataset.batch(0))).compile()
    told, end, began = [], recipe.steps, 0.0
    while len(told) < end:
        state, metrics = step(state, made.place(dataset.batch(len(told))))
        told.append(metrics)
        if len(told) in (1, 4, end):
            jax.block_until_ready(state)
            began = began or time.perf_counter()
            seconds = (time.perf_counter() - began) / max(1, len(told) - 1)
            end = max(len(told), recipe.steps // SHARE) if seconds > limit else end
    told = jax.device_get(told)
    held_out = [made.place(dataset.held_out(i)) for i in range(min(8, dataset.held_out_batches))]
    nats, count, _ = np.sum(jax.device_get([made.evaluate(state.params, state.extra, batch) for batch in held_out]), 0)
    found = {
        "losses": [float(one["loss"]) for one in told],
        "held_out": float(nats / count),
        "steps": end,
        "seconds": seconds,
    }
    found |= {"skipped": int(sum(one["skipped"] for one in told)), "scale": float(told[-1].get("loss_scale", 1.0))}
    return found, Ready(parts, step, state, made.place(dataset.batch(end)))


def timed(runs: dict[str, Ready], repeats: int) -> dict[str, dict]:
    """Milliseconds of a step, all runs in turn, and how many times those of float32: medians."""
    import jax

    times = {name: [] for name in runs}
    runs = dict(runs)
    for turn in range(repeats + 1):
        for name in runs if turn % 2 else reversed(runs):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(runs[name].step(runs[name].state, runs[name].batch))
            times[name].append(time.perf_counter() - began)
            runs[name] = runs[name]._replace(state=state)
    found = {}
    for name, own in times.items():
        ratios = [one / first for one, first in zip(own[1:], times["fp32"][1:], strict=True)]
        found[name] = {"step_ms": 1e3 * statistics.median(own[1:]), "times": statistics.median(ratios)}
    return found


def study(task: str, runs: dict[str, tuple[str, str]], options: Options, tell) -> tuple[list[dict], dict]:
    """All runs of one recipe, and the gradients of the one in float32."""
    rows, ready, limit = {}, {}, float("inf")
    for name, (policy, scale) in runs.items():
        recipe = replace(BASES[task], plan=Plan(precision=policy, unroll="false"), loss_scale=scale)
        recipe = replace(recipe, steps=options.steps, seed=options.seed)
        found, ready[name] = trained(recipe, limit)
        policy = family.pick("policies", policy)()
        rows[name] = {"task": task, "case": name, "emulated": "emulated" in policy.note} | found
        if name == "fp32":
            limit = TIMES * found["seconds"]
            gradients = precision_gradients.of_float32(ready[name].parts, ready[name].state, ready[name].batch)
        rows[name]["flushed"] = precision_gradients.flushed(policy, gradients, found["scale"], options.seed)
        tell(name)
    for name, times in timed(ready, options.repeats).items():
        rows[name] |= times
    kinds = {"activation": [one for _, one in gradients["activation"]], "weight": [gradients["weight"]]}
    return list(rows.values()), {kind: precision_gradients.histogram(values) for kind, values in kinds.items()}


def chosen(options: Options) -> list[str]:
    """The policies of the options.

    Raises:
        Refused: naming every option that is wrong.
    """
    known, found = family.names("policies"), Collector([])
    names = [name.strip() for name in options.policies.split(",")] if options.policies else known
    for name in sorted({*names} - {*known}):
        found.problems.append(Problem("policies", name, "there is no such policy.", near_miss(name, known)))
    if "fp32" not in names:
        found.problems.append(Problem("policies", options.policies, "all is compared with fp32.", "fp32,bf16"))
    for name, least in (("steps", 5), ("repeats", 1)):
        if getattr(options, name) < least:
            found.problems.append(Problem(name, getattr(options, name), f"must be at least {least}.", str(least)))
    refuse(found.problems)
    return names


def main(options: Options) -> None:
    """Train small models in every policy of precision, and look at the gradients that each loses."""
    runs = cases(chosen(options))
    folder = of_study(options.runs_dir, options.name, options.overwrite)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    done, began, rows, found = [], time.perf_counter(), [], {}

    def tell(name: str) -> None:
        done.append(name)
        left = (time.perf_counter() - began) / len(done) * (len(runs) * len(BASES) - len(done))
        print(f"  {len(done)} of {len(runs) * len(BASES)}, about {left:.0f} s left", file=sys.stderr, flush=True)

    for task in BASES:
        more, found[task] = study(task, runs, options, tell)
        rows += more
    print(f"{precision_report.table(rows)}\n\n{precision_report.told(found)}")
    written = json.dumps({"rows": rows, "gradients": found}, indent=2)
    (folder / "table.json").write_text(written + "\n", encoding="utf-8")
    print(f"picture: {precision_report.picture(folder / 'precision.png', rows, found)}\ntable: {folder / 'table.json'}")


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}", Options()))
