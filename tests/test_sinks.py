"""Further places for metrics: each writes every line once, and none of them ever stops or slows a run."""

import csv
import importlib
import inspect
import json
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest

from jaxpar import cli
from jaxpar.core import family
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Refused
from jaxpar.train import sinks
from jaxpar.train.fit import fit

LINES = [
    {"step": 1, "loss": 2.5, "compile_s": 1.5},
    {"step": 2, "loss": 2.25},
    {"step": 2, "held_out_loss": 2.0},
    {"step": 3, "loss": 2.125},
]
RECIPE = Recipe(steps=3)


class Writer:
    """Stands for tensorboardX's: what a reader of its files would see."""

    seen: dict = {}  # noqa: RUF012

    def __init__(self, folder, purge_step):
        self.scalars = self.seen.setdefault(folder, {})
        for key in [key for key in self.scalars if key[1] >= purge_step]:
            del self.scalars[key]

    def add_text(self, name, text, step):
        assert '"steps": 3' in text

    def add_scalar(self, name, value, step):
        assert (name, step) not in self.scalars, "written twice"
        self.scalars[name, step] = value

    def close(self):
        self.scalars["closed", 0] = True


class Client:
    """Stands for W&B's server: steps must not go back in a run, which its id names."""

    def __init__(self):
        self.runs, self.calls = {}, []

    def init(self, **said):
        self.calls.append(said)
        history = self.runs.setdefault(said["id"], {})

        first = max(history, default=-1) + 1

        def log(values, step):
            assert step >= max([first, *history]), "refused by the server"
            history.setdefault(step, {}).update(values)

        return SimpleNamespace(step=first, log=log, finish=lambda: None)


@pytest.fixture
def client(monkeypatch, tmp_path):
    """Stand-ins for the packages that the sinks need."""
    Writer.seen = {}
    found = Client()
    board, wandb = ModuleType("tensorboardX"), ModuleType("wandb")
    board.SummaryWriter, wandb.init, wandb.Settings = Writer, found.init, SimpleNamespace
    for module in (board, wandb):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("tensorboard", "wandb"):
        monkeypatch.delitem(sys.modules, f"jaxpar.sinks.{name}", raising=False)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield found
    for name in ("tensorboard", "wandb"):
        sys.modules.pop(f"jaxpar.sinks.{name}", None)


def run(folder, names, lines=LINES, kept=()):
    """The warnings of a run that wrote `lines` after those that it had `kept`."""
    notes = []
    sink = sinks.opened(names, folder, RECIPE, kept, notes.append)
    for line in lines:
        sink.write(line)
    sink.close()
    return notes


def written(name, folder, client):
    """What a reader finds, as {(name, step): number}."""
    if name == "csv":
        rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        found = [((name, int(row["step"])), float(value)) for row in rows for name, value in row.items() if value]
        found = [pair for pair in found if pair[0][0] != "step"]
        assert len(found) == len(dict(found)), "written twice"
        return dict(found)
    if name == "tensorboard":
        found = dict(Writer.seen[str(folder / "tensorboard")])
        assert found.pop(("closed", 0))
        return found
    (history,) = client.runs.values()
    return {(key, step): value for step, values in history.items() for key, value in values.items()}


WANT = {(name, line["step"]): value for line in LINES for name, value in line.items() if name != "step"}


@pytest.mark.parametrize("name", family.names("sinks"))
def test_every_number_is_written_once(name, tmp_path, client):
    assert run(tmp_path, [name]) == []
    assert written(name, tmp_path, client) == WANT


@pytest.mark.parametrize("name", family.names("sinks"))
def test_a_run_that_resumes_writes_no_line_twice(name, tmp_path, client):
    assert run(tmp_path, [name]) == []  # got to step 3, and was killed; its last checkpoint is of step 2
    assert run(tmp_path, [name], LINES[3:], kept=LINES[:3]) == []
    assert written(name, tmp_path, client) == WANT


def test_a_column_may_come_late(tmp_path):
    run(tmp_path, ["csv"])
    text = (tmp_path / "metrics.csv").read_text()
    assert text.splitlines() == [
        "step,loss,compile_s,held_out_loss",
        "1,2.5,1.5,",
        "2,2.25,,",
        "2,,,2.0",
        "3,2.125,,",
    ]


def test_wandb_is_offline_until_somebody_logs_in(tmp_path, client, monkeypatch):
    run(tmp_path, ["wandb"])
    monkeypatch.setenv("WANDB_API_KEY", "key")
    run(tmp_path, ["wandb"])
    assert [said["mode"] for said in client.calls] == ["offline", None]
    assert client.calls[0]["id"] == client.calls[1]["id"] and client.calls[0]["config"]["steps"] == 3


