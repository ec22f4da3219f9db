"""Pipelines within tensor parallelism within data parallelism, on sixteen devices: the gradients of one device?

    python tests/sixteen.py                                          all 128 cases, about half an hour on 2 cores
    python tests/sixteen.py tensor=three_d:2x2x2 storage=residual    those that say so

Every schedule with both storages, tied and untied, on every mesh, with dropout. One line per case; the exit code is 1
if one differs. The test suite has eight devices, and a process has as many as it began with: hence a script.
"""

import argparse
import itertools
import os
import sys
import time

import conftest
from harness import SMALL, recipe_of, reference, run, variant
from parity import assert_equal

from jaxpar.core import family

MESHES = [
    "pipe=2,data=2,tensor=two_d:2x2",
    "pipe=2,data=2,tensor=three_d:1x2x2",
    "pipe=4,data=2,tensor=one_d:2",
    "pipe=2,tensor=three_d:2x2x2",
]
SCHEDULES = [name for name in family.names("schedules") if name != "from_table"]
STORAGES = ["recompute", "residual"]
CHUNKS = {"interleaved": 2, "zero_bubble_v": 2}


def cases(words: list[str]):
    """(name, model, plan) of each case with all of `words` in its name, with a block or more for each stage."""
    for mesh, schedule, storage, tied in itertools.product(MESHES, SCHEDULES, STORAGES, (True, False)):
        chunks = CHUNKS.get(schedule, 1)
        plan = f"{mesh},schedule={schedule},chunks={chunks},microbatches=4,storage={storage}"
        name = f"{plan},{'tied' if tied else 'untied'}"
        if set(words) <= set(name.split(",")):
            layers = 8 if "pipe=4" in mesh and chunks == 2 else 4
            yield name, variant(SMALL["gpt"], layers=layers, dropout=0.1, kv_heads=2, tied=tied), plan


def difference(model, plan: str) -> str:
    """What is not as on one device; empty if all is."""
    want, got = reference(model), run(recipe_of(model, plan))
    try:
        assert_equal(got.gradients, want.gradients, tolerance=5e-6)
        assert_equal(got.loss, want.loss, tolerance=2e-6)
    except AssertionError as error:
        return str(error)
    return ""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("words", nargs="*", help="what a case must say, such as schedule=gpipe or untied")
    chosen = list(cases(parser.parse_args().words))
    os.environ["XLA_FLAGS"] = conftest.xla_flags("--xla_force_host_platform_device_count=16")
    wrong = 0
    for name, model, plan in chosen:
        began, found = time.monotonic(), difference(model, plan)
        wrong += bool(found)
        print(f"{name}: {time.monotonic() - began:.0f} s, {f'WRONG: {found}' if found else 'equal'}", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} cases have the gradients of one device")
    sys.exit(bool(wrong) or not chosen)


if __name__ == "__main__":
    main()
