"""A run that was stopped, and one that was moved to other devices, is the same run.

"Bitwise" means equal bits in every leaf: parameters, running statistics, the optimizer's state and the losses.
"""

import json
import shutil
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity import assert_equal
from tiny import TINY

from jaxpar.core.plan import Plan, scheme_of
from jaxpar.core.recipe import Data, Model
from jaxpar.core.refuse import Refused
from jaxpar.core.types import State
from jaxpar.plan import padding
from jaxpar.plan.layout import SINGLE, place
from jaxpar.plan.zero import zero_of
from jaxpar.step.parts import prepare
from jaxpar.step.program import program
from jaxpar.train import checkpoint, folder, leaves, manifest, store
from jaxpar.train.fit import fit
from jaxpar.train.progress import Report, quiet
from jaxpar.train.stop import Interrupted, NotSaved

SPREAD = replace(TINY, plan=Plan.parse("tensor=two_half_d:2x2x2"))
CONVNET = replace(TINY, model=Model("convnet", layers=1, width=8), plan=Plan.parse("data=2,tensor=two_d:2x2"))
GPT = replace(
    TINY,
    model=Model("gpt", layers=2, width=16, heads=4, context=8, vocab=257),
    data=Data("stdlib_text"),
    plan=SPREAD.plan,
)
PIPED = replace(
    TINY,
    model=Model("mlp", layers=4, width=16, dropout=0.1),
    plan=Plan.parse("data=2,pipe=4,microbatches=4,schedule=one_f_one_b"),
)
CHAIN = [
    "tensor=two_half_d:2x2x2",
    "tensor=three_d:1x4x1",
    "data=8,zero=3",
    "data=2,tensor=one_d:2,zero=1",
    "data=1",
    "tensor=fsdp:8",
    "data=4,zero=2,zero_group=2",
    "data=2,pipe=2,microbatches=2,zero=3",
]


def assert_same_bits(got, want):
    got, want = jax.device_get((got, want))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        same = one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
        assert same, jax.tree_util.keystr(path)


def program_of(recipe, optimizer=None):
    parts, _ = prepare(recipe)
    return program(parts._replace(optimizer=optimizer) if optimizer else parts)


def made_up(running, step=3):
    """A State of random bits, with zeros where it is padded, placed as `running` wants it: no step is compiled."""
    rng = np.random.default_rng(0)

    def one(words, leaf, padded):
        drawn = (
            rng.standard_normal(leaf.shape) if jnp.issubdtype(leaf.dtype, jnp.floating) else np.full(leaf.shape, step)
        )
        bits = padding.laid(running.placement.stack, words, drawn.astype(leaf.dtype), padded.shape)
        return jax.device_put(bits, padded.sharding)

    return jax.tree.map(one, running.words, running.unpadded, running.shapes)


def on_disk(running, state):
    """What of a State a checkpoint holds, on the host."""
    return padding.unpad(running.placement, running.words, jax.device_get(state), running.unpadded)


def stop_at(step, number=signal.SIGINT):
    """A report during which this process gets a signal, once the line of `step` is written."""

    def line(values):
        if values["step"] == step and "loss" in values:
            signal.raise_signal(number)

    return quiet()._replace(line=line)


def interrupt(recipe, runs_dir, step, name="run"):
    with pytest.raises(Interrupted) as stopped:
        fit(recipe, name=name, runs_dir=str(runs_dir), report=stop_at(step))
    assert stopped.value.exit_code == 77


def masked():
    """An optimizer whose state has empty nodes, masked leaves and scalars."""
    matrices = optax.masked(optax.adamw(1e-3), lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params))
    return optax.chain(optax.clip_by_global_norm(1.0), matrices, optax.scale_by_schedule(lambda step: 0.5))


@pytest.mark.parametrize("optimizer", [None, masked()], ids=["adamw", "masked"])
def test_a_state_moves_to_other_devices_and_schemes(optimizer, tmp_path):
    before, want = None, None
    for plan in CHAIN:
        running = program_of(replace(GPT, plan=Plan.parse(plan)), optimizer)
        if before is None:
            state = made_up(running)
            want = on_disk(running, state)
        else:
            state = checkpoint.restore(tmp_path / before, running, 3)
        assert_same_bits(on_disk(running, state), want)
        assert [leaf.sharding for leaf in jax.tree.leaves(state)] == [
            s.sharding for s in jax.tree.leaves(running.shapes)
        ]
        before = plan.replace(":", "-")
        assert checkpoint.save(tmp_path / before, running, state, {}) == 3


def piped(pipe, stack, tensor="single", data=1):
    """A plan's name, and where parameters lie: pipelines of a model of three layers."""
    placement = place(scheme_of(tensor), data, {"batch": TINY.batch, "context": 8}, pipe=pipe, stack=stack)
    return pytest.param(placement, id=f"{pipe}-{tensor}-{len(stack)}")


