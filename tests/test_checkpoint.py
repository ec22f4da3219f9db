"""What is on the disk is what was written, or it is found out: damage, full disks, kills, two runs at once."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_resume import assert_same_bits, interrupt, made_up, program_of
from tiny import TINY

from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Refused
from jaxpar.train import checkpoint, leaves, lock, manifest
from jaxpar.train.fit import fit
from jaxpar.train.manifest import Damaged
from jaxpar.train.progress import quiet
from jaxpar.train.stop import NonFinite, NotSaved


@pytest.fixture(scope="module")
def running():
    """The program of TINY; nothing of it is compiled."""
    return program_of(TINY)


@pytest.fixture
def two(tmp_path, running):
    """A folder with good checkpoints of the steps 3 and 4."""
    for step in (3, 4):
        checkpoint.save(tmp_path, running, made_up(running, step), {"note": "as written"})
    return tmp_path


def files_of(place):
    return sorted(path for path in place.rglob("*") if path.is_file())


def damage(path, rng):
    """Do one of five kinds of damage to a file; say which."""
    data = path.read_bytes()
    at = rng.randrange(len(data))
    kind = rng.choice(["flip", "truncate", "zero", "delete", "append"])
    if kind == "delete":
        path.unlink()
    elif kind == "append":
        path.write_bytes(data + rng.randbytes(rng.randint(1, 64)))
    elif kind == "truncate":
        path.write_bytes(data[:at])
    elif kind == "flip" or not any(data[at:]):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
    else:
        path.write_bytes(data[:at] + bytes(len(data) - at))
    return kind


def test_every_damage_is_found_and_named(two):
    rng, kinds, place = random.Random(0), [], two / "4"
    for _ in range(400):
        path = rng.choice(files_of(place))
        data = path.read_bytes()
        kinds.append(damage(path, rng))
        with pytest.raises(Damaged) as found:
            manifest.verify(place)
        assert (found.value.step, found.value.file) == (4, path.relative_to(place).as_posix()), kinds[-1]
        assert "step 4" in str(found.value) and str(path) in str(found.value)
        path.write_bytes(data)
    assert manifest.verify(place)["step"] == 4 and len(set(kinds)) == 5


def test_after_damage_the_checkpoint_before_it_is_restored(two, running):
    rng, want = random.Random(1), jax.device_get(made_up(running, 3))
    for path in files_of(two / "4"):
        data, notes = path.read_bytes(), []
        damage(path, rng)
        found = checkpoint.newest(two, running, notes.append)
        assert found.manifest["step"] == 3 and [one.step for one in found.damaged] == [4]
        assert (
            len(notes) == 1
            and notes[0].startswith("WARNING: checkpoint of step 4 is damaged")
            and path.name in notes[0]
        )
        assert_same_bits(found.state, want)
        path.write_bytes(data)
    assert checkpoint.newest(two, running, print).manifest["step"] == 4


def test_arrays_have_digests_of_their_own(two, running, monkeypatch):
    """Files that pass for whole do not make an array whole: here they are those of another step."""
    monkeypatch.setattr(manifest, "verify", manifest.read)
    shutil.rmtree(two / "4" / "state")
    shutil.copytree(two / "3" / "state", two / "4" / "state")
    with pytest.raises(Damaged, match=r"step 4 is damaged: .* has other values than were written") as found:
        checkpoint.restore(two, running, 4)
    assert found.value.file == "step", "the first leaf that differs; parameters were made alike"


def test_no_good_checkpoint_is_no_fresh_start(two, running):
    for step in ("3", "4"):
        (two / step / manifest.NAME).unlink()
    with pytest.raises(Refused, match=r"none of the 2 checkpoints is good.*step 4.*step 3.*--overwrite"):
        checkpoint.newest(two, running, lambda text: None)
    assert checkpoint.steps(two) == [3, 4], "nothing was deleted"
    assert checkpoint.newest(two / "elsewhere", running, print) is None


def test_a_run_goes_back_loudly_and_ends_the_same(tmp_path):
    whole = fit(TINY, report=quiet())
    interrupt(TINY, tmp_path, 6)
    checkpoints, notes = tmp_path / "run" / "checkpoints", []
    assert checkpoint.steps(checkpoints) == [4, 7]
    damage(files_of(checkpoints / "7" / "state")[0], random.Random(3))
    resumed = fit(TINY, name="run", runs_dir=str(tmp_path), report=quiet()._replace(note=notes.append))
    assert "WARNING" in notes[0] and "step 7" in notes[0] and "4 of 10 steps" in notes[1]
    assert_same_bits(resumed.state, whole.state)
    assert resumed.losses == whole.losses and resumed.held_out == whole.held_out
    assert [path.name for path in (tmp_path / "run" / "damaged").iterdir()] == ["7"], "moved away, not deleted"
    assert checkpoint.steps(checkpoints) == [4, 8, 10]


def test_the_last_two_good_ones_are_never_deleted(tmp_path, running):
    for step in range(1, 6):
        checkpoint.save(tmp_path, running, made_up(running, step), {})
    assert checkpoint.steps(tmp_path) == [3, 4, 5]
    for step in (4, 5):
        files_of(tmp_path / str(step))[0].write_bytes(b"")
    checkpoint.save(tmp_path, running, made_up(running, 6), {})
    assert checkpoint.steps(tmp_path) == [3, 4, 5, 6], "3 and 6 are good"
    checkpoint.save(tmp_path, running, made_up(running, 7), {})
    assert checkpoint.steps(tmp_path) == [5, 6, 7]


def test_everything_is_on_the_disk_before_it_is_called_good(tmp_path, running, monkeypatch):
    events = []
    fsync, rename, replaced = os.fsync, os.rename, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(("sync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(("name", str(b))), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("name", str(b))), replaced(a, b)))
    checkpoint.save(tmp_path, running, made_up(running), {})
    written = events.index(("name", str(tmp_path / "3.part" / manifest.NAME)))
    before = {path for kind, path in events[:written] if kind == "sync"}
    for path in (tmp_path / "3").rglob("*"):
        if path.name != manifest.NAME:
            assert str(path).replace("/3/", "/3.part/", 1) in before
    assert {str(tmp_path / "3.part"), str(tmp_path / "3.part" / f"{manifest.NAME}.part")} <= before
    named = events.index(("name", str(tmp_path / "3")))
    assert written < events.index(("sync", str(tmp_path / "3.part")), written) < named
    assert ("sync", str(tmp_path)) in events[named:]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's other writes, when one failed
@pytest.mark.parametrize("asked", [True, False], ids=["asked", "in the middle"])
@pytest.mark.parametrize("room", random.Random(4).sample(range(1, 20_000), 5))
def test_a_full_disk_is_an_error_at_once(room, asked, two, running, monkeypatch):
    """A limit on the size of files stands for a full disk: a write ends with an error of the system.

    Room is asked for first; but somebody else may take it, and then a write ends in the middle.
    """
    if not asked:
        monkeypatch.setattr(checkpoint, "_ask_for_room", lambda folder, size: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(NotSaved, match="step 5 could not be written"):
            checkpoint.save(two, running, made_up(running, 5), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = {path.name for path in two.iterdir()} - {"3", "4"}
    assert left <= (set() if asked else {"5.part"}), "orbax's other writes may come later than its error"
    assert checkpoint.newest(two, running, pytest.fail).manifest["step"] == 4
    assert checkpoint.save(two, running, made_up(running, 5), {}) == 5
    assert sorted(path.name for path in two.iterdir()) == ["3", "4", "5"]


def test_free_space_is_asked_for_first(two, running, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(NotSaved, match=r"bytes are needed and 1,000 are free"):
        checkpoint.save(two, running, made_up(running, 5), {})


def test_a_run_stops_when_the_disk_is_full_and_goes_on_when_it_is_not(tmp_path, monkeypatch):
    whole = fit(TINY, report=quiet())
    with monkeypatch.context() as full:
        save = ocp.Checkpointer.save

        def fails(self, directory, *args, **fields):
            if "8.part" in str(directory):
                raise ValueError("RESOURCE_EXHAUSTED: No space left on device")
            return save(self, directory, *args, **fields)

        full.setattr(ocp.Checkpointer, "save", fails)
        with pytest.raises(NotSaved, match=r"step 8 .*No space left"):
            fit(TINY, name="run", runs_dir=str(tmp_path), report=quiet())
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4]
    resumed = fit(TINY, name="run", runs_dir=str(tmp_path), report=quiet())
    assert_same_bits(resumed.state, whole.state)
    assert resumed.losses == whole.losses


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_lines_that_cannot_be_written_stop_a_run(tmp_path):
    fit(replace(TINY, steps=2), name="run", runs_dir=str(tmp_path), report=quiet())
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "summary.json.part").symlink_to("/dev/full")
    with pytest.raises(NotSaved, match="No space left"):
        fit(replace(TINY, steps=2), name="run", runs_dir=str(tmp_path), report=quiet())


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_state_that_is_no_number_is_not_saved(wrong, tmp_path, running):
    state = made_up(running)
    stem = state.params["stem"]["weight"].at[1, 1].set(wrong)
    state = state._replace(params=state.params | {"stem": state.params["stem"] | {"weight": stem}})
    with pytest.raises(NonFinite, match="params/stem/weight"):
        checkpoint.save(tmp_path, running, state, {})
    assert not checkpoint.steps(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int32", "bool"])
def test_the_digest_of_a_leaf_sees_each_bit_and_each_place(dtype):
    a = np.asarray(jnp.arange(12).reshape(3, 4).astype(dtype))
    want = manifest.leaf(a)
    assert manifest.leaf(np.asfortranarray(a)) == want == manifest.leaf(a.copy()), "the values count, not how they lie"
    assert manifest.leaf(a[::-1]) != want and manifest.leaf(a.reshape(4, 3)) != want
    bits = a.copy().view(np.uint8)
    bits[1, 1] ^= 1
    assert manifest.leaf(bits.view(a.dtype)) != want


def test_what_a_kill_left_is_tidied(two, running):
    (two / "5.part" / "state").mkdir(parents=True)
    shutil.copytree(two / "3", two / "2.gone")
    assert checkpoint.steps(two) == [3, 4]
    checkpoint.tidy(two)
    assert sorted(path.name for path in two.iterdir()) == ["3", "4"]


def test_plain_orbax_reads_a_checkpoint(two, running):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as plain:
        how = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), plain.metadata(two / "4" / "state").item_metadata.tree
        )
        found = plain.restore(two / "4" / "state", args=ocp.args.PyTreeRestore(restore_args=how))
    want = jax.device_get(made_up(running, 4).params)
    assert_same_bits(leaves.flat(found["params"]), leaves.flat(want))


HOLD = """
import sys, time
from pathlib import Path
from jaxpar.train.lock import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_and_told_who_holds_the_first(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        assert lock.holder(tmp_path / "run")["pid"] == child.pid
        with pytest.raises(Refused, match=rf"name = run: .*in use by process {child.pid} on "):
            fit(TINY, name="run", runs_dir=str(tmp_path), report=quiet())
        assert [path.name for path in (tmp_path / "run").iterdir()] == [lock.LOCK], "nothing was written"
    finally:
        child.kill()
        child.communicate()
    assert lock.holder(tmp_path / "run") is None, "the system took the lock back"
    fit(replace(TINY, steps=1), name="run", runs_dir=str(tmp_path), report=quiet())
    assert not (tmp_path / "run" / lock.LOCK).exists()


def test_a_run_refuses_itself_and_a_folder_without_locks_is_told(tmp_path, monkeypatch):
    notes = []
    with (
        lock.locked(tmp_path, notes.append),
        pytest.raises(Refused, match=str(os.getpid())),
        lock.locked(tmp_path, print),
    ):
        pass
    assert not notes
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.locked(tmp_path, notes.append), lock.locked(tmp_path, notes.append):
        assert len(notes) == 2 and "cannot be locked" in notes[0]


def test_what_the_manifest_says(two, running):
    found = manifest.read(two / "4")
    assert found["about"]["note"] == "as written" and found["about"]["jax"] == jax.__version__
    assert found["leaves"]["params/stem/weight"]["shape"] == [64, 16]
    text = json.loads((two / "4" / manifest.NAME).read_text())
    assert set(text) == {"sha256", "format", "step", "files", "leaves", "about"}


def test_a_checkpoint_of_an_earlier_version_is_restored_bitwise(running):
    """Written once, when the format was new; a later version must read it, under any plan."""
    golden = Path(__file__).parent / "golden" / "checkpoint_format_2"
    spread = program_of(replace(TINY, plan=Plan.parse("tensor=two_half_d:2x2x2")))
    for made in (running, spread):
        found = checkpoint.newest(golden, made, pytest.fail)
        assert_same_bits(found.state, made_up(running, 3))
    assert Recipe.from_json(json.dumps(found.manifest["about"]["recipe"])) == TINY


def failing(error):
    def call(*args, **fields):
        raise error

    return call


def test_what_cannot_be_read_just_now_is_not_damaged(two, running, monkeypatch):
    """Out of memory, a mount that went away, no rights: going back would lose what is as good as ever."""
    with monkeypatch.context() as broken:
        broken.setattr(
            ocp.Checkpointer, "restore", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("Out of memory"))
        )
        with pytest.raises(Refused, match=r"4: is as it was written, and yet could not be restored: Out of memory"):
            checkpoint.newest(two, running, pytest.fail)
    with monkeypatch.context() as broken:
        broken.setattr(manifest, "_digest", failing(OSError(5, "Input/output error")))
        with pytest.raises(Refused, match="cannot be read: Input/output error"):
            checkpoint.newest(two, running, pytest.fail)
    assert checkpoint.newest(two, running, pytest.fail).manifest["step"] == 4


