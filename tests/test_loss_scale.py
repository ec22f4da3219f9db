"""Loss scales: torch's trajectories, the same gradients under any plan, and what a skipped step leaves alone."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import SMALL, batch_of, built, recipe_of, run
from parity import assert_equal
from test_resume import assert_same_bits, interrupt
from tiny import TINY

from jaxpar.core import family, scaling
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Data, Model, Recipe
from jaxpar.core.refuse import Refused
from jaxpar.core.types import State
from jaxpar.loss_scales.dynamic import dynamic
from jaxpar.loss_scales.enhanced import enhanced
from jaxpar.step.parts import prepare
from jaxpar.step.program import program
from jaxpar.step.scaling import unscaling
from jaxpar.step.update import updated
from jaxpar.train import ahead, checkpoint
from jaxpar.train.ahead import Compiled
from jaxpar.train.fit import fit
from jaxpar.train.metrics import book
from jaxpar.train.progress import quiet
from jaxpar.train.stop import NonFinite

TORCH = golden.load("grad_scaler")
CONFIGS = {
    "gi4": dynamic(65536.0, interval=4),
    "gi2_f3": dynamic(1000.0, interval=2, growth=3.0, backoff=0.25),
}
CONTROLLED = f"{Path(__file__).with_name('controlled.py')}:controlled"


def second_half(loss_scale, inner, params):
    """`step(state, loss, gradients) -> (state, metrics)` and the first state: `updated`, compiled."""
    optimizer = optax.chain(unscaling(loss_scale), inner)
    state = State(jnp.int32(0), params, {}, optimizer.init(params), {})
    step = jax.jit(lambda state, loss, found: updated(optimizer, (loss, found, {}, {}), state, loss_scale))
    return step, state


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("pattern", ["mixed", "allok", "allinf"])
def test_a_dynamic_scale_is_torchs_step_for_step(pattern, config):
    want = {key.rpartition("/")[2]: TORCH[key] for key in TORCH if key.startswith(f"{pattern}/{config}/")}
    loss_scale = CONFIGS[config]
    step, state = second_half(loss_scale, optax.sgd(0.1, momentum=0.9), jnp.array([1.0, -2.0, 3.0]))

    def loss(w, i):
        return (w * jnp.array([0.3, -0.1, 0.2]) * (1 + 0.1 * i)).sum() + 0.05 * (w**2).sum()

    total = 0
    for i, kind in enumerate(want["pattern"]):
        scale = loss_scale.scale(state.opt[0].scale)
        assert scale == want["scale_used"][i]
        value, pull = jax.vjp(lambda w, i=i: loss(w, i), state.params)
        bad = ~np.isfinite(want["grad_unscaled"][i])
        assert bad.any() == (kind != "ok")
        found = jnp.where(bad, want["grad_unscaled"][i], pull(scale)[0])
        unscaled, _ = unscaling(loss_scale).update(found, state.opt[0])
        np.testing.assert_allclose(unscaled, want["grad_unscaled"][i], rtol=3e-7)
        state, metrics = step(state, value, found)
        total += kind != "ok"
        assert metrics["skipped"] == (kind != "ok") == ~want["stepped"][i] and metrics["loss_scale"] == scale
        assert state.opt[0].scale.finite == want["growth_tracker_after"][i] and state.opt[0].total == total
        np.testing.assert_allclose(state.params, want["w"][i + 1], atol=1e-6, rtol=3e-6)  # one passes by zero
    assert loss_scale.scale(state.opt[0].scale) == want["final_scale"]


def walked(loss_scale, fine):
    """The scale of each step, and after the last."""
    state, scales = loss_scale.init(), []
    for one in fine:
        scales.append(float(loss_scale.scale(state)))
        state = loss_scale.update(state, jnp.bool_(one))
    return [*scales, float(loss_scale.scale(state))]


def test_a_floor_holds_at_once_and_stops_the_fall():
    floored = enhanced(floors=((6, 32.0), (3, 8.0)), start=16.0, interval=2)
    assert walked(floored, [0, 0, 0, 0, 0, 0, 0, 1, 1, 0]) == [16, 8, 4, 8, 8, 8, 32, 32, 32, 64, 32]
    assert walked(dynamic(16.0, interval=2), [0, 0, 0, 0, 1, 1]) == [16, 8, 4, 2, 1, 1, 2]
    assert walked(enhanced(), [1])[:1] == [65536]
    late = enhanced().init()._replace(steps=149_999, scale=1.0)
    assert scaling.loss_scale_of("enhanced").update(late, False).scale == 32768


def test_a_scale_stays_a_number():
    most, least = dynamic(2.0**125, interval=1), dynamic(2.0**-125)
    assert walked(most, [1, 1, 1]) == [2.0**125, 2.0**126, 2.0**126, 2.0**126]
    assert walked(least, [0, 0, 0]) == [2.0**-125, 2.0**-126, 2.0**-126, 2.0**-126]
    for scale in (2.0**126, 2.0**-126):
        found, _ = unscaling(dynamic(scale)).update(jnp.float32(scale), unscaling(dynamic(scale)).init(None))
        assert found == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dynamc", "did you mean `dynamic`"),
        ("", "no such file in loss_scales"),
        ("static", r"static needs its scale. Legal: static:1024"),
        ("static:0", "`0` must be a finite number above 0"),
        ("static:inf", "`inf` must be a finite number"),
        ("static:1e39", "`1e39` must be a finite number"),
        ("static:", "`` must be a finite number"),
        ("none:3", "none takes no numbers"),
        ("dynamic:interval=2.5", "`2.5` must be a whole number"),
        ("dynamic:interval=0", "`0` must be a whole number"),
        ("enhanced:3000000000=8", "`3000000000` is a step beyond 2147483647"),
        ("dynamic:8+start=9", "says `start` twice"),
        ("dynamic:every=2", "dynamic has no `every`"),
        ("dynamic:growth=0.5", "growth=0.5: must be at least 1"),
        ("dynamic:backoff=1", "backoff=1.0: must lie between 0 and 1"),
        ("dynamic:40=8", "dynamic has no `40`"),
        ("enhanced:8", "a bare number means nothing here.*enhanced:40000=8192"),
        ("enhanced:floors=8", "enhanced has no `floors`"),
        ("enhanced:40=8+40=9", "says `40` twice"),
    ],
)
def test_a_text_that_names_no_loss_scale_is_one_problem(text, says):
    with pytest.raises(Refused, match=f"(?s)loss_scale = .*{says}") as refused:
        built(replace(recipe_of(SMALL["mlp"], "data=1"), loss_scale=text))
    assert [problem.field for problem in refused.value.problems] == ["loss_scale"]


def test_a_text_says_every_number():
    every = scaling.loss_scale_of("enhanced:start=4e+0+interval=1+growth=4+backoff=0.25+3=2+1=8")
    assert every.init() == (4, 0, 0) and walked(every, [0, 1]) == [4, 8, 32]
    assert walked(scaling.loss_scale_of("dynamic:8+interval=1"), [1]) == [8, 16]
    assert walked(scaling.loss_scale_of("static:1000"), [1, 0]) == [1000, 1000, 1000]
    assert Recipe.from_json(Recipe(loss_scale="static:8").to_json()).loss_scale == "static:8"


# ------------------------------------------------------------------------------------------------------ in a step

TWICE = [  # plans under which a scale that is a power of two must change next to nothing
    "pipe=2,data=2,microbatches=2,storage=residual",
    *(
        pytest.param(plan, marks=pytest.mark.slow)
        for plan in (
            "data=1,microbatches=2",
            "data=2,tensor=one_d:2,zero=1",
            "data=8,zero=3",
            "data=4,zero=2,microbatches=2",
            "tensor=two_d:2x4",
            "tensor=three_d:2x2x2",
            "tensor=one_d:2,partition=auto",
            "pipe=4,microbatches=4,schedule=zero_bubble_h1",
            "data=2,zero=3,offload=parameters+optimizer",
            "data=2,tensor=one_d:2,offload=optimizer",
        )
    ),
]


def trained(recipe, steps=3):
    """State after a few steps, and the metrics of each."""
    _, made = built(recipe)
    state, told = made.init(), []
    step = made.step.lower(made.shapes, made.batch).compile()
    for number in range(steps):
        state, metrics = step(state, made.place(batch_of(recipe, number)))
        told.append(jax.device_get(metrics))
    return state, told


@pytest.mark.parametrize("plan", TWICE)
def test_a_scale_changes_nothing_that_fits(plan):
    recipe = recipe_of(replace(SMALL["mlp"], layers=4 if "pipe=4" in plan else 2), plan)
    want, lines = trained(replace(recipe, loss_scale="none"))
    got, scaled = trained(replace(recipe, loss_scale="dynamic:1024+interval=2"))
    for line, other in zip(scaled, lines, strict=True):
        assert set(line) - set(other) == {"loss_scale", "lowered"} and not line["skipped"]
        np.testing.assert_allclose([line[name] for name in other], [*other.values()], rtol=1e-6)
    assert [line["loss_scale"] for line in scaled] == [1024, 1024, 2048]
    scale, *rest = got.opt
    assert (scale.scale, scale.skipped, scale.total) == ((2048, 1, 3), 0, 0)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(scale))
    assert_equal(jax.device_get(got.params), jax.device_get(want.params), tolerance=1e-5)
    assert_equal(jax.device_get(rest), jax.device_get([want.opt[-1]]), tolerance=1e-5)


def test_without_a_scale_nothing_of_it_is_there():
    parts, made = built(recipe_of(SMALL["mlp"], "data=1"))
    assert parts.loss_scale is None and len(parts.links) == len(made.shapes.opt) == 2
    assert "loss_scale" not in jax.eval_shape(made.step, made.shapes, made.batch)[1]


def test_a_backward_pass_with_state_sees_the_same_in_a_pipeline():
    model = Model(CONTROLLED, layers=4, width=16)
    scaled = {"loss_scale": "static:8"}
    want = run(recipe_of(model, "microbatches=4", **scaled))
    got = run(recipe_of(model, "pipe=2,data=2,schedule=interleaved,chunks=2,microbatches=4", **scaled))
    assert_equal((got.gradients, got.extra), (want.gradients, want.extra), tolerance=5e-6)


# ------------------------------------------------------------------------------------------------------ in a run

BAD = """
from jaxpar.datasets.digits import digits