PIPELINES = [
    piped(2, (0, 1, 2, -1), "two_d:2x2"),
    piped(4, (2, -1, 0, 1), "one_d:2"),
    piped(2, (1, -1, -1, 0, 2, -1), data=4),
    piped(3, (0, 1, 2)),
    piped(1, (), "two_half_d:2x2x2"),
]


def pipeline_of(placement, optimizer):
    parts, _ = prepare(replace(GPT, model=replace(GPT.model, layers=3), plan=Plan()))
    own = optimizer(parts) if optimizer else parts.optimizer
    zero = zero_of(Plan(), placement, parts.model.dims[0], jax.eval_shape(parts.model.init, jax.random.key(0))[0])
    settings = parts.settings._replace(placement=placement, zero=zero)
    return program(parts._replace(settings=settings, optimizer=own))


@pytest.mark.parametrize("placement", PIPELINES)
@pytest.mark.parametrize(
    "optimizer",
    [None, lambda parts: optax.sgd(0.1, momentum=0.9), lambda parts: masked()],
    ids=["adamw", "sgd", "masked"],
)
def test_layers_are_in_order_on_disk(placement, optimizer):
    alone = pipeline_of(SINGLE, optimizer)
    want = jax.tree.map(lambda leaf: np.where(abs(leaf) < 0.3, -0.0, leaf), jax.device_get(made_up(alone)))
    want = jax.tree.map(
        lambda leaf, like: leaf.astype(like.dtype), want, alone.unpadded
    )  # with zeros that are negative
    running = pipeline_of(placement, optimizer)
    assert jax.tree.structure(running.words) == jax.tree.structure(running.shapes)
    named = leaves.on_disk(running)
    found = {name: jax.device_put(leaf, named[name].sharding) for name, leaf in leaves.flat(want).items()}
    state = leaves.padded(running, found)
    assert [leaf.sharding for leaf in jax.tree.leaves(state)] == [to.sharding for to in jax.tree.leaves(running.shapes)]
    assert_same_bits(on_disk(running, state), want)
    back = leaves.unpadded(running, state)
    assert_same_bits(back, leaves.flat(want))
    assert all(back[name].sharding == named[name].sharding for name in named)
    stacked = {name for name, words in leaves.flat(running.words).items() if words.startswith("layers")}
    assert any(name.startswith("params/blocks") for name in stacked)
    assert any("mu" in name.split("/") or "trace" in name.split("/") for name in stacked), "moments move as well"
    for name, leaf in leaves.flat(state).items() if placement.stack else ():
        assert (leaf.sharding.spec[:1] == ("pipe",)) == (name in stacked), name


def test_a_checkpoint_of_a_pipeline_restores_on_any_other_and_on_none(tmp_path):
    before, want = None, None
    for number, placement in enumerate([*(case.values[0] for case in PIPELINES), SINGLE]):
        running = pipeline_of(placement, None)
        state = made_up(running) if before is None else checkpoint.restore(before, running, 3)
        want = want or on_disk(running, state)
        assert_same_bits(on_disk(running, state), want)
        before = tmp_path / str(number)
        checkpoint.save(before, running, state, {})
    digests = [checkpoint.described(path, 3)["leaves"] for path in tmp_path.iterdir()]
    assert all(one == digests[0] for one in digests)


def test_padding_is_not_on_disk(tmp_path):
    running = program_of(GPT)
    padded = [
        (leaf.shape, full.shape)
        for leaf, full in zip(jax.tree.leaves(running.unpadded), jax.tree.leaves(running.shapes), strict=True)
        if leaf.shape != full.shape
    ]
    assert padded and all(257 in there and 257 not in full for there, full in padded)
    checkpoint.save(tmp_path, running, made_up(running), {})
    shapes = [tuple(leaf["shape"]) for leaf in checkpoint.described(tmp_path, 3)["leaves"].values()]
    assert sorted(shapes) == sorted(leaf.shape for leaf in jax.tree.leaves(running.unpadded))


@pytest.mark.parametrize("recipe", [SPREAD, CONVNET, PIPED], ids=["dropout", "batch_norm", "pipeline"])
def test_stop_and_resume_is_no_stop_bitwise(recipe, tmp_path):
    whole = fit(recipe, report=quiet())
    interrupt(recipe, tmp_path, 6)  # its line is written while step 7 runs, so that one is finished too
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4, 7]
    resumed = fit(recipe, name="run", runs_dir=str(tmp_path), report=quiet())
    assert_same_bits(resumed.state, whole.state)
    assert resumed.losses == whole.losses and resumed.held_out == whole.held_out


def test_a_run_goes_on_under_another_plan(tmp_path):
    whole = fit(TINY, report=quiet())
    interrupt(TINY, tmp_path, 3)
    moved = fit(SPREAD, name="run", runs_dir=str(tmp_path), report=quiet())
    assert moved.losses[:4] == whole.losses[:4]
    assert_equal(moved.losses, whole.losses, tolerance=1e-5)
    assert (moved.folder / "plan.txt").read_text() == f"{SPREAD.plan}\n"


