"""What is found on held-out data: the loss of every model, and the accuracy of a classifier, on any mesh."""

import json
import sys

import jax
import numpy as np
import pytest
from harness import SMALL, batch_of, built, placed, recipe_of
from tiny import TINY

from jaxpar.plan.context import context
from jaxpar.train.ahead import Compiled, Score
from jaxpar.train.fit import fit
from jaxpar.train.metrics import book
from jaxpar.train.progress import plain, quiet

MLP = SMALL["mlp"]
MESHES = (
    "data=2,tensor=two_d:2x2",  # 10 classes over 2 devices
    "tensor=one_d:8,microbatches=2",  # over 8, so that some hold padding alone
    "tensor=three_d:2x2x2,partition=auto",
    "pipe=2,data=2,microbatches=4,tensor=one_d:2",
)


def evaluated(plan, change=lambda params: params):
    recipe = recipe_of(MLP, plan)
    parts, made = built(recipe)
    state = placed(recipe, parts, made)
    inputs, labels = batch_of(recipe)
    labels[3] = -1
    params = jax.tree.map(lambda a: a * 5, state.params)
    found = jax.device_get(made.evaluate(change(params), state.extra, made.place((inputs, labels))))
    logits = parts.model.apply(params, state.extra, inputs, context(parts.settings))[0] if plan == "data=1" else None
    return [float(one) for one in found], logits, labels


@pytest.fixture(scope="module")
def alone():
    return evaluated("data=1")


def test_accuracy_is_the_share_of_largest_logits(alone):
    (nats, count, right), logits, labels = alone
    assert right == (np.argmax(logits, -1) == labels).sum() and 0 < right < count == (labels >= 0).sum()
    likely = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), labels[:, None], -1)[labels >= 0]
    assert nats == pytest.approx(-likely.sum(), rel=1e-5)


@pytest.mark.parametrize("plan", MESHES)
def test_accuracy_is_that_of_one_device_on_any_mesh(alone, plan):
    got = evaluated(plan)[0]
    assert got[1:] == alone[0][1:] and got[0] == pytest.approx(alone[0][0], rel=2e-6)


@pytest.mark.parametrize("plan", ["data=1", MESHES[1]])
def test_of_equal_logits_the_first_counts(plan):
    (_, count, right), _, labels = evaluated(plan, lambda params: jax.tree.map(lambda a: a * 0, params))
    assert count == 15 and right == (labels == 0).sum()


def test_a_classifier_tells_its_accuracy_and_a_language_model_none(tmp_path, capsys):
    run = fit(TINY, name="a", runs_dir=str(tmp_path), report=quiet())
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    shares = {line["step"]: line["held_out_accuracy"] for line in lines if "held_out_loss" in line}
    assert list(shares) == [5, 10] and 0 < shares[10] <= 1 and (shares[10] * 16) % 1 == 0, "2 batches of 8"
    assert run.summary["held_out_accuracy"] == shares[10]
    plain(40, sys.stderr).line({"step": 40, "held_out_loss": 1.5, "held_out_accuracy": 0.61234})
    assert capsys.readouterr().err == "step 40/40  held-out loss 1.5000 nats  61.2% right\n"
    written = []
    nothing = Compiled(**dict.fromkeys(Compiled._fields) | {"seconds": 0.0})
    for score in (Score(1.5, 0.25), Score(1.5, None)):
        book(written.append, [], TINY, nothing).held_out(5, score, 0.1)
    with_accuracy, without = written
    assert with_accuracy == without | {"held_out_accuracy": 0.25} and len(without) == 3
