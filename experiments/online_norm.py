"""Does a ResNet-20 learn CIFAR as well with online normalization as with batch normalization, and one image at a time?

Chiley et al. 2019 (arXiv:1905.05894; recipe and figures as in its reference code, medians of up to 5 runs) train 250
epochs of batches of 128: SGD, rate 0.1, a tenth of it from epochs 100, 150 and 200 on, momentum 0.9, decay 2e-4 and
layer scaling; decays of online norm 1 - 2^-10 and 1 - 2^-7 on CIFAR-10, 1 - 2^-9 and 1 - 2^-4 on CIFAR-100:

| | online | batch | group (8) | instance | layer |
| --- | --- | --- | --- | --- | --- |
| CIFAR-10, test accuracy | 92.3 | 92.2 | 90.3 | 90.4 | 87.4 |
| CIFAR-10, least test loss, nats | 0.26 | 0.26 | 0.32 | 0.31 | 0.39 |
| CIFAR-100, test accuracy | 68.6 | 68.6 | 63.3 | 63.1 | 59.2 |

Expect of the whole schedule: these. Of a few epochs on a CPU: online near batch norm at 128, and hardly another at 8 or
1, where the rate and the momentum are rescaled so that each image counts as before: momentum m^(b/128), rate x (b/128)
(1 - m^(b/128)) / (1 - m). `--budget` minutes are shared out among the runs, each of which is timed first; what does not
fit is left out: then the rate rises over a twentieth of the steps and falls to 0 in a straight line. The table says
which part of the published epochs a run had. Only matrices decay here.

Test images are looked at 4 times in a run (a fifth of them), and all 10,000 at its end. Images that come as JPEG are
lossy, so a little below the published ones. A run that was stopped goes on by the same command.

`--full` is all 250 epochs, for an accelerator: in bfloat16, the images on the device, from start to end in one go. It
was tried on small stand-ins only, for want of an accelerator.

    python -m experiments.online_norm --data-dir FOLDER --budget 60
    python -m experiments.online_norm --data-dir FOLDER --norms online --batches 128 --budget 20 --name resnet20
    python -m experiments.online_norm --data-dir FOLDER --full --batches 128
"""

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import online_norm_device, online_norm_report
from jaxpar import Data, Model, Plan, Recipe, family, fit
from jaxpar.cli import exit_codes, flags
from jaxpar.core.refuse import Collector, Problem, near_miss, refuse
from jaxpar.train.folder import of_study

EPOCHS, IMAGES, BATCH = 250, 50_000, 128  # published
MOMENTUM, DECAY, RATE = 0.9, 2e-4, 0.1
MILESTONES = "steps:0.4=0.1+0.6=0.01+0.8=0.001"
DECAYS = {"cifar10": (10, 7), "cifar100": (9, 4)}  # k of 1 - 2^-k, forward and back
TIMED, POINTS, MARGIN = 5, 4, 0.94  # steps, looks at test images, share of the time that is planned
LOOK = 2048  # test images, at each look but the last
AT_ONCE = 250  # images, to evaluate all of them
MODEL = Model("resnet", layers=20)


@dataclass(frozen=True)
class Options:
    """What is trained.

    Attributes:
        name: the folder in --runs-dir.
        runs_dir: where folders of runs lie.
        overwrite: begin anew, and write over the table that is there.
        data: cifar10 or cifar100.
        data_dir: folder with the images; by default the cache, filled by a download.
        norms: with commas between them; all of them if empty.
        batches: images per step, with commas between them.
        budget: minutes for all runs together.
        rate: largest learning rate at a batch of 128, of a schedule that is cut short.
        seed: of parameters, order and augmentation.
        full: the whole published schedule, in bfloat16 and with all images on the device; --budget is not looked at.
    """

    name: str = "online_norm"
    runs_dir: str = "runs"
    overwrite: bool = False
    data: str = "cifar10"
    data_dir: str | None = None
    norms: str = "online,batch,group,instance,layer"
    batches: str = "128,8,1"
    budget: float = 60.0
    rate: float = 0.1
    seed: int = 0
    full: bool = False