@pytest.fixture(scope="module")
def four_stages(tmp_path_factory):
    """A folder with a run of four stages that was interrupted, and the same run on one device."""
    interrupt(PIPED, home := tmp_path_factory.mktemp("four"), 3)
    return home, fit(replace(PIPED, plan=Plan()), report=quiet())


@pytest.mark.parametrize("plan", ["pipe=2,chunks=2,schedule=interleaved,microbatches=2", "data=1"])
def test_a_run_of_four_stages_goes_on_with_fewer(plan, four_stages, tmp_path):
    before, whole = four_stages
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)
    moved = fit(replace(PIPED, plan=Plan.parse(plan)), name="run", runs_dir=str(tmp_path), report=quiet())
    assert_equal(moved.losses, whole.losses, tolerance=1e-5)
    assert_equal(moved.held_out, whole.held_out, tolerance=1e-5)


def test_lines_after_the_checkpoint_are_cut(tmp_path):
    interrupt(TINY, tmp_path, 4)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as lines:  # as kill -9 leaves it
        lines.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    run = fit(TINY, name="run", runs_dir=str(tmp_path), report=quiet())
    steps = [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10], "each step once, and two evaluations"
    assert len(run.losses) == 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_are_put_back(number, tmp_path):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="step 3 of 10"):
        fit(TINY, name="run", runs_dir=str(tmp_path), report=stop_at(2, number))
    assert signal.getsignal(number) is before


def test_the_second_ctrl_c_stops_at_once(tmp_path):
    def twice(values):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(TINY, name="run", runs_dir=str(tmp_path), report=quiet()._replace(line=twice))
    assert not checkpoint.steps(tmp_path / "run" / "checkpoints")


def test_a_run_without_a_name_leaves_ctrl_c_alone():
    seen = []
    report = Report(lambda text: None, lambda values: seen.append(signal.getsignal(signal.SIGINT)), lambda: None)
    fit(TINY, report=report)
    assert set(seen) == {signal.getsignal(signal.SIGINT)}


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    running = program_of(TINY)
    for step in range(1, 6):
        checkpoint.save(tmp_path, running, made_up(running, step), {})
    assert checkpoint.steps(tmp_path) == [3, 4, 5]
    assert int(checkpoint.restore(tmp_path, running, 4).step) == 4


def test_another_model_is_refused_by_leaf(tmp_path):
    checkpoint.save(tmp_path, (running := program_of(TINY)), made_up(running), {})
    wider = program_of(replace(TINY, model=Model("mlp", layers=2, width=32)))
    with pytest.raises(Refused, match=r"params/stem/weight = float32\[64, 16\].*float32\[64, 32\]"):
        checkpoint.restore(tmp_path, wider, 3)
    with pytest.raises(Refused, match=r"opt/\S+ = .*needs nothing"):
        checkpoint.restore(tmp_path, program_of(TINY, optax.sgd(0.1)), 3)


def test_another_dtype_is_refused_not_cast(tmp_path):
    checkpoint.save(tmp_path, (running := program_of(TINY)), made_up(running), {})
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), running.unpadded)
    with pytest.raises(Refused, match=r"float32\[64, 16\].*bfloat16\[64, 16\]"):
        checkpoint.restore(tmp_path, running._replace(unpadded=half), 3)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, (running := program_of(TINY)), made_up(running), {"note": 1})
    assert checkpoint.described(tmp_path, 3)["about"]["note"] == 1
    monkeypatch.setattr(manifest, "FORMAT", 1)
    with pytest.raises(Refused, match="format 2"):
        checkpoint.restore(tmp_path, running, 3)


def test_a_failed_save_is_an_error(tmp_path):
    running = program_of(TINY)
    state = made_up(running)
    checkpoint.save(tmp_path, running, state, {})
    with pytest.raises(NotSaved, match="the checkpoint of step 3 could not be written"):
        checkpoint.save(tmp_path, running, state, {})
    (tmp_path / "file").touch()
    with pytest.raises(NotSaved, match="step 3 could not be written"):
        checkpoint.save(tmp_path / "file", running, state, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "file"]


def test_a_run_whose_data_changed_is_refused(tmp_path):
    parts, dataset = prepare(TINY)
    running = program(parts)
    disk = store.on_disk(tmp_path, TINY, running, parts, dataset, overwrite=False)
    folder.describe(tmp_path, TINY)
    disk.save(made_up(running))
    state, lines = disk.load(lambda text: None)
    assert isinstance(state, State) and not lines
    other = dataset._replace(batch=lambda step: dataset.batch(step + 1), source="digits of another day")
    with pytest.raises(Refused, match="digits of another day"):
        store.on_disk(tmp_path, TINY, running, parts, other, overwrite=False).load(lambda text: None)
