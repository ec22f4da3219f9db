"""Nothing is lost when a run is stopped: in every phase, by signals, by standing still, by errors."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from chaos import chaos
from test_resume import PIPED, assert_same_bits
from tiny import TINY

from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Refused
from jaxpar.train import ahead, checkpoint
from jaxpar.train.fit import fit
from jaxpar.train.progress import quiet
from jaxpar.train.stop import Interrupted, stoppable
from jaxpar.train.watchdog import EXIT_CODE, watchdog

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def whole():
    """TINY, not stopped."""
    return fit(TINY, report=quiet())


def signalling(monkeypatch, home, name, number, at=1, after=False):
    """The `at`-th call of `home.name` is during, or after, the delivery of a signal."""
    called, inner = [], getattr(home, name)

    def call(*args, **fields):
        called.append(name)
        if len(called) == at and not after:
            signal.raise_signal(number)
        found = inner(*args, **fields)
        if len(called) == at and after:
            signal.raise_signal(number)
        return found

    monkeypatch.setattr(home, name, call)


PHASES = {  # where the signal comes: which call, and the checkpoints that are there afterwards
    "compile": ((jax.stages.Lowered, "compile", 1), [1]),
    "step": ((ahead, "checked", 3), [3]),
    "evaluation": ((ahead, "checked", 7), [4, 5]),
    "save": ((checkpoint, "save", 1), [4]),
    "last save": ((checkpoint, "save", 3), [4, 8, 10]),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_saves_and_resumes_bitwise(phase, number, whole, tmp_path, monkeypatch):
    (home, name, at), saved = PHASES[phase]
    where = {"name": "run", "runs_dir": str(tmp_path), "report": quiet()}
    with monkeypatch.context() as patched:
        signalling(patched, home, name, number, at)
        with pytest.raises(Interrupted) as stopped:
            fit(TINY, **where)
    assert stopped.value.exit_code == 77
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == saved
    resumed = fit(TINY, **where)
    assert_same_bits(resumed.state, whole.state)
    assert resumed.losses == whole.losses and resumed.held_out == whole.held_out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_restore_stops_before_another_step(number, whole, tmp_path, monkeypatch):
    where = {"name": "run", "runs_dir": str(tmp_path), "report": quiet()}
    for home, name, at in ((ahead, "checked", 3), (checkpoint, "restore", 1)):
        with monkeypatch.context() as patched:
            signalling(patched, home, name, number, at)
            with pytest.raises(Interrupted, match="after step 3 of 10"):
                fit(TINY, **where)
        assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [3]
    resumed = fit(TINY, **where)
    assert_same_bits(resumed.state, whole.state)
    assert resumed.losses == whole.losses and resumed.held_out == whole.held_out


def test_signals_outside_the_main_thread_are_left_alone():
    seen = []

    def inside():
        with stoppable(print, wanted=True) as asked:
            seen.append((signal.getsignal(signal.SIGTERM), asked()))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


STUCK = """
import time
from jaxpar.datasets.digits import digits

def stuck(*, batch, seed):
    data = digits(batch=batch, seed=seed)
    return data._replace(batch=lambda step: data.batch(step) if step != 5 else time.sleep(600))
"""
TRAIN = """
import sys
from jaxpar import Recipe, cli, fit
with cli.exit_codes():
    fit(Recipe.from_json(sys.argv[1]), name="run", runs_dir=sys.argv[2], watchdog=float(sys.argv[3]))
"""


def child(recipe: Recipe, runs_dir, watchdog="600", code=TRAIN):
    """A run in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code, recipe.to_json(), str(runs_dir), watchdog]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def test_a_run_that_stands_still_is_ended_with_its_stacks(tmp_path):
    (tmp_path / "mine.py").write_text(STUCK)
    recipe = replace(TINY, data=replace(TINY.data, name=f"{tmp_path}/mine.py:stuck"))
    running = child(recipe, tmp_path, "10")
    told = running.communicate(timeout=300)[1]
    assert running.returncode == EXIT_CODE == 76, told
    stacks = (tmp_path / "run" / "stacks.txt").read_text()
    for text in (told, stacks):
        assert "nothing was finished for 10 s" in text and 'mine.py", line 7 in <lambda>' in text
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4]


