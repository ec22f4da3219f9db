"""Experiments run, and say what they measured."""

import json

import pytest

from experiments import pipeline_bubbles, tensor_parallel
from jaxpar.cli import parse
from jaxpar.core import family
from jaxpar.core.refuse import Refused
from jaxpar.plan.mesh import needed

SIZES = {"model.layers": 1, "model.width": 32, "model.heads": 4, "model.context": 16, "batch": 8, "steps": 2}
SMALL = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def options(folder, *flags):
    return parse(tensor_parallel.BASE, tensor_parallel.main, "t", [*SMALL, "--runs-dir", str(folder), *flags])


def test_tensor_parallel_measures_every_plan_it_is_given(tmp_path, monkeypatch, capsys):
    chosen = ["tensor=one_d:4", "data=2,tensor=two_d:2x2"]
    monkeypatch.setattr(tensor_parallel, "plans", lambda devices: chosen)
    tensor_parallel.main(options(tmp_path, "--devices", "8"))
    table = json.loads((tmp_path / "t" / "table.json").read_text())
    assert [row["plan"] for row in table["rows"]] == chosen
    for row in table["rows"]:
        assert 0 < row["error"] <= 2e-6 and 0 < row["auto_error"] <= 2e-6
        assert row["predicted"] == pytest.approx(row["compiled"]) and row["auto"] > 0 and not row["warnings"]
        assert row["memory"] > 10_000 and row["step_ms"] > 0
    assert (tmp_path / "t" / "bytes.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert all(plan in printed.out for plan in chosen) and "2 of 2" in printed.err
    with pytest.raises(Refused, match="--overwrite"):
        tensor_parallel.main(options(tmp_path, "--devices", "8"))


@pytest.mark.parametrize("count", tensor_parallel.DEVICES)
def test_tensor_parallel_has_every_scheme_on_several_meshes(count):
    plans = [tensor_parallel.Plan.parse(plan) for plan in tensor_parallel.plans(count)]
    assert len(set(plans)) == len(plans) and {needed(plan) for plan in plans} == {count}
    for name in set(family.names("schemes")) - {"single"}:
        assert sum(plan.tensor.startswith(f"{name}:") for plan in plans) >= 2


def test_pipeline_bubbles_are_what_the_papers_say(tmp_path, capsys):
    pipeline_bubbles.main(pipeline_bubbles.Options("t", str(tmp_path), devices=2, microbatches=4))
    rows = json.loads((tmp_path / "t" / "table.json").read_text())["rows"]
    assert {row["schedule"] for row in rows} == set(family.names("schedules")) - {"from_table"}
    rows += [pipeline_bubbles.measure(name, 4, 8, chunks) for name, chunks in pipeline_bubbles.STATED]
    assert all(map(pipeline_bubbles.agrees, rows))
    assert not pipeline_bubbles.agrees(rows[0] | {"span": rows[0]["span"] + 1})
    for name in ("naive", "timetables_2x4", "bubbles"):
        assert (tmp_path / "t" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "9 of 9 rows are as expected" in printed and printed.index("d3 |") < printed.index("gpipe ")
    for fields, told in (
        ({}, "--overwrite"),
        ({"microbatches": 3}, "devices = 0"),
        ({"devices": 4, "microbatches": 6}, "8"),
    ):
        with pytest.raises(Refused, match=told):
            pipeline_bubbles.main(pipeline_bubbles.Options("t", str(tmp_path), **fields))
