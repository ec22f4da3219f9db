"""Experiments run, and say what they measured."""

import json
import re
from dataclasses import replace

import numpy as np
import pictures
import pytest

from experiments import (
    accumulation,
    batch_norm_faults,
    loss_scaling,
    memory,
    memory_depth,
    memory_layer,
    memory_trade,
    norm_memory,
    online_norm,
    online_norm_device,
    online_norm_digits,
    online_norm_report,
    pipeline_bubbles,
    pipeline_memory,
    precision,
    precision_gradients,
    recurrent,
    rounding,
    scaling,
    tensor_parallel,
    zero,
)
from jaxpar.cli import parse
from jaxpar.core import family
from jaxpar.core.cifar import cifar_images
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Data, Model
from jaxpar.core.refuse import Refused
from jaxpar.plan.mesh import needed
from jaxpar.step.parts import prepare
from jaxpar.step.program import program

SIZES = {"model.layers": 1, "model.width": 32, "model.heads": 4, "model.context": 16, "batch": 8, "steps": 2}
SMALL = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def options(folder, *flags):
    return parse(tensor_parallel.BASE, tensor_parallel.main, "t", [*SMALL, "--runs-dir", str(folder), *flags])


@pytest.mark.slow
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


def memory_rows(folder, recipe, **fields):
    """The table of a study of memory, and whether its rows say what they should."""
    study = pipeline_memory.Study("t", str(folder), **fields)
    pipeline_memory.main(pipeline_memory.Options(recipe, study))
    assert (folder / "t" / "memory.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(Refused, match="--overwrite"):
        pipeline_memory.main(pipeline_memory.Options(recipe, study))
    rows = json.loads((folder / "t" / "table.json").read_text())["rows"]
    lines = {}
    for row in rows:
        lines.setdefault((row["schedule"], row["storage"]), []).append(row)
    for (schedule, _), line in lines.items():
        assert all(row["pool"] > 0 and pipeline_memory.agrees(row, line[0]) for row in line)
        assert not pipeline_memory.agrees(line[0] | {"rest": line[0]["rest"] + line[0]["pool"] // 15}, line[0])
        sizes = [row["compiled"] for row in line]
        grown = (line[-1]["pool"] - line[0]["pool"]) / sizes[0]
        assert sizes[-1] > sizes[0] if schedule == "gpipe" else sizes[-1] <= 1.02 * sizes[0] and grown <= 0.02
    return rows


def test_pipeline_memory_is_that_of_the_pools(tmp_path, capsys):
    mlp = replace(pipeline_memory.BASE, model=Model("mlp", layers=4, width=64), data=Data("digits"), plan=Plan(pipe=2))
    rows = memory_rows(tmp_path, mlp, schedules="gpipe,one_f_one_b", microbatches="4,16")
    assert len(rows) == 8 and "in 4 of 4 rows" in capsys.readouterr().out
    with pytest.raises(Refused, match=r"schedules = gpip.*\n.*microbatches = 4,x.*\n.*plan = "):
        pipeline_memory.chosen(pipeline_memory.Study(schedules="gpip", microbatches="4,x"), Plan())


@pytest.mark.slow
def test_pipeline_memory_of_every_schedule(tmp_path):
    recipe = replace(pipeline_memory.BASE, model=replace(pipeline_memory.BASE.model, width=32, context=8))
    assert len(memory_rows(tmp_path, recipe, microbatches="8,16,32")) == 2 * 3 * (len(family.names("schedules")) - 1)


@pytest.mark.slow
def test_scaling_predicts_every_kind_of_plan(tmp_path, capsys, monkeypatch):
    tiny = Model("gpt", layers=4, width=32, heads=8, hidden=64, context=8, vocab=64)
    monkeypatch.setattr(scaling, "SHAPES", {"tiny": (tiny, 64)})
    monkeypatch.setattr(scaling, "CLAIMED", replace(tiny, layers=2, width=64, heads=64, hidden=256))
    monkeypatch.setattr(scaling, "BATCHES", {"T = 64 h": 512, "T = h": 8})
    monkeypatch.setattr(scaling, "GROUPS", (4, 64))
    scaling.main(scaling.Options("t", str(tmp_path), devices="8", compiled=1))
    found = json.loads((tmp_path / "t" / "table.json").read_text())
    assert {row["kind"] for row in found["rows"]} == set(scaling.families(8)) - {"data x 3-D"}
    for row in found["rows"]:
        assert row["plan"] and row["executed"] >= row["model"] > 0 and row["seconds"] > 0 and row["held"] > 0
        assert needed(Plan.parse(row["plan"])) == row["devices"]
    (made,) = [row for row in found["rows"] if "compiled" in row]
    assert made["compiled"]["compiled"] == pytest.approx(made["compiled"]["predicted"])
    few, many = dict(found["claims"]["T = h"])[4], dict(found["claims"]["T = 64 h"])[64]
    assert few["two_d"]["sent"] > few["one_d"]["sent"], "square 2-D loses where tokens are few"
    assert many["three_d"]["sent"] < many["two_d"]["sent"] < many["one_d"]["sent"]
    for name in ("plans", "claims"):
        assert (tmp_path / "t" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "slopes from 16 devices on" in capsys.readouterr().out
    with pytest.raises(Refused, match=r"shapes = tinier.*\n.*devices = 7.*\n.*compiled = -1"):
        scaling.chosen(scaling.Options(shapes="tinier", devices="7", compiled=-1))


SMALLER = {"convnet": (Model("convnet", layers=3, width=16), 16, 8), "mlp": (Model("mlp", layers=9, width=16), 64, 4)}


def test_memory_measures_what_is_claimed(tmp_path, capsys, monkeypatch):
    large = {"GPT": memory.BILLS["GPT 124M, 8 x 1024 tokens"]}
    few = {key: memory_layer.CLAIMED[key] for key in (("one_d", "none"), ("one_d", "block"))}
    chain = {("connected", "none"): "2"}
    for module, name, cases in (
        (memory, "BILLS", large),
        (memory, "SMALL", {}),
        (memory_depth, "GROWTH", chain),
        (memory_trade, "TRADED", SMALLER),
        (memory_trade, "TIMED", {}),
        (memory_layer, "CLAIMED", few),
    ):
        monkeypatch.setattr(module, name, cases)
    monkeypatch.setattr(memory_depth, "CONNECTED", (4, 6, 8))
    monkeypatch.setattr(memory_layer, "OTHERS", ({"s": 64, "b": 2, "h": 256, "a": 32, "t": 8},))
    made = memory.Options("t", str(tmp_path))
    memory.main(made)
    found = json.loads((tmp_path / "t" / "table.json").read_text())
    (bill,), (chain,), (everything, inputs) = (found[section] for section in ("bills", "depth", "layer"))
    assert bill["share"] > bill["of_data"] > 0.85 and chain["p"] > 1.5
    rows = {(row["model"], row["remat"]): row for row in found["trade"]}
    block = rows["convnet", "block"]
    assert (block["of_old"], block["of_new"]) == pytest.approx((1 / 3, 1 / 4), abs=0.01) and block["total"] < 0.25
    assert rows["convnet", "dots"]["of_old"] == 0 < rows["mlp", "block"]["of_old"] < 1 / 5
    assert everything["holds"] == inputs["holds"] == [1, 1] and inputs["ratio"] == 1
    for term, count in {"b s h/t bfloat16": 4, "b s 4h/t bfloat16": 2, "b s h bool": 2, "b a/t s s bool": 1}.items():
        assert everything["terms"][term] == count, "what the paper counts as well"
    assert (tmp_path / "t" / "memory.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "about 0 s left" in printed.err and all(f"\n{n}. " in f"\n{printed.out}" for n in range(1, 5))
    for wrong, told in ((made, "--overwrite"), (replace(made, depths="4,x", repeats=1), r"depths = 4,x.*\n.*repeats")):
        with pytest.raises(Refused, match=told):
            memory.main(wrong)


def test_zero_makes_the_table_of_its_paper(tmp_path, capsys, monkeypatch):
    plans = ("zero=1", "zero=3,microbatches=2")
    monkeypatch.setattr(zero, "SENT", {plan: zero.SENT.get(plan, "2 x 3") for plan in plans})
    monkeypatch.setattr(zero, "SMALL", Model("gpt", layers=3, width=32, heads=4, context=8, vocab=64))
    zero.main(zero.Options("t", str(tmp_path)))
    found = json.loads((tmp_path / "t" / "table.json").read_text())
    for row in found["large"]:
        assert sum(row["mixed"].values()) / 1e9 == pytest.approx(zero.CLAIMED[row["stage"]], abs=0.05)
    for row in found["small"]:
        assert row["arguments"] == row["predicted"]
    assert sum(found["small"][0]["sent"].values()) == pytest.approx(2, abs=0.02)  # and norms of small arrays
    assert found["small"][1]["sent"]["reduce_scatter"] == pytest.approx(2)
    assert (tmp_path / "t" / "zero.png").stat().st_size > 10_000 and "31.4" in capsys.readouterr().out
    with pytest.raises(Refused, match="devices = 1: must be at least 2"):
        zero.main(zero.Options("u", str(tmp_path), devices=1))


def test_precision_tells_what_a_policy_loses(tmp_path, capsys, monkeypatch):
    base = replace(precision.BASES["digits"], model=Model("mlp", layers=1, width=16))
    monkeypatch.setattr(precision, "BASES", {"digits": base})
    monkeypatch.setattr(precision, "OTHERS", {"fp16, scale 2^-20": ("fp16", f"static:{2.0**-20}")})
    made = precision.Options("t", str(tmp_path), policies="fp16,fp32", steps=20, repeats=1)
    precision.main(made)
    found = json.loads((tmp_path / "t" / "table.json").read_text())
    rows = {row["case"]: row for row in found["rows"]}
    assert list(rows) == ["fp32", "fp16", "fp16, scale 2^-20"]
    assert all(row["losses"][-1] < row["losses"][0] and row["steps"] == 20 for row in list(rows.values())[:2])
    assert rows["fp32"]["flushed"] == {"activation": 0, "weight": 0} and rows["fp32"]["times"] == 1
    assert rows["fp16"]["held_out"] == pytest.approx(rows["fp32"]["held_out"], rel=1e-2)
    assert rows["fp16"]["flushed"]["activation"] < 0.01 < 0.5 < rows["fp16, scale 2^-20"]["flushed"]["activation"]
    below = precision_gradients.below(found["gradients"]["digits"]["activation"], -4)
    shares = found["gradients"]["digits"]["weight"]
    assert sum(share for _, share in shares["shares"]) + shares["zero"] == pytest.approx(1) and 0 < below <= 1
    assert (tmp_path / "t" / "precision.png").read_bytes().startswith(b"\x89PNG")
    assert "about 0 s left" in capsys.readouterr().err
    wrong = replace(made, policies="fp16,fp61", steps=1)
    with pytest.raises(Refused, match=r"policies = fp61.*\n.*compared with fp32.*\n.*steps = 1"):
        precision.main(wrong)


def test_memory_tells_laws_of_growth_apart():
    for p in (0.5, 1, 2):
        found = memory_depth.law([(depth, round(3e6 + 1e6 * depth**p)) for depth in (4, 16, 64, 256)])
        assert (found["p"], found["constant"]) == (pytest.approx(p), pytest.approx(3e6, rel=1e-3))
    assert memory_depth.law([(4, 1000), (16, 1001), (64, 1000)])["told"] == "flat"
    assert [memory_depth.even(depth, "nested:3") for depth in (4, 16, 64, 256, 1024)] == [8, 27, 64, 216, 1000]
    assert [memory_depth.even(depth, "sqrt") for depth in (4, 15, 64)] == [4, 16, 64]


@pytest.mark.slow
def test_memory_of_compiled_stacks_grows_as_it_should(monkeypatch):
    monkeypatch.setattr(memory, "SMALL", {"small": ()})
    small = memory.bill("small", (*SMALLER["mlp"], "data=1"))
    assert small["total"] == pytest.approx(small["compiled"], rel=0.05)
    wanted = {"none": 1, "block": 1, "sqrt": 1 / 2, "nested:3": 1 / 3}
    found = {policy: memory_depth.growth("mlp", policy, [4, 16, 64, 256]) for policy in wanted}
    for policy, p in wanted.items():
        assert (found[policy]["p"], found[policy]["error"]) == pytest.approx((p, 0), abs=0.02)
        assert found[policy].get("layer") == found[policy].get("traced"), "bytes that each layer adds"
    assert memory_depth.growth("mlp", "binomial:4", [16, 64, 256])["told"] == "flat"
    chain, unit = memory_depth.growth("connected", "none", []), 8192 * 16 * 4
    quadratic, linear, _ = np.polyfit(*zip(*chain["line"], strict=True), 2) / unit
    assert chain["p"] > 1.85 and quadratic == pytest.approx(1 / 2, rel=0.02), "1 + 2 + .. + n arrays, and some a layer"
    assert 0 < linear < 5
    monkeypatch.setattr(memory_trade, "TIMED", SMALLER)
    timed = memory_trade.timed("mlp", 3)
    low, high = timed["half"]
    assert timed["flops"] > 0 and -1 < low <= timed["longer"] <= high


@pytest.mark.parametrize("depths", ["4,04,16", "1,2,3", "4,16,100000", ""])
def test_memory_names_every_wrong_flag_at_once(depths):
    with pytest.raises(Refused, match=r"depths = .*2 to 10000.*\n.*repeats = 1.*\n.*topology = v9z:2x2"):
        memory.chosen(memory.Options(depths=depths, repeats=1, topology="v9z:2x2"))


def test_accumulation_sticks_where_the_paper_says(tmp_path, monkeypatch, capsys):
    for name, less in (("FORMATS", ("fp169",)), ("FACTOR", 64), ("POINTS", 4)):
        monkeypatch.setattr(accumulation, name, less)
    accumulation.main(accumulation.Options("t", str(tmp_path), count=6000, series=2))
    found = json.loads((tmp_path / "t" / "table.json").read_text())
    ends = {way: line[-1][1] for way, line in found["curves"].items()}
    assert ends["in one go"] == 4096 and ends["exact"] == pytest.approx(6000, rel=0.05)
    for way in ("stochastic", "chunks of 32", "chunks of 64"):
        assert ends[way] == pytest.approx(ends["exact"], rel=0.1)
    (row,) = found["errors"]
    (_, naive), errors = row["errors"][-1], dict(row["errors"])
    assert naive > 5 * errors[64] and errors[1] == naive and row["in one go"] == row["sticks"] == 4096
    assert (tmp_path / "t" / "accumulation.png").read_bytes().startswith(b"\x89PNG")
    assert "4096 4096" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(Refused, match=r"count = 1"):
        accumulation.main(accumulation.Options(count=1))


@pytest.mark.slow
def test_rounding_stalls_to_nearest_and_trains_at_random(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rounding, "BASE", replace(rounding.BASE, model=Model("mlp", layers=1, width=16)))
    monkeypatch.setattr(rounding, "POINTS", 1)
    rounding.main(rounding.Options("t", str(tmp_path), formats="e5m2", steps=60))
    rows = json.loads((tmp_path / "t" / "table.json").read_text())["rows"]
    exact, nearest, stochastic = (row["held_out"][-1][1] for row in rows)
    assert nearest > 2.2 and abs(stochastic - exact) < 0.3 * (nearest - exact)
    assert rows[1]["moved"][-1][1] < rows[2]["moved"][-1][1] < rows[0]["moved"][-1][1]
    assert (tmp_path / "t" / "rounding.png").read_bytes().startswith(b"\x89PNG")
    assert "e5m2" in capsys.readouterr().out
    with pytest.raises(Refused, match=r"formats = fp17.*\n.*steps = 0"):
        rounding.main(rounding.Options(formats="fp17,bf16", steps=0))


def test_loss_scaling_sinks_where_batches_are_spoiled():
    row = loss_scaling.trained("e5m2", "dynamic", "spoiled", loss_scaling.Options(steps=20))
    assert row["skipped"] == 2 and row["scales"] == [65536.0] * 8 + [32768.0] * 8 + [16384.0] * 4
    assert [step for step, loss in enumerate(row["curve"]) if loss is None] == [7, 15] and 0 < row["accuracy"] < 1
    true = {"now": np.geomspace(1e-9, 1e-3, 1000, dtype=np.float32)}
    shares = [loss_scaling.flushed(true, scale)["now"] for scale in loss_scaling.STATIC]
    assert shares[0] == 1 and shares[-1] < 0.05 and shares == sorted(shares, reverse=True)
    with pytest.raises(Refused, match=r"steps = 1: must be from 20"):
        loss_scaling.main(loss_scaling.Options(steps=1))


@pytest.mark.slow
def test_loss_scaling_shows_what_is_claimed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loss_scaling, "STATIC", (0.001, 1.0, 10000.0))
    loss_scaling.main(loss_scaling.Options("t", str(tmp_path), steps=160))
    rows = json.loads((tmp_path / "t" / "table.json").read_text())["rows"]
    by = {(row["data"], row["loss_scale"].partition("+")[0].partition(":i")[0]): row for row in rows}
    exact, low, high = (by["digits", f"{one}"] for one in ("none", "static:0.001", "static:10000"))
    assert low["loss"] > 2.2 and high["loss"] < 2 * exact["loss"] + 0.05
    for moment, share in low["flushed"].items():
        assert share >= by["digits", "static:1"]["flushed"][moment] >= high["flushed"][moment]
    sunk, floored = (by["spoiled", name] for name in ("dynamic", "enhanced"))
    assert sunk["scales"][-1] < 1 and floored["scales"][-1] == 32768 and sunk["skipped"] == floored["skipped"] == 20
    assert (tmp_path / "t" / "loss_scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "enhanced" in capsys.readouterr().out


@pytest.mark.slow
def test_recurrent_compares_norms_with_the_published_ones(tmp_path, capsys, monkeypatch):
    small = replace(recurrent.BASE, model=Model(layers=1, width=32, hidden=32, context=16), batch=8)
    monkeypatch.setattr(recurrent, "BASE", small)
    recurrent.main(recurrent.Options("t", str(tmp_path), models="rnn", steps=60, rates="0.003,0.01"))
    found = json.loads((tmp_path / "t" / "table.json").read_text())
    rows = {row["norm"]: row for row in found["rows"]}
    assert [row["paper"] for row in rows.values()] == [172.0, 141.9, 129.2] and rows["none"]["ratio"] == 1
    for norm, row in rows.items():
        own = [run for run in found["runs"] if run["norm"] == norm]
        assert row["perplexity"] == min(run["curve"][-1][1] for run in own) < 100 and len(own) == 2
        assert all(run["losses"][-1] < run["losses"][0] for run in own)
    assert (tmp_path / "t" / "recurrent.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "129.2" in printed.out and "about 0 s left" in printed.err


def test_recurrent_scales_decays_to_its_steps_and_names_every_wrong_option():
    assert recurrent.norm_of("rnn", "layer") == "layer"
    assert recurrent.norm_of("rnn", "online") == f"online:forward={1 - 2**-13!r}+backward={1 - 2**-6!r}"
    with pytest.raises(Refused, match=r"(?s)models = gpt.*rates = 0.1,x.*steps = 1.*seeds = 0"):
        recurrent.main(recurrent.Options(models="gpt", rates="0.1,x", steps=1, seeds=0))


def test_norm_memory_grows_with_the_batch_alone(tmp_path, capsys, monkeypatch):
    large = {"U-Net, 1024^2 pixels": (replace(norm_memory.TINY, layers=1), (32, 32, 3), 2)}
    monkeypatch.setattr(norm_memory, "NETWORKS", large)
    monkeypatch.setattr(norm_memory, "SMALL", {})
    made = norm_memory.Options("t", str(tmp_path), batches="32,8")
    norm_memory.main(made)
    online, few, many = json.loads((tmp_path / "t" / "table.json").read_text())
    assert [online["norm"], few["examples"], many["examples"]] == ["online", 8, 32]
    assert all(online[kind] == many[kind] > 0 for kind in ("parameters", "gradients", "optimizer"))
    assert many["activations"] == pytest.approx(4 * few["activations"], rel=0.01)
    assert many["activations"] > 15 * online["activations"]
    assert (tmp_path / "t" / "norm_memory.png").stat().st_size > 10_000
    printed = capsys.readouterr()
    assert "about 0 s left" in printed.err and f"{many['total'] / online['total']:.1f}" in printed.out
    for wrong, told in ((made, "--overwrite"), (replace(made, batches="1,x"), "batches = 1,x")):
        with pytest.raises(Refused, match=told):
            norm_memory.main(wrong)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "batch"), norm_memory.SMALL_CASES)
@pytest.mark.parametrize("name", norm_memory.SMALL)
def test_norm_memory_predicts_what_is_compiled(name, norm, batch):
    found = norm_memory.row(name, norm, batch)
    assert found["total"] == pytest.approx(found["compiled"], rel=0.15)


def test_online_norm_scales_each_image_and_publishes_its_schedule():
    rate, momentum = online_norm.rescaled(0.1, 0.9, 1 / 32)
    assert momentum**32 == pytest.approx(0.9) and online_norm.rescaled(0.1, 0.9, 1) == pytest.approx((0.1, 0.9))
    gradients, far = np.random.default_rng(0).normal(size=64), []
    for n, (own, kept) in ((32, (0.1, 0.9)), (1, (rate, momentum))):
        v = w = 0.0
        for part in gradients.reshape(-1, n):
            v = kept * v + part.mean()
            w -= own * v
        far.append(w - own * v * kept / (1 - kept))  # where it would come to rest
    assert far[0] == pytest.approx(far[1], rel=1e-9), "each gradient moves the weight as far"
    full = online_norm.recipe_of(online_norm.Options(full=True), "online", 128, 97_656)
    assert (full.optimizer, full.learning_rate, full.weight_decay) == ("sgd:momentum=0.9", 0.1, 2e-4)
    assert full.schedule == "steps:0.4=0.1+0.6=0.01+0.8=0.001" and full.warmup == 0 and "bf16" in str(full.plan)
    assert full.model.norm == f"online:forward={1 - 2**-10}+backward={1 - 2**-7}"
    assert f"forward={1 - 2**-9}+backward={1 - 2**-4}" in online_norm.norm_of("online", "cifar100")
    assert online_norm_report.PUBLISHED["cifar10"]["layer"] == (87.4, 0.39)
    wrong = online_norm.Options(norms="onlin,batch", batches="0,8", data="mnist", budget=0.0)
    with pytest.raises(Refused, match=r"norms = onlin: .*`online`.*\n.*batches = 0.*\n.*data = mnist.*\n.*budget = 0"):
        online_norm.main(wrong)


def test_images_on_the_device_are_changed_as_on_the_host(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures.stand_in(monkeypatch, "cifar10", tmp_path)
    recipe = replace(online_norm.recipe_of(online_norm.Options(seed=3), "batch", 16, 8), plan=Plan(data=2))
    parts, dataset = prepare(replace(recipe, model=Model("mlp", layers=1, width=8)), str(tmp_path))
    made, member = program(parts), pictures.module("cifar10")
    make = online_norm_device.feed(cifar_images(member.KIND, str(tmp_path)), member.COLOURS, made, 16, 3)
    for step in (0, 19, 21):  # two epochs
        got, want = make(step), made.place(dataset.batch(step))
        assert [one.sharding for one in got] == [one.sharding for one in want]
        np.testing.assert_allclose(got[0], want[0], atol=1e-5)
        np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.slow
def test_online_norm_trains_beside_what_was_published(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures.stand_in(monkeypatch, "cifar10", tmp_path / "data")
    monkeypatch.setattr(online_norm, "MODEL", Model("resnet", layers=8, width=4))
    monkeypatch.setattr(online_norm, "affordable", lambda *_: (8, "timed"))
    made = online_norm.Options("t", str(tmp_path), norms="online,batch", batches="16,2", budget=0.1)
    made = replace(made, data_dir=str(tmp_path / "data"))
    online_norm.main(made)
    rows = json.loads((tmp_path / "t" / "table.json").read_text())["rows"]
    assert [(row["norm"], row["batch"]) for row in rows] == [("online", 16), ("batch", 16), ("online", 2), ("batch", 2)]
    for row in rows:
        assert 0 <= row["accuracy"] <= 1 and np.isfinite(row["loss"]) and len(row["curve"]) == online_norm.POINTS
        assert row["epochs"] == 8 * row["batch"] / pictures.COUNTS[0] == row["share"] * 250
    assert (tmp_path / "t" / "online_norm.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert "of the published 250 epochs" in said.out and "4 of 4" in said.err and said.err.count("timed") == 4
    (tmp_path / "t" / "table.json").unlink()
    monkeypatch.setattr(online_norm, "affordable", lambda *_: pytest.fail("timed again"))
    online_norm.main(made)  # what was stopped goes on
    again = json.loads((tmp_path / "t" / "table.json").read_text())["rows"]
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in rows]


@pytest.mark.slow
def test_online_norm_knows_its_pace_and_the_whole_schedule(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures.stand_in(monkeypatch, "cifar10", tmp_path / "data")
    monkeypatch.setattr(online_norm, "MODEL", Model("resnet", layers=8, width=4))
    options = online_norm.Options("t", str(tmp_path), data_dir=str(tmp_path / "data"), norms="online", batches="16")
    few, many = (online_norm.affordable(options, "online", 16, seconds)[0] for seconds in (60, 600))
    assert 2 * online_norm.POINTS < few < many <= 250 * 50_000 // 16
    monkeypatch.setattr(online_norm, "EPOCHS", 1)
    monkeypatch.setattr(online_norm, "IMAGES", pictures.COUNTS[0])
    online_norm.main(replace(options, full=True))
    (row,) = json.loads((tmp_path / "t" / "table.json").read_text())["rows"]
    assert row["steps"] == 20 and row["share"] == 1 and row["curve"][-1][0] == 1 and 0 <= row["accuracy"] <= 1
    assert "best of all looks" in capsys.readouterr().out


@pytest.mark.slow
def test_digits_are_learned_one_at_a_time(tmp_path, monkeypatch, capsys):
    online_norm_digits.main(online_norm_digits.Options("t", str(tmp_path), norms="online", seeds=1, epochs=6))
    (one,) = json.loads((tmp_path / "t" / "table.json").read_text())["summary"]
    assert one["large"][0] > 0.9 and one["lost"] == pytest.approx(one["large"][0] - one["small"][0])
    assert abs(one["lost"]) < 0.04, "one seed and few epochs"
    assert (tmp_path / "t" / "online_norm_digits.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"online +\d\d\.\d%", capsys.readouterr().out)
    with pytest.raises(Refused, match=r"norms = onlin.*\n.*seeds = 0"):
        online_norm_digits.main(online_norm_digits.Options(norms="onlin", seeds=0))


@pytest.mark.slow  # 7 s
def test_batch_norm_faults_tells_biased_gradients_and_evaluation_apart(tmp_path, capsys, monkeypatch):
    for name, value in {"BIASED": {"batch": "batch", "group": "group"}, "NORMS": ("batch",), "BATCHES": (8,)}.items():
        monkeypatch.setattr(batch_norm_faults, name, value)
    monkeypatch.setattr(batch_norm_faults, "KNOWN", 256)
    batch_norm_faults.main(batch_norm_faults.Options("t", str(tmp_path), passes=1, sizes=2, examples=400, seeds=1))
    found = json.loads((tmp_path / "t" / "table.json").read_text())
    distance = {row["norm"]: row["distance"] for row in found["bias"]}
    assert distance["group"] < 1e-5 < 0.1 < distance["batch"]
    apart = {row["skewed"]: row["runs"][0] for row in found["learned"]}
    assert apart[True]["evaluation"]["loss"] > apart[False]["evaluation"]["loss"] > 0
    printed = capsys.readouterr()
    assert "one class" in printed.out and "4 of 4" in printed.err
    assert (tmp_path / "t" / "batch_norm_faults.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(Refused, match=r"sizes.*from 2 to 128"):
        batch_norm_faults.main(batch_norm_faults.Options(sizes=1))