def test_an_unknown_sink_is_refused_before_any_is_opened(tmp_path):
    with pytest.raises(Refused, match="did you mean `tensorboard`"):
        run(tmp_path, ["csv", "tensorbord"])
    assert not list(tmp_path.iterdir())


def test_sinks_of_a_run_that_is_kept_nowhere_are_refused():
    with pytest.raises(Refused, match="this run has none"):
        run(None, ["csv"])
    assert run(None, []) == []


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_one_warning_and_the_others_go_on(name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, f"jaxpar.sinks.{name}", raising=False)
    (warning,) = run(tmp_path, [name, "csv"])
    assert warning.startswith(f"warning: no metrics for {name}") and warning.endswith(f"pip install {package}")
    assert written("csv", tmp_path, None) == WANT


OWN = """
import time
from jaxpar.core.types import Sink
calls = []

def boom(*_):
    raise OSError(28, "No space left on device")

def opening(folder, recipe, lines):
    boom()

def writing(folder, recipe, lines):
    return Sink(boom, lambda: (folder / "closed").touch())

def closing(folder, recipe, lines):
    return Sink(lambda line: None, boom)

def leaving(folder, recipe, lines):
    raise SystemExit(3)

def hanging(folder, recipe, lines):
    time.sleep(60)

def slow(folder, recipe, lines):
    return Sink(lambda line: time.sleep(60), lambda: None)

def changing(folder, recipe, lines):
    return Sink(lambda line: line.clear(), lambda: None)
"""


@pytest.fixture
def own(tmp_path):
    """A user's own sinks, by name."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return lambda name: f"{path}:{name}"


@pytest.mark.parametrize("name", ["opening", "writing", "closing", "leaving"])
def test_a_sink_that_fails_is_one_warning_and_the_run_goes_on(name, own, tmp_path):
    notes = run(tmp_path, [own(name), "csv"], LINES * 20)
    assert len(notes) == 1 and ("No space left" in notes[0] or "SystemExit: 3" in notes[0])
    assert notes[0].startswith(f"warning: no more metrics for {own(name)}: ") and "\n" not in notes[0]
    assert (tmp_path / "closed").exists() == (name == "writing")
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 81


@pytest.mark.parametrize("name, why", [("hanging", "did not end"), ("slow", "did not end"), ("slow", "4 lines behind")])
def test_a_sink_that_hangs_costs_no_time(name, why, own, tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "CLOSE_S", 0.2)
    monkeypatch.setattr(sinks, "BEHIND", 4 if "behind" in why else 10_000)
    began = time.perf_counter()
    notes = run(tmp_path, [own(name)], LINES * 5)
    assert time.perf_counter() - began < 2
    assert len(notes) == 1 and why in notes[0]


def test_warnings_come_from_the_thread_of_the_run(own, tmp_path):
    threads = []
    sink = sinks.opened([own("writing")], tmp_path, RECIPE, [], lambda _: threads.append(threading.current_thread()))
    sink.write(LINES[0])
    sink.close()
    assert threads == [threading.main_thread()]


def test_one_sink_cannot_change_what_others_see(own, tmp_path):
    line = dict(LINES[0])
    assert run(tmp_path, [own("changing"), "csv"], [line]) == [] and line == LINES[0]
    assert ("loss", 1) in written("csv", tmp_path, None)


def test_the_csv_sink_does_not_hide_the_standard_library():
    assert importlib.import_module("jaxpar.sinks.csv").__name__ != csv.__name__ and hasattr(csv, "DictReader")


@pytest.mark.skipif("sinks" not in inspect.signature(fit).parameters, reason="fit does not take sinks yet")
def test_a_run_writes_its_lines_to_all_sinks_and_survives_a_bad_one(own, tmp_path, capsys):
    flags = "--model.name mlp --model.layers 1 --model.width 8 --data.name digits --batch 8 --steps 3 --name a"
    names = f"csv,{own('writing')},{own('closing')}"
    cli.main(["train", *flags.split(), "--runs-dir", str(tmp_path / "runs"), "--sinks", names])
    run = tmp_path / "runs" / "a"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    want = {(name, line["step"]): value for line in lines for name, value in line.items() if name != "step"}
    assert {key: float(value) for key, value in want.items() if value is not None} == written("csv", run, None)
    assert capsys.readouterr().err.count("warning: no more metrics for") == 2
    assert (run / "closed").exists() and (run / "summary.json").exists()