def test_a_run_that_was_done_and_lost_its_checkpoints_is_not_begun_anew(tmp_path):
    where = {"name": "run", "runs_dir": str(tmp_path)}
    done = fit(replace(TINY, steps=2), **where, report=quiet())
    shutil.rmtree(done.folder / "checkpoints")
    with pytest.raises(Refused, match=r"checkpoints: there is none, and the run was done"):
        fit(replace(TINY, steps=2), **where, report=quiet())
    assert len((done.folder / "metrics.jsonl").read_text().splitlines()) == 3, "nothing was lost"
    (done.folder / "summary.json").unlink()
    notes = []
    fit(replace(TINY, steps=2), **where, report=quiet()._replace(note=notes.append))
    assert notes[0].startswith("WARNING") and "as far as step 2" in notes[0]


def test_a_disk_that_is_full_at_the_start_is_one_message(tmp_path, monkeypatch):
    fit(replace(TINY, steps=2), name="run", runs_dir=str(tmp_path), report=quiet())
    (tmp_path / "run" / "metrics.jsonl.part").symlink_to("/dev/full")
    with pytest.raises(NotSaved, match="No space left"):
        fit(replace(TINY, steps=2), name="run", runs_dir=str(tmp_path), report=quiet())


def test_old_ones_that_cannot_be_deleted_are_a_warning(tmp_path, running, monkeypatch):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, running, made_up(running, step), {})
    rename = os.rename

    def refusing(a, b):
        if str(b).endswith(".gone"):
            raise PermissionError(13, "Permission denied")
        return rename(a, b)

    monkeypatch.setattr(os, "rename", refusing)
    with pytest.warns(UserWarning, match="the new checkpoint is saved"):
        assert checkpoint.save(tmp_path, running, made_up(running, 4), {}) == 4
    assert checkpoint.steps(tmp_path) == [1, 2, 3, 4]


