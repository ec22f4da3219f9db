"""A pipeline beside data and two or three axes of a tensor scheme needs sixteen devices: a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
from sixteen import MESHES, SCHEDULES, STORAGES

ROOT = Path(__file__).parent.parent


def script(*words):
    """`tests/sixteen.py` for the cases with these words: all are equal to one device."""
    command = [sys.executable, ROOT / "tests" / "sixteen.py", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("pipe=4", "schedule=one_f_one_b", "storage=recompute", "tied"),
        pytest.param(
            ("tensor=three_d:2x2x2", "schedule=zero_bubble_h1", "storage=residual", "untied"), marks=pytest.mark.slow
        ),
    ],
)
def test_gradients_on_sixteen_devices_are_those_of_one(words):
    assert "1 of 1 cases" in script(*words)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_gradients_on_sixteen_devices_are_those_of_one_in_every_combination(mesh):
    count = len(SCHEDULES) * len(STORAGES) * 2
    assert f"{count} of {count} cases" in script(*mesh.split(","))