def norm_of(name: str, data: str) -> str:
    """A norm with the arguments that it was published with."""
    forward, backward = (1 - 2.0**-k for k in DECAYS.get(data, DECAYS["cifar10"]))
    published = {
        "online": f"online:forward={forward}+backward={backward}",
        "group": "group:groups=8",
        "layer": "layer:over=example",
    }
    return published.get(name, name)


def rescaled(rate: float, momentum: float, part: float) -> tuple[float, float]:
    """Rate and momentum for batches of `part` as many examples, so that each example moves the weights as far.

    An example of n moves them by rate / n / (1 - momentum) in all, and a share `momentum` of that comes after the next
    n examples: both stay.
    """
    scaled = momentum**part
    return rate * part * (1 - scaled) / (1 - momentum), scaled


def recipe_of(options: Options, norm: str, batch: int, steps: int) -> Recipe:
    """One run of so many steps."""
    peak = RATE if options.full else options.rate
    rate, momentum = rescaled(peak, MOMENTUM, batch / BATCH)
    return Recipe(
        model=replace(MODEL, norm=norm_of(norm, options.data)),
        data=Data(options.data),
        plan=Plan.parse("precision=bf16" if options.full else "data=1"),
        batch=batch,
        steps=steps,
        seed=options.seed,
        optimizer=f"sgd:momentum={momentum:.8g}",
        learning_rate=float(f"{rate:.6g}"),
        schedule=MILESTONES if options.full else "linear:0",
        warmup=0 if options.full else steps // 20,
        weight_decay=DECAY,
        clip=0.0,
        evaluate_every=-(-steps // POINTS),
        evaluate_batches=max(1, min(LOOK // batch, LOOK // 8)),
        checkpoint_every=-(-steps // (2 * POINTS)),
    )


def pace(recipe: Recipe, data_dir: str | None) -> tuple[float, float, float]:
    """Seconds to compile, of a step, and to evaluate all held-out images."""
    import jax

    from jaxpar.step.parts import prepare
    from jaxpar.step.program import program

    parts, dataset = prepare(recipe, data_dir)
    made, began = program(parts), time.perf_counter()
    state, batch, times = made.init(), made.place(dataset.batch(0)), []
    step = made.step.lower(state, batch).compile()
    compiled = time.perf_counter() - began
    for number in range(TIMED + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, made.place(dataset.batch(number))))
        times.append(time.perf_counter() - began)
    looks, dataset = at_once(recipe, data_dir)
    batches = held_out(looks, dataset)
    scored(looks, state, batches[:1])
    began = time.perf_counter()
    scored(looks, state, batches[:1])
    return compiled, statistics.median(times[1:]), (time.perf_counter() - began) * len(batches)


def at_once(recipe: Recipe, data_dir: str | None) -> tuple:
    """A program and the data of the same recipe for large batches, to evaluate all held-out images with."""
    from jaxpar.step.parts import prepare
    from jaxpar.step.program import program

    _, dataset = prepare(recipe, data_dir)
    parts, dataset = prepare(replace(recipe, batch=min(AT_ONCE, len(dataset.splits[1]))), data_dir)
    return program(parts), dataset


def held_out(made, dataset) -> list:
    """All held-out batches, on the devices."""
    return [made.place(dataset.held_out(i)) for i in range(dataset.held_out_batches)]


def scored(made, state, batches: list) -> tuple[float, float]:
    """Nats and share of right labels over these batches."""
    import jax
    import numpy as np

    found = jax.device_get([made.evaluate(state.params, state.extra, batch) for batch in batches])
    nats, count, right = np.sum(found, 0)
    return float(nats / count), float(right / count)


def affordable(options: Options, norm: str, batch: int, seconds: float) -> tuple[int, str]:
    """How many steps fit into `seconds` with all that comes with them, and a line on how that was found."""
    whole, began = EPOCHS * IMAGES // batch, time.perf_counter()
    compiled, step, evaluated = pace(recipe_of(options, norm, batch, 100), options.data_dir)
    spent = time.perf_counter() - began + compiled  # the run compiles again, for its own number of steps
    left = MARGIN * seconds - spent - evaluated * (1 + POINTS * LOOK / 10_000)
    steps = max(2 * POINTS, min(whole, int(left / step)))
    said = f"compiles in {compiled:.0f} s, a step takes {step * 1e3:.1f} ms ({batch / step:.0f} images/s)"
    return steps, f"{norm}, batch {batch}: {said}: {steps} steps"


def trained(options: Options, norm: str, batch: int, folder: Path, seconds: float) -> dict:
    """One run within so many seconds, written under `folder`, and what it found on the test images."""
    began, name = time.perf_counter(), f"{norm}_{batch}"
    there = folder / name / "recipe.json"
    if there.exists() and not options.overwrite:
        steps = Recipe.from_json(there.read_text(encoding="utf-8")).steps
    else:
        steps, said = affordable(options, norm, batch, seconds)
        print(said, file=sys.stderr, flush=True)
    recipe = recipe_of(options, norm, batch, steps)
    run = fit(recipe, name=name, runs_dir=str(folder), data_dir=options.data_dir, overwrite=options.overwrite)
    looks, dataset = at_once(recipe, options.data_dir)
    nats, accuracy = scored(looks, run.state, held_out(looks, dataset))
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    count = len(dataset.splits[0])
    curve = [
        [line["step"] * batch / count, line["held_out_loss"], line["held_out_accuracy"]]
        for line in lines
        if "held_out_loss" in line
    ]
    found = {"norm": norm, "batch": batch, "steps": steps, "epochs": steps * batch / count, "source": dataset.source}
    found |= {"loss": nats, "accuracy": accuracy, "curve": curve, "seconds": time.perf_counter() - began}
    return found | {"share": found["epochs"] / EPOCHS, "images_per_second": run.summary["examples_per_second"]}


def chosen(options: Options) -> list[tuple[str, int]]:
    """The (norm, batch) of each run.

    Raises:
        Refused: naming every option that is wrong.
    """
    known, found = family.names("norms"), Collector([])
    norms = [name.strip() for name in options.norms.split(",")] if options.norms else known
    for name in sorted({*norms} - {*known}):
        found.problems.append(Problem("norms", name, "there is no such norm.", near_miss(name, known)))
    batches = [word.strip() for word in options.batches.split(",")]
    for word in batches:
        if not (word.isascii() and word.isdigit() and 1 <= int(word) <= 10_000):
            found.problems.append(Problem("batches", word, "must be a whole number, 1 to 10000.", "128,8,1"))
    if options.data not in DECAYS:
        found.problems.append(Problem("data", options.data, "was not published.", " or ".join(DECAYS)))
    if not 0 < options.budget < float("inf"):
        found.problems.append(Problem("budget", options.budget, "must be a finite number above 0.", "60"))
    refuse(found.problems)
    return [(norm, int(batch)) for batch in batches for norm in norms]


def main(options: Options) -> None:
    """Train ResNet-20 with several norms on small photographs, beside what was published."""
    cases = chosen(options)
    folder = of_study(options.runs_dir, options.name, options.overwrite)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    rows, began = [], time.perf_counter()
    for number, (norm, batch) in enumerate(cases):
        if options.full:
            recipe = recipe_of(options, norm, batch, EPOCHS * IMAGES // batch)
            rows.append(online_norm_device.trained(recipe, norm, options.data_dir) | {"share": 1.0})
        else:
            left = 60 * options.budget - (time.perf_counter() - began)
            rows.append(trained(options, norm, batch, folder, left / (len(cases) - number)))
        print(f"  {number + 1} of {len(cases)}: {online_norm_report.line(rows[-1])}", file=sys.stderr, flush=True)
    print(f"{online_norm_report.table(rows, options.data)}\n\n{online_norm_report.told(rows, options)}")
    written = json.dumps({"data": options.data, "full": options.full, "rows": rows}, indent=2)
    (folder / "table.json").write_text(written + "\n", encoding="utf-8")
    print(f"picture: {online_norm_report.picture(folder / 'online_norm.png', rows, options.data)}")
    print(f"table: {folder / 'table.json'}")


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}", Options()))
