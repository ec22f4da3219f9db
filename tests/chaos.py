"""Kill a run again and again, at random moments, and see that nothing is lost.

    make chaos                      50 kills, about six minutes
    python tests/chaos.py --kills 5 --seed 3

A child process trains a small classifier and saves after every second step; it is killed with SIGKILL at random moments
of its life, saves and start included, and started again, until it was killed often enough; then it may finish. Expect:

- every start succeeds, from a checkpoint no older than the newest one that was good at the kill;
- the loss of every step, the examples of every batch and the last state are, bit by bit, those of a run that was left
  alone, also where a step was made several times.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Data, Model, Recipe
from jaxpar.train import checkpoint, manifest

ROOT = Path(__file__).resolve().parent.parent
OURS = '''
import hashlib, os
from jaxpar.datasets.digits import digits

def logged(*, batch, seed):
    """digits, with a line on disk for every batch that is asked for."""
    data = digits(batch=batch, seed=seed)
    def get(step):
        found = data.batch(step)
        with open(os.environ["CHAOS_LOG"], "a") as log:
            log.write(f"{step} {hashlib.sha256(found[0].tobytes() + found[1].tobytes()).hexdigest()}\\n")
        return found
    return data._replace(batch=get)
'''
CHILD = """
import sys
from jaxpar import Recipe, cli, fit
with cli.exit_codes():
    fit(Recipe.from_json(sys.argv[1]), name="run", runs_dir=sys.argv[2])
"""


class Outcome(NamedTuple):
    """What came of it: how often the child was killed, in which checkpoint steps, and what went wrong."""

    kills: int
    saving: int
    resumed: list[int]
    wrong: list[str]


def chaos(kills: int, seed: int, folder: Path) -> Outcome:
    """Kill `kills` times, finish, and compare with a run that was left alone."""
    (folder / "ours.py").write_text(OURS)
    recipe = Recipe(
        model=Model("mlp", layers=1, width=16, dropout=0.1),
        data=Data(f"{folder / 'ours.py'}:logged"),
        plan=Plan.parse("data=2"),
        batch=8,
        steps=60 + 24 * kills,  # it must not finish before it was killed so often
        evaluate_every=7,
        evaluate_batches=2,
        checkpoint_every=2,
    )
    rng, killed, saving, resumed, wrong = random.Random(seed), 0, 0, [], []
    checkpoints = folder / "killed" / "run" / "checkpoints"
    while True:
        good = newest_good(checkpoints)
        running = start(recipe, folder, "killed")
        if killed == kills:
            told = running.communicate()[1]
        else:
            sign = rng.choice(["compiling", "compiled", "step"])  # starting python is like any other program's start
            told = ""
            while line := running.stderr.readline():
                told += line
                if sign in line:
                    break
            time.sleep(rng.uniform(0, 1.0))
            running.kill()
            told += running.communicate()[1]
        if newest_good(checkpoints) < good:
            wrong.append(f"after kill {killed}: the newest good checkpoint was {good}, is {newest_good(checkpoints)}")
        begun = re.search(r"resuming .*: (\d+) of", told)
        if good and "compiling" in told and not (begun and int(begun[1]) >= good):
            wrong.append(f"after kill {killed}: {good} was good, and the next start said:\n{told}")
        saving += any(checkpoints.glob("*.part")) if checkpoints.is_dir() else 0
        resumed.append(newest_good(checkpoints))
        if killed == kills or running.returncode == 0:
            if running.returncode:
                wrong.append(f"the last start ended with {running.returncode}:\n{told}")
            break
        if running.returncode != -9:
            wrong.append(f"start {killed} ended by itself with {running.returncode}:\n{told}")
            break
        killed += 1
    alone = start(recipe, folder, "alone")
    if alone.communicate() and alone.returncode:
        wrong.append(f"the run that was left alone ended with {alone.returncode}")
    if killed < kills:
        wrong.append(f"it was killed {killed} times, not {kills}")
    return Outcome(killed, saving, resumed, [*wrong, *differences(folder)])


def start(recipe: Recipe, folder: Path, name: str) -> subprocess.Popen:
    """A child that trains `recipe` in `folder/name`."""
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}", "CHAOS_LOG": str(folder / f"{name}.log")}
    command = [sys.executable, "-c", CHILD, recipe.to_json(), str(folder / name)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def newest_good(checkpoints: Path) -> int:
    """Step of the newest checkpoint whose every file is what was written; 0 if there is none."""
    for step in reversed(checkpoint.steps(checkpoints)):
        try:
            return manifest.verify(checkpoints / str(step))["step"]
        except manifest.Damaged:
            continue
    return 0


def differences(folder: Path) -> list[str]:
    """Where the killed run is not, bit by bit, the one that was left alone."""
    alone, killed = (lines(folder / name / "run" / "metrics.jsonl") for name in ("alone", "killed"))
    found = [f"line {one}, not {other}" for one, other in zip_longest(killed, alone) if one != other]
    ids = dict(line.split() for line in (folder / "alone.log").read_text().splitlines())
    for line in (folder / "killed.log").read_text().splitlines():
        step, *digest = line.split()
        if len(digest) == 1 and len(digest[0]) == 64 and ids[step] != digest[0]:  # else half a line
            found.append(f"batch {step} had other examples")
    last = [
        manifest.read(max((folder / name / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name)))["leaves"]
        for name in ("alone", "killed")
    ]
    return found + ([] if last[0] == last[1] else ["the last states differ"])


def lines(path: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "held_out_loss")
    return [
        {name: line[name] for name in kept if name in line} for line in map(json.loads, path.read_text().splitlines())
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcome = chaos(options.kills, options.seed, Path(folder))
    print(f"{outcome.kills} kills in {time.monotonic() - began:.0f} s, {outcome.saving} of them in a save")
    print(f"newest good checkpoint after each: {outcome.resumed}")
    print("\n".join(outcome.wrong) or "nothing was lost, and every number is that of the run that was left alone")
    sys.exit(bool(outcome.wrong))


if __name__ == "__main__":
    main()