def bad(*, batch, seed):
    data = digits(batch=batch, seed=seed)
    def get(step):
        inputs, labels = data.batch(step)
        return inputs * (3e38 if step in {steps} else {factor}), labels
    return data._replace(batch=get)
"""


def recipe_with(folder, steps, factor=1, **fields):
    """TINY, with batches at some steps that no loss is a number of, and with inputs times a factor at all others."""
    path = folder / "bad.py"
    path.write_text(BAD.replace("{steps}", str({*steps})).replace("{factor}", str(factor)))
    return replace(TINY, data=Data(f"{path}:bad"), **fields)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


def test_a_run_finds_its_scale_and_resumes_bitwise(tmp_path):
    """From a scale at which gradients overflow: those skips do not count against the limit, a bad batch does."""
    scale = {"loss_scale": f"dynamic:{2.0**61}+interval=2", "master": "fp16", "rounding": "nearest"}
    recipe = recipe_with(tmp_path, [7], 300, **scale, skip_limit=2)
    whole = fit(recipe, name="whole", runs_dir=str(tmp_path), report=quiet())
    lines = lines_of(whole.folder)
    lowered = [line["step"] for line in lines if "lowered" in line]
    assert lowered and lowered == [*range(1, len(lowered) + 1)]
    skipped = {line["step"]: (line["skipped"], line["skipped_total"]) for line in lines if "skipped" in line}
    assert skipped == {n: (n, n) for n in lowered} | {8: (1, len(lowered) + 1)} and "lowered" not in lines[7]
    for before, line in itertools.pairwise(lines):
        assert "skipped" not in before or line["loss_scale"] == before["loss_scale"] / 2
    assert all(line["grad_norm"] < 1e4 for line in lines if "skipped" not in line), "not the scaled one"
    scale = whole.state.opt[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(whole.state.params)} == {np.dtype(np.float16)}
    assert scale.total == whole.summary["skipped"] == len(skipped) and scale.scale.steps == TINY.steps
    assert whole.summary["loss_scale"] == lines[-1]["loss_scale"]
    counts = {int(leaf) for leaf in jax.tree.leaves(whole.state.opt[1:]) if leaf.ndim == 0}
    assert counts == {TINY.steps - len(skipped)}, "the schedule stood still"
    interrupt(recipe, tmp_path, 3, name="again")
    resumed = fit(recipe, name="again", runs_dir=str(tmp_path), report=quiet())
    assert_same_bits(resumed.state, whole.state)
    told = ("step", "loss", "loss_scale", "skipped", "skipped_total", "lowered", "learning_rate")
    same = [[line.get(name) for name in told] for line in lines_of(resumed.folder)]
    assert same == [[line.get(name) for name in told] for line in lines]


def test_a_scale_does_not_hide_what_it_cannot_mend(tmp_path):
    scale = {"loss_scale": "dynamic:65536+interval=2", "master": "fp16", "rounding": "nearest"}  # as above
    recipe = recipe_with(tmp_path, [*range(3, 10)], **scale, checkpoint_every=2, skip_limit=3)
    with pytest.raises(NonFinite, match=r"step 6: .*under loss_scale = 32768.*update 3 in a row") as stopped:
        fit(recipe, name="bad", runs_dir=str(tmp_path), report=quiet())
    assert stopped.value.exit_code == 78
    assert checkpoint.steps(tmp_path / "bad" / "checkpoints") == [2, 4]


def test_what_counts_against_the_limit():
    """Skips for which the scale fell, alone or between others, and what is known of them when a run resumes."""

    def told(kinds, lines=(), limit=2):
        written = []
        nothing = dict.fromkeys(Compiled._fields) | {"rate": lambda step: 1.0, "seconds": 1.0}
        run = Compiled(**nothing | {"speed": lambda seconds: {}})
        book_of = book(written.append, list(lines), replace(TINY, skip_limit=limit), run)
        for number, kind in enumerate(kinds, 1 + len(lines)):
            found = {"loss": np.float32(1), "grad_norm": np.float32(1 if kind == "f" else np.inf)}
            book_of.step(number, found | {"loss_scale": 2.0, "skipped": kind != "f", "lowered": kind == "l"}, 0.0, 0.0)
        book_of.settle()
        return written

    assert [line.get("skipped") for line in told("lllllfs")] == [1, 2, 3, 4, 5, None, 1]
    for kinds in ("ss", "lllsls", "slls"):
        with pytest.raises(NonFinite, match=f"step {len(kinds)}: .*update {len(kinds)} in a row"):
            told(kinds + "f")
        with pytest.raises(NonFinite, match=f"step {len(kinds)}: "):
            told(kinds[-1], told(kinds[:-1]))
    assert told("fs", told("sl")) and told("l", told("ss", limit=9))


@pytest.mark.slow
@pytest.mark.parametrize("precision", family.names("policies"))
def test_a_batch_that_is_no_number_is_skipped_in_every_policy(precision, tmp_path, monkeypatch):
    """One is, and counted; three in a row end the run with exit code 78, its last checkpoint as good as ever."""
    bad = {1, 5, 6, 7}

    def spoiled(batch, parts, dataset, name):  # inputs that are no numbers are refused before they come so far
        inputs, labels = batch
        return (np.full_like(inputs, np.nan) if int(name.split()[-1]) in bad else inputs), labels

    monkeypatch.setattr(ahead, "checked", spoiled)
    recipe = replace(TINY, plan=Plan(data=2, precision=precision), evaluate_batches=1, evaluate_every=0)
    recipe = replace(recipe, checkpoint_every=2, skip_limit=3)
    with pytest.raises(NonFinite, match=r"step 8: .*update 3 in a row") as stopped:
        fit(recipe, name="run", runs_dir=str(tmp_path), report=quiet())
    assert stopped.value.exit_code == 78
    skipped = {line["step"]: line["skipped"] for line in lines_of(tmp_path / "run") if "skipped" in line}
    assert skipped == {2: 1, 6: 1, 7: 2, 8: 3}
    checkpoints = tmp_path / "run" / "checkpoints"
    assert checkpoint.steps(checkpoints) == [2, 4, 6]
    parts, _ = prepare(recipe)
    before, after = (checkpoint.restore(checkpoints, program(parts), step) for step in (4, 6))
    loss_scale = parts.loss_scale
    counted = [leaf for leaf in jax.tree.leaves(after.opt[1:] if loss_scale else after.opt) if leaf.ndim == 0]
    assert {int(leaf) for leaf in counted} == {4}, "of six steps two were skipped"
    bad.clear()
    assert fit(recipe, name="run", runs_dir=str(tmp_path), report=quiet()).summary["skipped"] == 2
    if loss_scale:
        assert after.opt[0].total == 2 and after.opt[0].skipped == 1
        same = loss_scale.scale(after.opt[0].scale) == loss_scale.scale(before.opt[0].scale)
        assert same == (not hasattr(before.opt[0].scale, "finite"))