def test_a_watchdog_that_is_told_stays_quiet(monkeypatch):
    ended = []
    monkeypatch.setattr("jaxpar.train.watchdog._end", lambda *args: ended.append(args))
    with watchdog(2.0, None) as alive:
        for _ in range(30):
            time.sleep(0.1)
            alive()
    assert not ended
    with watchdog(0.1, None) as alive:
        alive()
        time.sleep(0.5)
    assert ended == [(0.1, None)]


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_a_watchdog_needs_seconds(seconds):
    with pytest.raises(Refused, match="watchdog = "):
        fit(TINY, watchdog=seconds, report=quiet())


def test_a_slow_sink_is_no_reason_for_the_watchdog(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\nfrom jaxpar.core.types import Sink\n"
        "def slow(folder, recipe, lines):\n    return Sink(lambda line: None, lambda: time.sleep(4))\n"
    )
    code = TRAIN.replace("watchdog=float", f"sinks=['{tmp_path}/mine.py:slow'], watchdog=float")
    assert "slow" in code
    running = child(replace(TINY, steps=2), tmp_path, "3", code)
    assert running.wait(timeout=300) == 0, running.stderr.read()
    running.stderr.close()


def test_a_run_that_nobody_reads_goes_on(tmp_path):
    """As with `2>&1 | head`: the pipe is broken, and the run is whole."""
    running = child(TINY, tmp_path)
    running.stderr.close()
    assert running.wait(timeout=300) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == TINY.steps


def test_the_last_evaluation_is_made_on_resume_and_compiled_first(whole, tmp_path, monkeypatch):
    where = {"name": "run", "runs_dir": str(tmp_path), "report": quiet()}
    with monkeypatch.context() as patched:
        signalling(patched, ahead, "checked", signal.SIGTERM, 5 + 2 + 5 + 1)  # steps, evaluation, steps, evaluation
        with pytest.raises(Interrupted, match="after step 10 of 10"):
            fit(TINY, **where)
    resumed = fit(TINY, **where)
    assert resumed.losses == whole.losses and resumed.held_out == whole.held_out
    assert resumed.bill is not None, "it was compiled ahead, and not within the watchdog's time of an evaluation"
    assert fit(TINY, **where).bill is None, "now there is nothing left"


@pytest.mark.slow
def test_ten_sigterms_at_any_moment_lose_nothing(whole, tmp_path):
    """As a scheduler sends them: from outside, at moments spread over the run's life after its first sign of life."""
    recipe, stopped = replace(TINY, steps=15000, checkpoint_every=500, evaluate_every=300), []
    whole = fit(recipe, report=quiet())
    for delivery in range(10):
        running = child(recipe, tmp_path)
        lines = iter(running.stderr)
        next(line for line in lines if "compiling" in line or "resuming" in line)
        time.sleep(0.35 * delivery)
        running.send_signal(signal.SIGTERM)
        rest = "".join(lines)
        running.stderr.close()
        assert running.wait(timeout=120) == 77, rest
        stopped.append(checkpoint.steps(tmp_path / "run" / "checkpoints")[-1])
    assert stopped == sorted(stopped) and stopped[-1] < recipe.steps
    resumed = fit(recipe, name="run", runs_dir=str(tmp_path), report=quiet())
    assert_same_bits(resumed.state, whole.state)
    assert resumed.losses == whole.losses and resumed.held_out == whole.held_out


@pytest.mark.slow
def test_ten_kills_at_any_moment_lose_nothing(tmp_path):
    outcome = chaos(10, seed=1, folder=tmp_path)
    assert outcome.kills == 10 and not outcome.wrong, outcome
    assert outcome.resumed[-1] == 300 > outcome.resumed[-2] > 0


@pytest.mark.slow
def test_a_pipeline_that_was_killed_resumes_bitwise(tmp_path):
    recipe, checkpoints = replace(PIPED, steps=300, checkpoint_every=30), tmp_path / "run" / "checkpoints"
    whole = fit(recipe, report=quiet())
    for first in (30, 120):
        running = child(recipe, tmp_path)
        while running.poll() is None and max(checkpoint.steps(checkpoints), default=0) < first:
            time.sleep(0.01)
        running.kill()
        assert running.communicate() and running.returncode == -signal.SIGKILL
        assert first <= max(checkpoint.steps(checkpoints)) < recipe.steps
    told = []
    resumed = fit(recipe, name="run", runs_dir=str(tmp_path), report=quiet()._replace(note=told.append))
    assert any("resuming" in note for note in told)
    assert_same_bits(resumed.state, whole.state)
    assert resumed.losses == whole.losses and resumed.held_out == whole.held_out
