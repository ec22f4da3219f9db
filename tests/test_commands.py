"""What `python -m jaxpar` can do: doctor, sample, runs, data, train recipe.json, and parts in a user's own files."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpar
from experiments import lm
from jaxpar import cli
from jaxpar.commands import data as data_command
from jaxpar.commands import doctor as doctor_command
from jaxpar.core import family, files
from jaxpar.core.makespan import Times, lockstep
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Data, Model, Recipe
from jaxpar.core.refuse import Problem, Refused
from jaxpar.report import account, compiled, flops, layouts, machine, memory
from jaxpar.step.generate import _likeliest
from jaxpar.step.parts import prepare
from jaxpar.train import folder, lock, record
from jaxpar.train import sample as writing
from jaxpar.train.fit import fit
from jaxpar.train.progress import quiet

ROOT = Path(__file__).parent.parent
TEXT = Recipe(
    Model("gpt", layers=1, width=16, heads=2, context=16),
    Data("stdlib_text"),
    Plan.parse("data=2,tensor=one_d:2,precision=bf16"),
    batch=8,
    steps=4,
    evaluate_every=2,
    evaluate_batches=1,
    checkpoint_every=2,
)
PICTURES = Recipe(Model("mlp", layers=1, width=16), Data("digits"), batch=8, steps=2, evaluate_batches=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of two runs, `text` and `pictures`, and the first of them in memory."""
    runs = tmp_path_factory.mktemp("runs")
    run = fit(TEXT, name="text", runs_dir=str(runs), report=quiet())
    fit(PICTURES, name="pictures", runs_dir=str(runs), report=quiet())
    return runs, run


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of that folder."""
    return Path(shutil.copytree(trained[0], tmp_path / "runs"))


def told(argv, capsys):
    """What a command prints."""
    cli.main(argv)
    return capsys.readouterr().out


def refused(argv, capsys):
    """What stderr says about bad words, in one line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and "Traceback" not in said.err
    return " ".join(re.sub("[│╭╮╰╯─]", " ", said.err).split())