def test_a_reader_keeps_up_with_a_run_that_goes_on(two, running, monkeypatch):
    """The step that it was about to read is deleted, and a newer one is there."""
    restore, asked = checkpoint.restore, []

    def slow(folder, program, step):
        asked.append(step)
        if len(asked) == 1:
            checkpoint.save(folder, running, made_up(running, 5), {})
            shutil.rmtree(folder / "3")
            shutil.rmtree(folder / "4")
        return restore(folder, program, step)

    monkeypatch.setattr(checkpoint, "restore", slow)
    found = checkpoint.newest(two, running, pytest.fail)
    assert found.manifest["step"] == 5 and not found.damaged


@pytest.mark.parametrize("name", ["5", "2"])
def test_a_checkpoint_under_another_number_is_damaged(name, two, running):
    shutil.move(two / "4", two / name)
    found = checkpoint.newest(two, running, lambda text: None)
    assert found.manifest["step"] == 3
    assert [one.reason for one in found.damaged] == (["is of step 4"] if name == "5" else [])
    (two / "0003").mkdir()
    assert "0003" not in map(str, checkpoint.steps(two)), "a name that is not as a step is written is none"


def test_a_finished_run_is_left_as_it_is(tmp_path):
    done = fit(replace(TINY, steps=2), name="run", runs_dir=str(tmp_path), report=quiet())
    before = {path.name: path.read_text() for path in done.folder.iterdir() if path.is_file()}
    other = replace(TINY, steps=2, plan=Plan(data=2), evaluate_every=7)
    again = fit(other, name="run", runs_dir=str(tmp_path), report=quiet())
    assert_same_bits(again.state, done.state)
    assert {path.name: path.read_text() for path in done.folder.iterdir() if path.is_file()} == before
