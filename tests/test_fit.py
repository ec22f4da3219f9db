"""Training: what a run returns and writes, what it refuses, and that one bad batch cannot pass unseen."""

import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny import TINY

from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Data, Model, Recipe
from jaxpar.core.refuse import Refused
from jaxpar.step.parts import prepare
from jaxpar.train import folder
from jaxpar.train.ahead import Compiled, speed_of
from jaxpar.train.feed import checked
from jaxpar.train.fit import fit
from jaxpar.train.metrics import book
from jaxpar.train.progress import plain, progress, quiet
from jaxpar.train.stop import NonFinite

USER_DATA = """
from jaxpar.core.types import Dataset
import numpy as np

def bad(*, batch, seed):
    def make(step):
        inputs, labels = np.full((batch, 8, 8, 1), 0.5, np.float32), np.zeros(batch, np.int32)
        {change}
        return inputs, labels
    return Dataset(make, make, 1, 10, (8, 8, 1), (np.zeros(1), np.zeros(1)), "bad")
"""


@pytest.fixture
def user_data(tmp_path):
    """`user_data(code)`: a recipe like TINY whose own dataset runs `code` in each batch."""

    def make(change):
        path = tmp_path / "data.py"
        path.write_text(USER_DATA.format(change=change))
        return replace(TINY, data=Data(f"{path}:bad"))

    return make


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run that is written."""
    return fit(TINY, name="first", runs_dir=str(tmp_path_factory.mktemp("runs")), report=quiet())


def lines_of(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_fit_returns_what_was_learned(run):
    assert len(run.losses) == TINY.steps and int(run.state.step) == TINY.steps
    assert [step for step, _ in run.held_out] == [5, 10]
    assert run.losses[0] == pytest.approx(math.log(10), abs=0.1), "a fresh classifier knows nothing"
    assert fit(TINY, name="first", runs_dir=str(run.folder.parent), report=quiet())[1] == run.losses


def test_a_run_without_a_name_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = fit(TINY, report=quiet())
    assert again.folder is None and not list(tmp_path.iterdir())
    assert again.losses == run.losses and again.held_out == run.held_out, "writing must not change what is learned"


def test_the_folder_of_a_run(run):
    assert sorted(path.name for path in run.folder.iterdir()) == sorted(
        ["checkpoints", "metrics.jsonl", "plan.txt", "recipe.json", "summary.json"]
    )
    assert Recipe.from_json((run.folder / "recipe.json").read_text()) == TINY
    assert Plan.parse((run.folder / "plan.txt").read_text()) == TINY.plan
    assert json.loads((run.folder / "summary.json").read_text()) == run.summary


def test_each_step_is_one_line(run):
    steps = [line for line in lines_of(run) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, TINY.steps + 1))
    for line in steps:
        assert {"loss", "grad_norm", "learning_rate", "examples_per_second", "step_ms", "data_ms"} <= set(line)
    assert [line["step"] for line in steps if "compile_s" in line] == [1]
    assert steps[1]["learning_rate"] == pytest.approx(TINY.learning_rate), "the warm-up is one step long"
    assert [line["step"] for line in lines_of(run) if "held_out_loss" in line] == [5, 10]


def compiled(labels=(4, 32), **fields):
    """What `book` needs of a compiled run."""
    nothing = dict.fromkeys(Compiled._fields) | {"rate": lambda step: 1.0, "seconds": 1.5}
    return Compiled(**nothing | {"speed": speed_of(labels, 1e9, 1e12)} | fields)


def found(loss=1.0, skipped=False):
    return {"loss": np.float32(loss), "grad_norm": np.float32(1), "skipped": np.bool_(skipped)}


def test_text_is_counted_in_tokens():
    lines = []
    told = book(lines.append, [], TINY, compiled())
    for number in (1, 2):
        told.step(number, found(), 0.0, 0.001)
        assert len(lines) == number - 1, "a step is written down while the next one runs"
    told.settle()
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["compile_s"] == 1.5 and lines[1]["tokens_per_second"] > 0
    seconds = lines[1]["step_ms"] / 1e3
    assert lines[1]["mfu"] == pytest.approx(1e9 / seconds / 1e12, rel=0.05), "model flops, over time, over the peak"
    assert "mfu" not in speed_of((4,), 1e9, None)(1.0), "without a stated peak there is no MFU"


def test_a_batch_of_another_shape_is_refused(user_data):
    recipe = user_data("if step == 3: inputs = inputs[1:]")
    with pytest.raises(ValueError, match=r"(?s)batch 3.*got .*float32\[7, 8, 8, 1\].*compiled .*float32\[8, 8, 8, 1\]"):
        fit(recipe, report=quiet())


def test_one_bad_batch_changes_nothing(user_data, tmp_path):
    recipe = replace(user_data("inputs[:] = 0.1 * step; inputs[:] = 3e38 if step == 3 else inputs"), evaluate_every=0)
    run = fit(recipe, name="bad", runs_dir=str(tmp_path), report=quiet())
    bad = [line for line in lines_of(run) if "skipped" in line]
    assert [(line["step"], line["loss"], line["skipped"]) for line in bad] == [(4, None, 1)]
    assert [step for step, loss in enumerate(run.losses, 1) if not math.isfinite(loss)] == [4]
    assert run.summary["skipped"] == 1 and run.summary["loss"] == run.losses[-1]
    counts = {int(leaf) for leaf in jax.tree.leaves(run.state.opt) if leaf.ndim == 0}
    assert counts == {recipe.steps - 1} and int(run.state.step) == recipe.steps, (
        "the schedule stood still, data did not"
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(run.state)))


def test_losses_that_are_no_numbers_stop_the_run(user_data, tmp_path):
    recipe = replace(user_data("if step >= 3: inputs[:] = 3e38"), checkpoint_every=2, skip_limit=3)
    with pytest.raises(NonFinite, match=r"step 6: .*loss = (nan|inf).*update 3 in a row") as stopped:
        fit(recipe, name="bad", runs_dir=str(tmp_path), report=quiet())
    assert stopped.value.exit_code == 78
    assert sorted(path.name for path in (tmp_path / "bad" / "checkpoints").iterdir()) == ["2", "4"]
    with pytest.raises(NonFinite, match="step 6: "):  # skips before the checkpoint of step 4 count on
        fit(recipe, name="bad", runs_dir=str(tmp_path), report=quiet())


def test_what_was_done_before_an_error_is_saved(user_data, tmp_path):
    recipe = replace(user_data("if step == 7: inputs = inputs[1:]"), checkpoint_every=5)
    notes = []
    with pytest.raises(ValueError, match="batch 7"):
        fit(recipe, name="bad", runs_dir=str(tmp_path), report=quiet()._replace(note=notes.append))
    assert notes[-1] == "the 7 steps before this error are saved"
    assert sorted(path.name for path in (tmp_path / "bad" / "checkpoints").iterdir()) == ["5", "7"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: (x, y.astype(np.int64)), r"labels int64\[8\].*compiled"),
        (lambda x, y: (x.astype(np.float64), y), r"inputs float64\[8, 8, 8, 1\].*compiled"),
        (lambda x, y: (np.where(x == x.max(), np.nan, x).astype(x.dtype), y), "not a finite number"),
        (lambda x, y: (x, y + 10), r"labels must lie below 10, got \d+ at \(\d+,\)"),
    ],
)
def test_batches_are_checked(change, message):
    parts, dataset = prepare(TINY)
    checked(dataset.batch(0), parts, dataset, "batch 0")
    with pytest.raises(ValueError, match=rf"(?s)batch 0 of digits.*{message}"):
        checked(change(*dataset.batch(0)), parts, dataset, "batch 0")


@pytest.mark.parametrize("wrong", [-1, 256])
def test_ids_of_text_are_checked(wrong):
    parts, dataset = prepare(Recipe(model=Model("gpt", layers=1, width=16, context=8), batch=2))
    ids, labels = dataset.batch(0)
    ids[1, 3] = wrong
    with pytest.raises(ValueError, match=rf"batch 0 .*ids must lie in 0 to 255, got {wrong} at \(1, 3\)"):
        checked((ids, labels), parts, dataset, "batch 0")
    labels[:] = -1
    checked((np.zeros_like(ids), labels), parts, dataset, "a label of -1 counts nothing and")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a b", "a\n", "x" * 65, "é"])
def test_names_that_are_no_folder_are_refused(name, tmp_path):
    with pytest.raises(Refused, match="name = "):
        folder.locate(TINY, name, str(tmp_path))


def test_another_recipe_is_refused_with_both_values(run):
    other = replace(TINY, batch=16, seed=3, model=replace(TINY.model, width=32), plan=Plan(data=2), evaluate_every=1)
    with pytest.raises(Refused) as refused:
        fit(other, name="first", runs_dir=str(run.folder.parent), report=quiet())
    told = {problem.field: (problem.value, problem.legal) for problem in refused.value.problems}
    assert set(told) == {"batch", "seed", "model.width", "name"}, "a plan and evaluations may change"
    assert told["batch"][0] == 16 and told["batch"][1].startswith("8")
    assert "--overwrite" in told["name"][1]
    assert lines_of(run)[0]["step"] == 1, "nothing was deleted"


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    recipe = replace(TINY, batch=0, plan=Plan(zero=4))
    with pytest.raises(Refused) as refused:
        fit(recipe, name="a b", runs_dir=str(tmp_path), sinks=["cvs"], watchdog=0, report=quiet())
    assert {"sinks", "watchdog", "name", "batch", "plan.zero"} <= {one.field for one in refused.value.problems}


def test_overwrite_deletes_a_run_and_nothing_else(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    with pytest.raises(Refused, match="not the folder of a run"):
        fit(TINY, name="mine", runs_dir=str(tmp_path), overwrite=True, report=quiet())
    link = tmp_path / "link"
    folder.describe(tmp_path / "run", TINY)
    link.symlink_to(tmp_path / "run")
    with pytest.raises(Refused, match="not the folder of a run"):
        folder.locate(TINY, "link", str(tmp_path), overwrite=True)
    assert not folder.clear(mine) and not folder.clear(link)
    assert folder.clear(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine"] and (mine / "thesis.tex").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="runs_dir = "):
        folder.describe(tmp_path / "file" / "run", TINY)


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    report = progress(200)
    report.note("compiling the step ...")
    for step in range(1, 201):
        report.line({"step": step, "loss": 2.0, "tokens_per_second": 1234.5})
    report.line({"step": 200, "held_out_loss": 1.5})
    report.close()
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert not told.out and 11 <= len(lines) <= 14, "about every tenth of the run"
    assert lines[0].startswith("compiling") and lines[1].startswith("step 1/200  loss 2.0000 nats  1,23")
    assert "left" in lines[2] and lines[-1].endswith("held-out loss 1.5000 nats")


def test_plain_lines_need_no_first_step(capsys):
    import sys

    report = plain(1000, sys.stderr)
    report.line({"step": 417, "loss": 2.0, "tokens_per_second": 1.0})
    assert "step 417/1000" in capsys.readouterr().err, "a resumed run shows its first step"


def test_the_learning_rate_is_that_of_the_optimizer(run):
    rates = [line["learning_rate"] for line in lines_of(run) if "loss" in line]
    (count,) = {int(leaf) for leaf in jax.tree.leaves(run.state.opt) if leaf.ndim == 0}
    assert count == TINY.steps == len(rates) and rates[0] == 0 and rates[1] == max(rates) > rates[-1] > 0


def test_the_rate_that_is_written_is_the_one_that_was_used(user_data, tmp_path):
    recipe = replace(user_data("inputs[:] = 3e38 if step in (2, 3) else 0.1 * step"), evaluate_every=0)
    where = {"runs_dir": str(tmp_path), "report": quiet()}
    runs = fit(recipe, name="bad", **where), fit(replace(recipe, data=Data("digits")), name="digits", **where)
    bad, whole = ([line["learning_rate"] for line in lines_of(run) if "loss" in line] for run in runs)
    assert bad == [*whole[:3], whole[2], *whole[2:8]], "an update that was skipped moves no schedule"


def test_a_smaller_limit_counts_what_was_skipped_before(user_data, tmp_path):
    recipe = replace(user_data("if step >= 3: inputs[:] = 3e38"), checkpoint_every=5, skip_limit=4)
    with pytest.raises(NonFinite, match="step 7"):
        fit(recipe, name="bad", runs_dir=str(tmp_path), report=quiet())
    with pytest.raises(NonFinite, match=r"step 6: .*update 3 in a row"):
        fit(replace(recipe, skip_limit=1), name="bad", runs_dir=str(tmp_path), report=quiet())
