"""What is said where a step does not fit: bytes by category, and the cheapest plans that would."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest
from harness import SMALL, built, recipe_of, variant

from jaxpar import cli
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Data, Model, Recipe
from jaxpar.core.refuse import Refused
from jaxpar.report import memory, remedies
from jaxpar.report.remedies import Need
from jaxpar.step.parts import assemble
from jaxpar.train.fit import fit
from jaxpar.train.progress import quiet

MLP = variant(SMALL["mlp"], layers=4, hidden=512)


def need_of(plan: str, room: float, backend: str = "cpu") -> Need:
    recipe = recipe_of(MLP, plan, batch=256)
    parts, _ = built(recipe)

    def remake(plan):
        return assemble(dataclasses.replace(recipe, plan=plan), parts.inputs, parts.labels, 10)

    return Need(recipe.plan, parts, remake, room, backend, None)


def fewer(monkeypatch, *changes):
    """Let only these be tried."""
    monkeypatch.setattr(remedies, "_changes", lambda plan: changes)


def found_by(need: Need) -> list[remedies.Remedy]:
    return remedies.answer(need, "full.")[0]


def total_of(need: Need, **change) -> int:
    parts = need.remake(dataclasses.replace(need.plan, **change))
    return memory.predicted(parts, None, need.backend)["total"]


TRIED = ({"zero": 1}, {"remat": "block"}, {"microbatches": 2}, {"microbatches": 3}, {"microbatches": 4})


def test_the_cheapest_of_those_that_fit_come_first_with_what_each_saves(monkeypatch):
    fewer(monkeypatch, *TRIED)
    need = need_of("data=2", 0)
    now, told = total_of(need), []
    alone = {str(change): total_of(need, **change) for change in TRIED if change != {"microbatches": 3}}
    room = sorted(alone.values())[-2]  # all but one fit
    found, problem = remedies.answer(need._replace(room=room), "it is full.", told.append)
    assert [one.fits for one in found] == sorted((one.fits for one in found), reverse=True) and found[0].fits
    assert [one.slower for one in found if one.fits] == sorted(one.slower for one in found if one.fits)
    assert all((one.total, one.saves) == (alone[str(one.change)], now - alone[str(one.change)]) for one in found)
    assert len({*map(tuple, (one.change for one in found))}) == len(found) == 3, "different fields"
    assert len(told) == 1 + len(TRIED) and "of 5, microbatches=3" in told[4], "and one that is refused is left out"
    said = str(problem)
    assert said.startswith("memory = data=2: it is full.\n") and f"{now:,}" in said and f"{room:,}" in said
    assert all(f"{one.saves:,}" in said and f"{one.total:,}" in said for one in found)
    rows = [line.split()[0] for line in said.splitlines()[2:]]
    assert rows[:4] == ["parameters", "gradients", "optimizer", "batch"] and "enough alone" not in said


def test_where_nothing_is_enough_alone_the_best_are_tried_together(monkeypatch):
    fewer(monkeypatch, {"zero": 3}, {"microbatches": 4})
    need = need_of("data=2", 0)
    both = total_of(need, zero=3, microbatches=4)
    assert both < min(total_of(need, zero=3), total_of(need, microbatches=4))
    first, *others = found_by(need._replace(room=both))
    assert first.change == {"zero": 3, "microbatches": 4} and first.total == both and first.fits
    assert len(others) == 2 and not any(one.fits for one in others)
    found, problem = remedies.answer(need._replace(room=both - 1), "full.")
    assert not any(one.fits for one in found) and "none of them is enough" in str(problem)
    assert found[0].saves == max(one.saves for one in found)


def test_where_nothing_helps_that_is_said(monkeypatch):
    fewer(monkeypatch, {"microbatches": 3}, {"zero": 7})
    found, problem = remedies.answer(need_of("data=2", 10), "full.")
    assert found == [] and str(problem).endswith("Take a smaller model, batch or context; or more devices.")


def test_a_change_that_the_plans_budget_does_not_allow_is_left_out(monkeypatch):
    fewer(monkeypatch, {"data": 1, "tensor": "one_d:2"}, {"zero": 3})
    found = found_by(need_of("data=2,remat=budget:100kB", 10))  # whole batches are 128 KiB of block inputs
    assert [one.change for one in found] == [{"zero": 3}]


@pytest.mark.parametrize("plan", ["data=4", "data=4,tensor=one_d:2,remat=block", "data=2,pipe=2,microbatches=4"])
def test_the_changes_that_are_tried_are_plans_for_as_many_devices(plan):
    before, devices = Plan.parse(plan), 1
    for change in remedies._changes(before):
        after = dataclasses.replace(before, **change)
        devices = after.data * after.pipe * int(after.tensor.partition(":")[2] or 1)
        assert devices == before.data * before.pipe * int(before.tensor.partition(":")[2] or 1)
        assert after != before and Plan.parse(str(after)) == after
    fields = {name for change in remedies._changes(before) for name in change}
    assert {"zero", "remat", "microbatches", "offload"} <= fields


# ------------------------------------------------------------------------------------------------------ as users see it

DIGITS = Recipe(Model("mlp", layers=2, width=64), Data("digits"), Plan.parse("data=2"), batch=32, steps=2)


def pretend(monkeypatch, room: float, *changes):
    monkeypatch.setattr(memory, "available", lambda device, devices: room)
    fewer(monkeypatch, *changes)


def test_a_run_that_cannot_fit_is_refused_before_and_one_that_does_not_after_it_is_compiled(monkeypatch):
    pretend(monkeypatch, 2**17, {"zero": 3})
    with pytest.raises(
        Refused, match=r"memory = data=2: each device would hold [\d.]+ MiB \(parameters [^)]*optimizer"
    ):
        fit(DIGITS, report=quiet())
    pretend(monkeypatch, 1_200_000, {"zero": 3})
    with pytest.raises(Refused, match=r"data=2: the compiled step asks for [^!]*\n +zero=3 +[\d,]+ +[\d,]+ +\S+ +yes$"):
        fit(DIGITS, report=quiet())


def test_a_device_that_is_full_ends_a_run_with_the_table_and_exit_code_2(monkeypatch, tmp_path, capsys):
    pretend(monkeypatch, None, {"zero": 3})
    says = ["RESOURCE_EXHAUSTED: Out of memory allocating 64 bytes.\n  more", "INTERNAL: something else"]

    def raises(*args):
        raise jax.errors.JaxRuntimeError(says.pop(0))

    monkeypatch.setattr("jaxpar.train.fit.loop", raises)
    flags = "train --model.name mlp --data.name digits --model.width 64 --batch 32 --steps 2 --plan data=2 --name full"
    with pytest.raises(SystemExit) as stopped:
        cli.main([*flags.split(), "--runs-dir", str(tmp_path)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in said
    assert "1 problem, the run ended:\n  - memory = data=2: Out of memory allocating 64 bytes.\n" in said
    assert "parameters " in said and "zero=3 " in said and "there is" not in said
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        cli.main([*flags.split(), "--runs-dir", str(tmp_path), "--overwrite"])


def test_a_plan_that_does_not_fit_a_topology_shows_remedies(monkeypatch, capsys):
    fewer(monkeypatch, {"remat": "block"}, {"zero": 3})
    flags = "plan --model.layers 48 --model.width 2048 --model.heads 16 --batch 64 --plan data=8 --topology v5e:2x4"
    cli.main([*flags.split(), "--predict"])
    said = capsys.readouterr()
    assert "It does not fit into the memory of a device." in said.out and "warning" not in said.out
    assert "there is" in said.out and "(times at the rates of v5e)" in said.out and "of 2, remat=block" in said.err
    cli.main([*flags.split(), "--predict", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False and {"change", "total", "saves", "slower", "fits"} == {*found["remedies"][0]}
    assert found["remedies"][0]["total"] < found["memory"]["predicted"]["total"]


def test_gaps_that_libtpu_counts_twice_are_left_out():
    sizes = {"argument": 657_208_832, "output": 657_178_112, "alias": 657_176_064, "temp": 3_495_583_232}
    said = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
    said.peak_memory_in_bytes = 3_850_288_640  # of a step whose buffer assignment takes 3,854,754,304
    assert 657_210_880 + 3_495_583_232 - memory.lost(said, "tpu") == said.peak_memory_in_bytes
    assert memory.lost(said, "cpu") == 0
    said.peak_memory_in_bytes = 2**33  # the memory beside the core, of a small step
    assert memory.lost(said, "tpu") == 0