@pytest.mark.parametrize("name", family.names("commands"))
def test_every_command_has_help_with_examples_that_are_flags_of_it(name, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and f"python -m jaxpar {name}" in said.partition("examples:")[2]
    known = set(re.findall(r"--[a-z][\w.-]*", said.partition("examples:")[0]))
    assert set(re.findall(r"--[a-z][\w.-]*", said.partition("examples:")[2])) <= known
    assert "_" not in " ".join(known)


def test_the_flags_of_a_run_come_in_four_groups(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    said = capsys.readouterr().out
    groups = re.findall(r"^\W*((?:\w+ )?options)\W*$", said, re.MULTILINE)
    assert groups == ["options", "model options", "data options", "run options"]
    assert "--watchdog" in said.partition("run options")[2] and "--sinks" in said.partition("run options")[2]


@pytest.mark.parametrize(
    "flags, words", [("--sinks csv,tensorbord", "did you mean `tensorboard`"), ("--watchdog soon", "--watchdog")]
)
def test_flags_of_a_run_are_checked(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(["train", *flags.split()], capsys) and not list(tmp_path.iterdir())


# plan

PIPED = ["experiments.lm", "--model.width", "64", "--plan", "data=2,tensor=one_d:2,pipe=4,microbatches=8"]


def test_a_forecast_in_json_is_what_the_parts_say(capsys):
    found = json.loads(told(["plan", *PIPED, "--json", "--predict", "--explain"], capsys))
    parts, _ = prepare(replace(lm.BASE, model=replace(lm.BASE.model, width=64), plan=Plan.parse(PIPED[-1])))
    figures = {
        "plan",
        "devices",
        "topology",
        "room",
        "mesh",
        "params",
        "flops",
        "bubble",
        "pipeline",
        "comm",
        "memory",
        "host",
        "fits",
    }
    assert set(found) == figures | {"compiled", "warnings", "explain"}
    assert found["compiled"] is found["comm"]["compiled"] is found["memory"]["compiled"] is found["fits"] is None
    assert found["flops"]["model"] == flops.of_model(parts) / 16 < found["flops"]["executed"] == flops.executed(parts)
    assert (found["plan"], found["devices"]) == (PIPED[-1], 16)
    assert found["mesh"] == {"pipe": 4, "data": 2, "tensor": 2} and not found["warnings"]
    assert found["params"] == sum(map(jnp.size, jax.tree.leaves(parts.model.init(jax.random.key(0))[0])))
    assert (
        sum(sum(kinds.values()) for kinds in found["comm"]["predicted"].values()) == account.predicted(parts).total_sent
    )
    assert {"pipe", "data", "tensor"} <= set(found["comm"]["predicted"])
    held = found["memory"]["predicted"]
    assert held == memory.predicted(parts) and held["activations"] == account.pool_bytes(parts) > 0
    assert held["total"] > held["parameters"] + held["optimizer"] + held["activations"]
    terms = {}
    for row in found["explain"]:
        terms[row["figure"]] = terms.get(row["figure"], 0) + row["value"]
    assert terms.pop("flops executed") == found["flops"]["executed"] and terms.pop("bubble") == found["bubble"]
    assert terms.pop("flops model") == found["flops"]["model"]
    assert all(terms.pop(f"memory {name}") == size for name, size in held.items() if name != "total")
    sums = {f"comm {axes}": sum(kinds.values()) for axes, kinds in found["comm"]["predicted"].items()}
    assert terms == pytest.approx(sums)
    pipeline, table = found["pipeline"], parts.pipeline.table
    assert found["bubble"] == pytest.approx(3 / (8 + 3)) and pipeline["span"] == 3 * (8 + 3)
    assert pipeline["lockstep_span"] == lockstep(table.order, table.at, Times()) > pipeline["span"]
    assert pipeline["lockstep_bubble"] == pytest.approx(1 - 8 * 3 / pipeline["lockstep_span"])
    assert (pipeline["ticks"], pipeline["live"], pipeline["messages"]) == (table.ticks, [4, 3, 2, 1], 2 * 3 * 8)
    assert pipeline["blocks"] == [1, 1, 1, 1]


def test_a_plan_of_512_devices_is_answered_on_one_and_nothing_is_compiled():
    code = "import jax; from jaxpar import cli; cli.main(); print(jax.device_count(), jax.config.jax_platforms)"
    words = ["plan", "experiments.lm", "--batch", "128", "--plan", "data=4,tensor=three_d:4x4x4,pipe=2,microbatches=2"]
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    env |= {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "JAX_LOG_COMPILES": "1"}
    found = subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert "512: pipe 2 x data 4 x i 4 x j 4 x k 4\n" in found.stdout
    assert found.stdout.endswith("\n1 cpu\n"), "no accelerator is taken, which a run may hold"
    compiled = [line for line in found.stderr.splitlines() if line.startswith("Compiling")]
    assert "Finished tracing" in found.stderr
    assert all("types (ShapedArray(int32[]),)" in line for line in compiled), compiled  # optax counts from a zero


def test_a_forecast_as_text_with_its_timetable(capsys, tmp_path):
    words = ["--model.name", "mlp", "--data.name", "digits", "--model.layers", "3", "--model.width", "16"]
    words.append("--predict")
    said = told(["plan", *words, "--plan", "pipe=2,microbatches=1", "--timetable"], capsys)
    assert said.endswith("d0 |F0  .  .  . B0  =\nd1 | . F0 B0  =  .  .\n")
    assert "idle         50.0% of the time, as all wait" in said
    assert said.count("warning: ") == 2 and "stages have 2, 1 blocks" in said and "1 microbatches never keep 2" in said
    alone = told(["plan", *words, "--plan", "partition=auto"], capsys)
    assert "pipeline" not in alone and "all_" not in alone and "warning: partition=auto" in alone
    picture = tmp_path / "new" / "timetable.png"
    kept = [
        "--name",
        "x",
        "--runs-dir",
        str(tmp_path),
        "--sinks",
        "csv",
        "--devices",
        "2",
    ]  # as they stand after `train`
    said = told(["plan", *words, *kept, "--plan", "pipe=2,microbatches=4", "--picture", str(picture)], capsys)
    assert said.endswith(f"{picture}\n") and picture.read_bytes().startswith(b"\x89PNG")
    assert [*tmp_path.iterdir()] == [picture.parent], "no run was begun"


def test_predicted_and_compiled_stand_side_by_side(capsys, tmp_path):
    words = [
        "--model.name",
        "mlp",
        "--data.name",
        "digits",
        "--model.layers",
        "2",
        "--model.width",
        "16",
        "--batch",
        "16",
    ]
    picture = tmp_path / "layout.png"
    plan = "pipe=2,tensor=two_d:2x2,microbatches=2"
    said = told(["plan", *words, "--plan", plan, "--layout", "--layout-picture", str(picture)], capsys)
    before, after = said.split("compiling for 8 simulated devices ...")
    assert (
        "compiled / predicted" in after and "compiled for" not in before and picture.read_bytes().startswith(b"\x89PNG")
    )
    assert "none predicted" not in after and "warning" not in after
    lines = [line.split() for line in after.splitlines() if line.startswith(("bytes sent", "flops  executed"))]
    assert len(lines) > 8 and all(line[-1] == "equal" and line[-2] == line[-3] for line in lines)
    assert "mesh: pipe 2 x row 2 x column 2" in before and "row 1         6         7" in before


def test_a_topology_needs_no_compiler_to_predict_for(capsys, tmp_path, monkeypatch):
    words = ["--model.name", "mlp", "--data.name", "digits", "--model.layers", "2", "--model.width", "16"]
    picture = tmp_path / "roof.png"
    flags = ["--topology", "v5e:2x4", "--predict", "--roofline", str(picture)]
    said = told(["plan", *words, "--plan", "tensor=fsdp:8", *flags], capsys)
    assert "ceilings on v5e:2x4" in said and picture.read_bytes().startswith(b"\x89PNG")
    assert "of its 16.0 GiB" in said and "compiling" not in said
    found = json.loads(told(["plan", *words, "--plan", "tensor=fsdp:8", *flags, "--json"], capsys))
    assert found["topology"] == "v5e:2x4" and found["room"] == 2**34 and found["fits"] is None
    assert found["ceilings"]["bound"] in ("memory", "communication") and found["warnings"] == []

    def full(parts, where):
        raise compiled.DoesNotFit([Problem("topology", where.word, "the step does not fit: Used 17G of 16G.", "")])

    monkeypatch.setattr(compiled, "compile_for", full)
    said = told(["plan", *words, "--plan", "tensor=fsdp:8", "--topology", "v5e:2x4"], capsys)
    assert "It does not fit into the memory of a device." in said and "warning: the step does not fit: Used 17G" in said


def test_a_plan_from_shapes_needs_no_more_data_than_one_example(capsys):
    flags = ["--batch", "65536", "--plan", "data=64,tensor=one_d:4", "--predict", "--json"]
    assert json.loads(told(["plan", *flags], capsys))["memory"]["predicted"]["batch"] == 2 * 4 * 128 * 65536 // 64
    said = told(["plan", *flags[:-2]], capsys)
    assert said.endswith("not compiled: that is done for 64 simulated devices at most, or for a --topology\n")
    auto = told(["plan", "--plan", "data=2,partition=auto", "--predict", "--explain"], capsys)
    assert "memory optimizer" in auto and "flops model" in auto and "activations" not in auto


def test_which_device_holds_what():
    axes = {"a": 2, "b": 3, "c": 2}
    found = layouts.holders(axes, (("b", "a"), (), ("c",)))
    assert found.shape == (6, 1, 2) and found[0, 0, 0] == (0,)
    assert found[3, 0, 1] == (9,), "b is major on the first dim: part 3 is b 1, a 1; device = a 6 + b 2 + c"
    assert layouts.holders(axes, ((), ("c",)))[0, 1] == (1, 3, 5, 7, 9, 11)
    devices = np.asarray(jax.devices()[:8]).reshape(2, 2, 2)
    mesh = jax.sharding.Mesh(devices, ("a", "b", "c"))
    over = (("c", "a"), ("b",), (), ())
    spec = jax.sharding.PartitionSpec(*over)
    map_of = jax.sharding.NamedSharding(mesh, spec).devices_indices_map((8, 4, 3, 2))
    held = layouts.holders(dict(mesh.shape), over)
    for number, device in enumerate(devices.flat):
        rows, columns, *_ = map_of[device]
        assert number in held[rows.start // 2, columns.start // 2, 0, 0]
    shown = layouts.Array("w", ("x", "y", "z"), (8, 6, 4), (("a",), ("b",), ("c",)))
    said = layouts.text(axes, [shown, layouts.Array("v", ("x",), (4,), ((),))])
    assert said.count("y 2:4") == 2 and "x 4:8\n" in said and said.endswith("v: x 4\n  whole on 0-11")


def test_a_forecast_of_a_file(capsys, tmp_path):
    (path := tmp_path / "recipe.json").write_text(PICTURES.to_json())
    found = json.loads(told(["plan", str(path), "--json", "--model.width", "32"], capsys))
    assert found["mesh"] == {"data": 1} and found["bubble"] == 0 and found["pipeline"]["stages"] == 1
    wide = prepare(replace(PICTURES, model=replace(PICTURES.model, width=32)))[0]
    assert found["memory"]["predicted"]["parameters"] == memory.held(wide)["parameters"]
    assert found["comm"] == {"predicted": {}, "compiled": {}}
    assert found["flops"]["model"] == found["flops"]["executed"] == found["flops"]["compiled"] == flops.of_model(wide)
    assert found["memory"]["compiled"]["aliased"] > 3 * memory.held(wide)["parameters"] and not found["warnings"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--topology", ""], "topology = : is no topology"),
        (["--topology", "v5e:2x4"], "topology = v5e:2x4: has 8 devices, and the plan data=1 takes 1"),
        (["--picture", "a.pdf"], "picture = a.pdf: is no name of a picture"),
        (["--roofline", "a.png"], "roofline = a.png: needs devices of a known kind"),
        (["experiments.nothing"], "recipe = experiments.nothing: there is no such module"),
        ([".."], "recipe = ..: there is no such module"),
        (["experiments.tensor_parallel.more"], "there is no such module"),
        (["json.tool"], "recipe = json.tool: this module has no recipe called BASE"),
        (["nothing.json"], "recipe = nothing.json: cannot be read"),
        (["--plan", "pipe=2,schedule=one_f_one", "--model.name", "gpt"], "did you mean `one_f_one_b`"),
        (["experiments.lm", "--plan", "pipe=99,microbatches=4"], "99"),
        (["experiments.lm", "--plan", "data=2", "--devices", "3"], "devices = 3: the plan data=2 needs 2"),
        (["experiments.lm", "--timetabel"], "--timetabel"),
        (["experiments.lm", "--picture", "setup.nothing"], "picture = setup.nothing: is no name of a picture"),
    ],
)
def test_a_forecast_of_wrong_words_is_refused(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(["plan", *words], capsys)


# doctor


def lines(found):
    return {line.text: line.fix for line in found}


def test_the_doctor_finds_this_machine_well_or_says_what_to_do(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "chips", lambda: None)
    code = doctor_command.doctor(["--runs-dir", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok   ", "fix  ")) for line in said[:-1])
    assert code == (1 if any(line.startswith("fix") for line in said) else None)
    text = "\n".join(said)
    for word in ("Python 3.", "jax ", "jaxlib ", "optax ", "orbax-checkpoint ", "of platform cpu", "cores", "GiB"):
        assert word in text
    for word in (
        "compile cache",
        "digits, stdlib_text are here",
        "not yet downloaded: cifar10, cifar100, fashion_mnist, mnist,",
    ):
        assert word in text
    assert said[-1] == "all is well" or "to fix" in said[-1]
    assert jaxpar.doctor() == code
    again = capsys.readouterr().out.splitlines()
    assert [line[:14] for line in again] == [line[:14] for line in said]


def test_the_doctor_exits_1_if_something_is_broken(capsys, monkeypatch):
    line = doctor_command.Line("chip melted", "buy a new one")
    monkeypatch.setattr(doctor_command, "checks", lambda _: [doctor_command.Line("fine"), line])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor"])
    assert stopped.value.code == 1
    assert capsys.readouterr().out.splitlines()[:2] == ["ok   fine", "fix  chip melted: buy a new one"]


def test_missing_and_old_packages_have_their_pip_line():
    found = lines(doctor_command.packages(["optax>=99.1", "nothing-of-this-name>=1", "numpy>=1,<999", "rich<2"]))
    assert found.pop(f"optax {doctor_command._version('optax')} is not >=99.1") == 'pip install "optax>=99.1"'
    assert found.pop("nothing-of-this-name is not installed") == 'pip install "nothing-of-this-name>=1"'
    assert found.pop(f"rich {doctor_command._version('rich')} is not <2") == 'pip install "rich<2"'
    ((text, fix),) = found.items()
    assert "numpy" in text and not fix


@pytest.mark.parametrize(
    "version, bound, want",
    [
        ("0.10.2", ">=0.10", True),
        ("0.9.9", ">=0.10", False),
        ("0.13.0", "<0.13", False),
        ("0.12.1", "<0.13", True),
        ("0.0.42.1", "==0.0.42.*", True),
        ("0.0.21.1", "==0.0.42.*", False),
        ("2.0.0rc1", ">=2", True),
        ("1.2", "!=9", True),
    ],
)
def test_versions_are_compared_as_numbers(version, bound, want):
    assert doctor_command._within(version, bound) == want


JAX = {"jax": "0.10.2", "jaxlib": "0.10.2"}


@pytest.mark.parametrize(
    "versions, chips, fixes",
    [
        (JAX, None, []),
        ({}, None, ['pip install "jax>=0.10,<0.13"']),
        (JAX | {"jaxlib": "0.7.2"}, None, ['pip install "jax==0.10.2" "jaxlib==0.10.2"']),
        (JAX | {"libtpu": "0.0.21.1"}, ("tpu", 1, "tpu"), ['pip install "jax[tpu]==0.10.2"']),
        (JAX | {"libtpu": "0.0.42.1"}, ("tpu", 1, "tpu"), []),
        (JAX, ("tpu", 1, "tpu"), ['pip install "jax[tpu]==0.10.2", then restart Python']),
        (JAX, ("nvidia", 2, "cuda13"), ['pip install "jax[cuda13]==0.10.2", then restart Python']),
        (JAX | {"jax-cuda12-plugin": "0.10.2"}, ("nvidia", 2, "cuda13"), []),
        (JAX | {"jax-cuda12-plugin": "0.9.0"}, ("nvidia", 2, "cuda12"), ['pip install "jax[cuda12]==0.10.2"']),
    ],
)
def test_what_must_be_of_one_version_with_jax(versions, chips, fixes, monkeypatch):
    monkeypatch.setattr(doctor_command, "_version", versions.get)
    monkeypatch.setattr(doctor_command, "_libtpu", lambda: "0.0.42.*")
    monkeypatch.setattr(machine, "chips", lambda: machine.Chips(*chips) if chips else None)
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    assert [line.fix for line in doctor_command.jax_parts() if line.fix] == fixes


def test_an_old_jax_in_memory_asks_for_a_restart(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.7.2")
    assert any("restart Python" in line.fix and "0.7.2 is imported" in line.text for line in doctor_command.jax_parts())


def raising(*_):
    raise RuntimeError("Unable to initialize backend 'tpu': ABORTED: in use\nmore")


def test_a_chip_that_is_held_by_another_names_it(monkeypatch):
    monkeypatch.setattr(jax, "devices", raising)
    monkeypatch.setattr(machine, "holders", lambda: ["4711 (python train.py)"])
    (line,) = doctor_command.devices()
    assert "ABORTED: in use)" in line.text and "\n" not in line.text
    assert line.fix == "end process 4711 (python train.py); or set JAX_PLATFORMS=cpu"


@pytest.mark.parametrize(
    "chosen, word", [("", "although their driver is installed"), ("cpu", "JAX_PLATFORMS=cpu says")]
)
def test_chips_that_jax_does_not_open_are_told(chosen, word, monkeypatch):
    monkeypatch.setattr(machine, "chips", lambda: machine.Chips("nvidia", 2, "cuda13"))
    monkeypatch.setattr(doctor_command, "_version", {"jax-cuda13-plugin": "0.10.2"}.get)
    monkeypatch.setenv("JAX_PLATFORMS", chosen)
    _, line = doctor_command.devices()
    assert "2 nvidia chips" in line.text and word in line.text
    assert line.fix == ("" if chosen else "JAX_PLATFORMS=cuda jaxpar doctor says why")


def test_devices_that_do_not_answer_are_not_waited_for(monkeypatch):
    import threading

    stop = threading.Event()
    monkeypatch.setattr(jax, "devices", lambda: stop.wait(20))
    monkeypatch.setattr(doctor_command, "OPEN_S", 0.1)
    (line,) = doctor_command.devices()
    stop.set()
    assert "no answer in 0.1 s" in line.text and "JAX_PLATFORMS=cpu" in line.fix


def put(root, name, text=""):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_chips_are_found_without_jax(tmp_path):
    assert machine.chips(tmp_path) is None
    put(tmp_path, "dev/nvidia0")
    put(tmp_path, "dev/nvidia1")
    put(tmp_path, "dev/nvidiactl")
    assert machine.chips(tmp_path) is None  # no driver: nothing that jax could use
    for driver, extra in (("570.12", "cuda12"), ("580.65", "cuda13")):
        put(tmp_path, "proc/driver/nvidia/version", f"NVRM version: NVIDIA UNIX Kernel Module  {driver}.06  Tue")
        assert machine.chips(tmp_path) == ("nvidia", 2, extra)
    for number, device in enumerate(("0x0063", "0x0042")):  # a v5e, and a network card of the same maker
        put(tmp_path, f"sys/bus/pci/devices/{number}/vendor", "0x1ae0\n")
        put(tmp_path, f"sys/bus/pci/devices/{number}/device", f"{device}\n")
    assert machine.chips(tmp_path) == ("tpu", 1, "tpu")


def test_holders_of_chips_are_found(tmp_path):
    for pid, target in (
        ("11", "/dev/accel0"),
        ("12", "/dev/null"),
        ("13", "/dev/nvidia0"),
        (os.getpid(), "/dev/accel0"),
    ):
        put(tmp_path, f"proc/{pid}/cmdline", "python\0train.py\0")
        (tmp_path / f"proc/{pid}/fd").mkdir()
        (tmp_path / f"proc/{pid}/fd/3").symlink_to(target)
    assert sorted(machine.holders(tmp_path)) == ["11 (python train.py)", "13 (python train.py)"]


def test_memory_is_that_of_this_process(tmp_path):
    assert machine.memory(tmp_path) is None
    put(tmp_path, "proc/meminfo", "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  600 kB\n")
    assert machine.memory(tmp_path) == (600 * 1024, 1000 * 1024)
    put(tmp_path, "sys/fs/cgroup/memory.max", "max\n")
    put(tmp_path, "sys/fs/cgroup/memory.current", "100000\n")
    assert machine.memory(tmp_path) == (600 * 1024, 1000 * 1024)
    put(tmp_path, "sys/fs/cgroup/memory.max", "300000\n")
    assert machine.memory(tmp_path) == (200_000, 300_000)


def test_little_memory_a_full_disk_and_damaged_data_have_a_fix(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "memory", lambda: (1 << 20, 1 << 34))
    assert doctor_command.host().fix
    monkeypatch.setattr(machine, "room", lambda _: (1 << 20, tmp_path))
    assert "--runs-dir" in doctor_command.disk(tmp_path).fix
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    put(tmp_path, "jaxpar/data/tinyshakespeare.txt", "to be")
    damaged, summary = doctor_command.data()
    assert "truncated: 5 bytes" in damaged.text and damaged.fix.endswith("jaxpar data get tiny_shakespeare")
    assert not summary.fix


# sample

PROMPT, COUNT = "def ", 12


def test_a_folder_writes_what_the_run_in_memory_writes(trained, capsys):
    runs, run = trained
    want = jaxpar.sample(run, PROMPT, count=COUNT, top_k=50, seed=3)
    argv = f"--prompt {PROMPT.strip()} --count {COUNT} --top-k 50 --seed 3 --runs-dir {runs}".split()
    assert told(["sample", "text", *argv], capsys) == jaxpar.sample(run, "def", count=COUNT, top_k=50, seed=3) + "\n"
    assert jaxpar.sample(runs / "text", PROMPT, count=COUNT, top_k=50, seed=3) == want
    assert len(want.encode(errors="replace")) > len(PROMPT)


def test_sampling_needs_no_data_and_keeps_the_precision(trained, monkeypatch):
    runs, run = trained
    stdlib = importlib.import_module("jaxpar.datasets.stdlib_text")
    monkeypatch.setattr(stdlib, "_corpus", lambda _: pytest.fail("the data was read"))
    writer = writing.restored(runs / "text")
    assert writer.trained.settings.policy.cast(jnp.ones(2), "weight").dtype == jnp.bfloat16
    assert len(writer.trained.settings.placement.scheme.axes) == 0 and writer.window == 16
    for got, want in zip(jax.tree.leaves(writer.trained.params), jax.tree.leaves(run.state.params), strict=True):
        assert got.dtype == want.dtype


def test_an_earlier_step_is_another_model(trained):
    runs, _ = trained
    tables = [writing.restored(runs / "text", step).trained.params for step in (2, 4, None)]
    early, late, newest = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in tables)
    assert (early != late).any() and (late == newest).all()


def test_top_1_is_the_likeliest_whatever_the_seed(trained):
    _, run = trained
    texts = {jaxpar.sample(run, PROMPT, count=COUNT, top_k=1, seed=seed, temperature=5) for seed in range(3)}
    assert texts == {jaxpar.sample(run, PROMPT, count=COUNT, temperature=1e-6)}
    assert jaxpar.sample(run, PROMPT, count=COUNT, top_k=256) == jaxpar.sample(run, PROMPT, count=COUNT)


def test_top_k_leaves_exactly_k_of_equal_logits():
    got = _likeliest(jnp.array([1.0, 3.0, 2.0, 3.0, 3.0]), 2)
    assert got.tolist() == [-jnp.inf, 3.0, -jnp.inf, 3.0, -jnp.inf]


@pytest.mark.parametrize(
    "words, message",
    [
        ("txt", "run = txt: there is no run of this name"),
        ("txt", "did you mean `text`"),
        ("../runs", "no folder of this path"),
        ("pictures", "not of bytes of text"),
        ("empty", "has no checkpoint yet"),
        ("text --step 3", "step = 3: {runs}/text has no checkpoint of this step. Legal: 2, 4."),
        ("text --temperature 0", "temperature = 0.0"),
        ("text --temperature nan", "temperature = nan"),
        ("text --top-k 0", "top_k = 0"),
        ("text --count 0 --seed -1", "2 problems"),
        ("text --prompt=", "prompt = ''"),
        ("broken", "no text of JSON"),
    ],
)
def test_sample_refuses_what_it_cannot_do(words, message, runs, capsys):
    shutil.copytree(runs / "text", runs / "empty", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(runs / "text", runs / "broken")
    (runs / "broken" / "recipe.json").write_text("{")
    said = refused(["sample", *words.split(), "--runs-dir", str(runs)], capsys)
    if message == "no text of JSON":
        assert "recipe.json" in said
    else:
        assert message.format(runs=runs) in said


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(runs, capsys, trained):
    largest = max((runs / "text" / "checkpoints" / "4").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"x" + largest.read_bytes()[1:])
    want = jaxpar.sample(writing.restored(runs / "text", 2), PROMPT, count=8)
    cli.main(["sample", str(runs / "text"), "--prompt", PROMPT, "--count", "8"])
    said = capsys.readouterr()
    assert said.out == want + "\n" and "checkpoint of step 4 is damaged" in said.err
    assert "step = 4" in refused(["sample", str(runs / "text"), "--step", "4"], capsys)


# runs


def test_runs_are_listed_with_broken_ones_and_their_status(runs, capsys):
    shutil.copytree(runs / "text", runs / "stopped")
    (runs / "stopped" / "summary.json").unlink()
    kept = (runs / "stopped" / "metrics.jsonl").read_text().splitlines()[:2]
    (runs / "stopped" / "metrics.jsonl").write_text(
        "\n".join([*kept, '{"step": 3, "lo', "[]", "null", '{"step": "x"}'])
    )
    (runs / "no_run").mkdir()
    put(runs, "broken/recipe.json", "[1]")
    put(runs, "bytes/recipe.json")
    (runs / "bytes" / "recipe.json").write_bytes(b"\xff")
    put(runs, "file", "x")
    with lock.locked(runs / "pictures", print):
        said = told(["runs", "--runs-dir", str(runs)], capsys)
    rows = {line.split()[0]: line.split() for line in said.splitlines() if line}
    assert rows["run"][:2] == ["run", "status"]
    assert rows["text"][1] == "done" and {"gpt", "stdlib_text", "4/4"} <= {*rows["text"]}
    assert rows["text"][5] == "data=2,tensor=one_d:2,precision=bf16"
    assert rows["stopped"][1] == "interrupted" and rows["pictures"][1] == "running"
    last = [json.loads(line) for line in kept][-1]
    assert f"{last['step']}/4" in rows["stopped"]
    for name in ("no_run:", "broken:", "bytes:"):
        assert name in rows
    assert "file" not in said.replace("No such file", "") and len(said.splitlines()) == 7
    assert not (runs / "compare.png").exists()


def test_no_runs_are_no_error(tmp_path, capsys):
    assert "jaxpar train" in told(["runs", "--runs-dir", str(tmp_path / "none")], capsys)


def test_runs_are_compared(runs, capsys, monkeypatch):
    other = json.loads((runs / "text" / "recipe.json").read_text()) | {"seed": 7, "plan": "data=4"}
    shutil.copytree(runs / "text", runs / "other")
    (runs / "other" / "recipe.json").write_text(json.dumps(other))
    said = told(["runs", "text", "other", "--runs-dir", str(runs)], capsys)
    table = said.partition("field")[2].splitlines()
    assert [line.split() for line in table[1:3]] == [["plan", str(TEXT.plan), "data=4"], ["seed", "0", "7"]]
    assert table[3] == "" and table[4] == f"picture: {runs / 'compare.png'}"
    assert (runs / "compare.png").read_bytes().startswith(b"\x89PNG")
    shutil.copytree(runs / "text", runs / "same")
    said = told(["runs", "text", "same", "--runs-dir", str(runs), "--png", str(runs / "new" / "a.png")], capsys)
    assert "all fields of their recipes are equal" in said and (runs / "new" / "a.png").is_file()


def test_who_was_first_at_a_loss(runs, capsys):
    said = told(["runs", "text", "--runs-dir", str(runs), "--loss", "9"], capsys)
    assert (
        "seconds to it" in said
        and f"picture: {runs / 'efficiency.png'}" in said
        and (runs / "efficiency.png").is_file()
    )
    assert "never" in told(["runs", "text", "--runs-dir", str(runs), "--loss", "0.01"], capsys)


def test_a_comparison_that_cannot_be_made_is_refused(runs, capsys):
    assert "did you mean `text`" in refused(["runs", "text", "txt", "--runs-dir", str(runs)], capsys)
    put(runs, "file")
    said = refused(["runs", "text", "--runs-dir", str(runs), "--png", str(runs / "file" / "a.png")], capsys)
    assert "png = " in said and "cannot be written" in said
    said = refused(["runs", "text", "--runs-dir", str(runs), "--png", str(runs / "a.nothing")], capsys)
    assert "png = " in said


# data

CONTENT = b"to be or not to be"


@pytest.fixture
def shakespeare(monkeypatch, tmp_path):
    """The dataset tiny_shakespeare with a small file, an empty cache, and `answer`, what the network says."""
    import hashlib
    import io

    module = importlib.import_module("jaxpar.datasets.tiny_shakespeare")
    checksum = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    monkeypatch.setattr(module, "FILES", (module.FILES[0]._replace(size=len(CONTENT), checksum=checksum),))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXPAR_OFFLINE", raising=False)
    calls = []

    class Opener:
        def open(self, url, timeout):
            calls.append(url)
            return io.BytesIO(CONTENT)

    monkeypatch.setattr(files, "https_opener", Opener)
    return calls


def test_data_is_listed_fetched_and_verified(shakespeare, capsys, tmp_path):
    def here():
        return re.search(r"tiny_shakespeare .*sha256:\w+\.\.\. +(yes|no) +https://", told(["data", "list"], capsys))[1]

    said = told(["data"], capsys)
    assert "digits" in said and "downloads are on" in said and here() == "no"
    assert "downloaded and verified" in told(["data", "get", "tiny_shakespeare", "digits"], capsys) and here() == "yes"
    assert "was there and verified" in told(["data", "get", "tiny_shakespeare"], capsys) and len(shakespeare) == 1
    assert "ok, sha256:" in told(["data", "verify"], capsys)
    path = files.cache_folder() / "tinyshakespeare.txt"
    assert path.read_bytes() == CONTENT
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "verify"])
    assert stopped.value.code == 1 and "altered" in capsys.readouterr().out
    assert "altered" in refused(["data", "get", "tiny_shakespeare"], capsys) and len(shakespeare) == 1


def test_data_may_lie_in_a_folder_of_the_user(shakespeare, capsys, tmp_path):
    told(["data", "get", "tiny_shakespeare", "--data-dir", str(tmp_path / "mine")], capsys)
    assert (tmp_path / "mine" / "tinyshakespeare.txt").read_bytes() == CONTENT and not files.cache_folder().exists()
    assert "ok" in told(["data", "verify", "tiny_shakespeare", "--data-dir", str(tmp_path / "mine")], capsys)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "verify", "tiny_shakespeare"])
    assert stopped.value.code == 1 and "missing" in capsys.readouterr().out
    assert "missing" in told(["data", "verify"], capsys)  # not asked for by name: no failure


@pytest.mark.parametrize(
    "words, message",
    [
        ("get", "must be named"),
        ("get tiny_shakespear", "did you mean `tiny_shakespeare`"),
        ("verify digist", "did you mean `digits`"),
        ("fetch digits", "fetch"),
        ("list --data-dir nowhere", "there is no such folder"),
        ("get ../core/files", "there is no such dataset"),
    ],
)
def test_data_refuses_what_it_cannot_do(words, message, shakespeare, capsys):
    assert message in refused(["data", *words.split()], capsys) and not shakespeare


def test_data_offline_asks_nobody(shakespeare, capsys, monkeypatch):
    monkeypatch.setenv("JAXPAR_OFFLINE", "1")
    assert "JAXPAR_OFFLINE" in refused(["data", "get", "tiny_shakespeare"], capsys) and not shakespeare
    assert "downloads are off" in told(["data", "list"], capsys)


def test_every_dataset_declares_files_or_needs_none():
    declared = {name: data_command.declared(name) for name in family.names("datasets")}
    assert len(declared["tiny_shakespeare"]) == 1 and declared["digits"] == declared["stdlib_text"] == ()
    assert {name: len(declared[name]) for name in ("cifar10", "cifar100", "mnist", "fashion_mnist")} == {
        "cifar10": 1,
        "cifar100": 1,
        "mnist": 4,
        "fashion_mnist": 4,
    }


# train recipe.json


def test_a_recipe_in_a_file_is_trained_and_flags_change_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "mine.json", PICTURES.to_json())
    told(["train", "mine.json", "--seed", "5"], capsys)
    there = Recipe.from_json((tmp_path / "runs" / "mine" / "recipe.json").read_text())
    assert there.seed == 5 and there.model == PICTURES.model
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    said = told(["train", "elsewhere/mine/recipe.json"], capsys)  # of a run: it is resumed where it is
    assert "everything is in elsewhere/mine" in said and not (tmp_path / "runs").exists()
    monkeypatch.chdir(tmp_path / "elsewhere" / "mine")
    assert "everything is in ../mine" in told(["train", "recipe.json"], capsys)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "cannot be read: No such file"),
        ("{", "recipe"),
        ("[]", "recipe"),
        ('{"stepz": 3}', "did you mean `steps`"),
        ('{"steps": 3, "steps": 4}', "steps"),
        ('{"steps": "many"}', "steps"),
        ('{"model": {"widht": 3}}', "did you mean `width`"),
        (b"\xff\xfe", "is no text"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(content, words, tmp_path, capsys):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused(["train", str(path)], capsys)
    assert words in said and "a.json" in said


# A user's own parts

OWN = """
import jax.numpy as jnp
import numpy as np
from jaxpar.core.parts import function
from jaxpar.core.scheme import Scheme
from jaxpar.datasets.digits import digits
from jaxpar.models.mlp import mlp
from jaxpar.norms.layer import layer


def mlp2(example, vocab, layers=2, width=8):
    return mlp(example=example, vocab=vocab, layers=layers, width=width)

def few(batch, seed=0):
    return digits(batch=batch, seed=seed)

def gain(width, dims="embed"):
    return layer(width, dims)

def mine(rows, columns):
    whole = (("a",), ("b",))
    return Scheme(axes={"a": rows, "b": columns}, outer=whole, inner=whole, up=whole, down=whole)

def needy(example, vocab, flavour):
    return None

def nothing(example, vocab):
    return None

def lazy(width, dims="embed"):
    return 3

def tight(width):
    return layer(width)

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "my.py", OWN)


FLAGS = "--model.name mlp --data.name digits --model.width 8 --batch 8 --steps 1 --evaluate-batches 1"


@pytest.mark.parametrize(
    "flags",
    [
        "--model.name my.py:mlp2 --data.name my.py:few --plan tensor=my.py:mine:2x2",
        "--model.name convnet --model.norm my.py:gain",
        "--model.name ./my.py:mlp2 --plan data=2",
    ],
)
def test_a_users_own_parts_train(flags, own, capsys, tmp_path):
    assert "training loss" in told(["train", *FLAGS.split(), *flags.split()], capsys)
    assert "my.py:" in (tmp_path / "runs" / "train" / "recipe.json").read_text()


@pytest.mark.parametrize(
    "change, flags, words",
    [
        ("def broken(:\n", "--model.name my.py:mlp2", ["model.name = my.py:mlp2", "my.py:{line}: SyntaxError"]),
        ("1 / 0\n", "--data.name my.py:few", ["data.name", "my.py:{line}: ZeroDivisionError: division by zero"]),
        ("import nothing_of_this_name\n", "--model.name my.py:mlp2", ["my.py:{line}: ModuleNotFoundError"]),
        ("raise SystemExit(3)\n", "--model.name my.py:mlp2", ["my.py:{line}: SystemExit: 3"]),
        ("", "--model.name my.py:mlp3", ["my.py defines no `mlp3`", "did you mean `mlp2`"]),
        ("", "--model.name my.py:number", ["`number` in my.py is of type int", "a function"]),
        (
            "",
            "--model.name my.py:needy",
            ["my.py:{line_of_needy}: `needy` cannot be called: missing a required argument: 'flavour'"],
        ),
        (
            "",
            "--model.name my.py:nothing",
            ["my.py:{line_of_nothing}: `nothing` returned a value of type NoneType", "return Layer"],
        ),
        ("", "--model.name your.py:mlp2", ["there is no file your.py"]),
        ("", "--plan tensor=my.py:mine:2", ["mine needs 2 sizes", "mine:rowsxcolumns"]),
        ("", "--plan tensor=my.py:other:2x2", ["my.py defines no `other`"]),
        ("", "--model.name convnet --model.norm my.py:number", ["model.norm", "`number` in my.py is of type int"]),
        ("", "--model.name convnet --model.norm my.py:tight", ["`tight` cannot be called: too many positional"]),
        ("", "--model.name convnet --model.norm my.py:lazy", ["`lazy` returned a value of type int"]),
    ],
)
def test_a_mistake_in_a_users_file_is_one_message(change, flags, words, own, capsys, tmp_path):
    put(tmp_path, "my.py", OWN + change)
    said = refused(["train", *FLAGS.split(), *flags.split()], capsys)
    at = {f"line_of_{name}": OWN[: OWN.index(f"def {name}")].count("\n") + 1 for name in ("needy", "nothing")}
    for word in words:
        assert word.format(line=OWN.count("\n") + 1, **at) in said, said
    assert not (tmp_path / "runs").exists()


def test_a_users_file_is_run_once_per_version(own, tmp_path, capsys):
    put(tmp_path, "my.py", OWN + "print('hello')\n")
    first = family.pick("models", "my.py:mlp2")
    assert inspected(first) == ["example", "vocab", "layers", "width"]
    family.pick("datasets", "my.py:few")
    assert capsys.readouterr().out == "hello\n"
    os.utime(tmp_path / "my.py", (1, 1))
    family.pick("models", "my.py:mlp2")
    assert capsys.readouterr().out == "hello\n"


def inspected(member):
    return family.parameters(member)


def test_a_run_of_a_users_model_is_refused_where_the_file_is_gone(own, tmp_path, capsys):
    told(["train", *FLAGS.split(), "--model.name", "my.py:mlp2"], capsys)
    (tmp_path / "my.py").unlink()
    assert "there is no file my.py" in refused(["train", "runs/train/recipe.json"], capsys)


def test_commands_that_need_no_jax_do_not_import_it(runs):
    code = f"""
import sys
from jaxpar import cli
cli.main(["runs", "--runs-dir", {str(runs)!r}])
cli.main(["data", "list"])
cli.main(["list", "commands"])
sys.exit(" ".join({{"jax", "matplotlib"}} & set(sys.modules)) or 0)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert record.find("text", str(runs)) == runs / "text" and folder.RECIPE == "recipe.json"
    with pytest.raises(Refused):
        record.find("", str(runs))
