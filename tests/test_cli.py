"""The command line: flags become the recipe, bad input is one message and code 2, and Ctrl-C loses nothing."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import pytest

import jaxpar
from jaxpar import cli
from jaxpar.core import family
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Model, Recipe
from jaxpar.train import cache
from jaxpar.train.fit import fit
from jaxpar.train.progress import quiet
from jaxpar.train.stop import Interrupted, NonFinite

ROOT = Path(__file__).parent.parent
SMALL = ["--model.name", "mlp", "--model.layers", "1", "--model.width", "16", "--data.name", "digits", "--batch", "8"]


def python(*words, env=None):
    """A fresh Python that has jaxpar, and `env` over the environment of the tests."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")} | (env or {})
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=300)


def refused(argv, capsys):
    """What stderr says about bad flags."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    told = capsys.readouterr()
    assert stopped.value.code == 2 and not told.out
    assert "Traceback" not in told.err
    return told.err


@pytest.mark.parametrize(
    "code",
    [
        "from jaxpar import Recipe, Plan, Model, Data, Refused, Layer, State, Scheme, family; Recipe()",
        "from jaxpar import cli, Recipe; cli.parse(Recipe(), cli.main, 'a', ['--steps', '3', '--plan', 'data=2'])",
        "from jaxpar import cli; cli.main(['list']); cli.main([]); cli.main(['runs']); cli.main(['data'])",
        "from jaxpar import cli, Recipe\ntry: cli.main(['train', '--help'])\nexcept SystemExit: pass",
        "from jaxpar import cli, Recipe\ntry: cli.main(['train', '--stepz', '3'])\nexcept SystemExit: pass",
    ],
    ids=["recipes", "flags", "list", "help", "misspelt"],
)
def test_jax_is_not_imported_before_it_is_needed(code):
    found = python("-c", f"{code}\nimport sys\nprint('jax' in sys.modules, 'numpy.random' in sys.modules)")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1].startswith("False")


def test_every_public_name_is_there():
    values = {name: getattr(jaxpar, name) for name in jaxpar.__all__}
    assert {name for name, value in values.items() if isinstance(value, ModuleType)} == {"family"}
    assert set(jaxpar.__all__) <= set(dir(jaxpar))
    with pytest.raises(AttributeError, match=r"'fitt'.* fit,"):
        _ = jaxpar.fitt


def test_flags_are_the_fields_of_the_recipe():
    argv = (
        "--plan tensor=two_d:2x2,zero=1 --model.width 256 --model.bias False --learning-rate 1e-4 --name a --overwrite"
    )
    options = cli.parse(Recipe(model=Model(layers=3)), cli.main, "train", argv.split())
    assert options.recipe == Recipe(
        model=Model(layers=3, width=256, bias=False), plan=Plan(tensor="two_d:2x2", zero=1), learning_rate=1e-4
    )
    assert (options.name, options.overwrite, options.devices) == ("a", True, None)
    assert cli.parse(Recipe(), cli.main, "train", []).recipe == Recipe()


def test_help_shows_every_flag_once_and_at_most_forty(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    flags = re.findall(r"^[│ ]*(?:-h, )?(--[a-z][\w.-]*)", capsys.readouterr().out, re.MULTILINE)
    assert stopped.value.code == 0 and len(flags) == len(set(flags)) <= 40
    asked = "plan name steps seed devices runs-dir data-dir overwrite batch learning-rate model.width data.name"
    assert {f"--{name}" for name in asked.split()} <= set(flags)


def test_an_experiment_gets_its_recipe_and_fit(tmp_path):
    """Train a model."""
    seen = []

    def main(recipe, fit):
        seen.append((recipe, fit))

    cli.runner(Recipe(), main, argv=["--steps", "3", "--plan", "data=2", "--devices", "2", "--runs-dir", str(tmp_path)])
    ((recipe, bound),) = seen
    assert recipe == Recipe(steps=3, plan=Plan(data=2)) and bound.func is fit
    wanted = {"name": "test_cli", "runs_dir": str(tmp_path), "data_dir": None, "overwrite": False, "watchdog": None}
    assert bound.keywords == wanted


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--model.widht 3", "--model.width"),
        ("--batch many", "--batch"),
        ("--steps", "--steps"),
        ("--plan date=2", "did you mean"),
        ("--plan tensor=two_dee:2x2", "did you mean `two_d`"),
        ("--plan data=2 --devices 3", "devices = 3: the plan data=2 needs 2"),
        ("--model.name gtp --data.name digist --batch 0", "3 problems"),
        ("--model.heads 3 --model.width 64", "model.width = 64: must be a multiple of model.heads = 3"),
        ("--name a/b", "name = 'a/b'"),
        ("--data.name tiny_shakespeare --data-dir nowhere", "nowhere is not a folder"),
    ],
)
def test_bad_input_is_one_message_and_code_2(flags, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("something was compiled"))
    message = " ".join(re.sub("[│╭╮╰╯─]", " ", refused(["train", *flags.split()], capsys)).split())
    assert told in message
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_fresh_process_says_it_once():
    found = python("-m", "jaxpar", "train", *SMALL, "--plan", "tensor=two_d:3x3", "--warmup", "500")
    assert found.returncode == 2 and not found.stdout
    assert found.stderr.count("problems, nothing was started") == 1 and "Traceback" not in found.stderr
    assert "warmup = 500" in found.stderr and "model.width = 16: must split into" in found.stderr


def test_jax_that_has_too_few_devices_says_what_to_do():
    code = "import jax; jax.devices(); from jaxpar import Recipe, Plan, fit; fit(Recipe(plan=Plan(data=2)))"
    found = python("-c", code, env={"XLA_FLAGS": ""})
    assert "needs 2 devices, but jax has already made 1" in found.stderr and "restart Python" in found.stderr


def test_unknown_commands_and_families(capsys):
    assert "did you mean `train`" in refused(["trian"], capsys)
    assert "did you mean `schemes`" in refused(["list", "scheme"], capsys)


def test_list_names_every_member(capsys):
    cli.main(["list"])
    told = capsys.readouterr().out
    for name in ("models", "datasets", "schemes", "policies", "norms", "optimizers", "reducers"):
        assert re.search(f"^{name}: .", told, re.MULTILINE)
        for member in family.names(name):
            assert re.search(rf"^  {member}\s+\S", told, re.MULTILINE), f"{name}/{member}.py does not say what it is"
    cli.main(["list", "norms"])
    assert "layer" in (told := capsys.readouterr().out) and "gpt" not in told


def test_the_overview_names_every_command_in_a_few_lines(capsys):
    cli.main([])
    told = capsys.readouterr().out
    assert len(told.splitlines()) <= 12 and max(map(len, told.splitlines())) <= 110
    for name in family.names("commands"):
        assert re.search(rf"^  python -m jaxpar {name} +[A-Z].*\.", told, re.MULTILINE), name


@pytest.mark.parametrize(
    "error, code", [(Interrupted("saved"), 77), (NonFinite("step 3"), 78), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(error, code, capsys):
    with pytest.raises(SystemExit) as stopped, cli.exit_codes():
        raise error
    assert stopped.value.code == code and capsys.readouterr().err.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    for error in (ValueError("of a caller's own code"), TypeError("a bug")):
        with pytest.raises(type(error)), cli.exit_codes():
            raise error


def test_ctrl_c_exits_77_and_the_same_command_goes_on(tmp_path):
    where = ["--steps", "800", "--optimizer", "sgd", "--runs-dir", str(tmp_path)]
    command = [sys.executable, "-m", "jaxpar", "train", *SMALL, *where]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    running = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        told = next(line for line in running.stderr if line.startswith("step 1/800"))
        running.send_signal(signal.SIGINT)
        rest = running.communicate(timeout=120)[1]
    finally:
        running.kill()
    assert running.returncode == 77, told + rest
    assert "SIGINT: finishing the step and saving" in rest and "Traceback" not in rest
    (step,) = re.findall(r"stopped after step (\d+) of 800", rest)
    recipe = Recipe.from_json((tmp_path / "train" / "recipe.json").read_text())
    notes = []
    done = fit(recipe, name="train", runs_dir=str(tmp_path), report=quiet()._replace(note=notes.append))
    assert notes[0].endswith(f"{step} of 800 steps") and len(done.losses) == 800


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """No cache is chosen yet; `use_cache` would take one in `tmp_path`."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "jaxpar" / "xla"
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def test_the_compile_cache_is_private(no_cache):
    no_cache.mkdir(parents=True, mode=0o777)
    (no_cache / "old").touch()
    os.utime(no_cache / "old", (0, 0))
    assert cache.use_cache() == ""
    assert jax.config.jax_compilation_cache_dir == str(no_cache)
    assert no_cache.stat().st_mode & 0o777 == 0o700 and not list(no_cache.iterdir())


def test_without_a_cache_there_is_one_warning(no_cache):
    no_cache.parent.mkdir()
    no_cache.touch()
    warning = cache.use_cache()
    assert warning.startswith(f"no compile cache in {no_cache}") and "\n" not in warning
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_of_the_caller_stays(no_cache, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert cache.use_cache() == "" and not no_cache.exists()


@pytest.mark.parametrize("count", [1, 2])
def test_programs_over_several_cpu_devices_are_in_no_cache(count, tmp_path):
    """Not in one of the caller's either, and not when it has been in use: see tests/xla_cache.py."""
    code = (
        "import sys, jax, jaxpar; from jaxpar.plan.mesh import mesh_of; from jax.sharding import *\n"
        "made = lambda name: len([*__import__('pathlib').Path(sys.argv[2]).glob(f'jit_{name}*')])\n"
        "def early(x): return x + 1\n"
        "def late(x): return x + 2\n"
        "jax.jit(early)(1.0); mesh = mesh_of({'data': int(sys.argv[1])})\n"
        "jax.jit(late, out_shardings=NamedSharding(mesh, PartitionSpec()))(1.0); print(made('early'), made('late'))"
    )
    env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    found = python("-c", code, str(count), str(tmp_path), env=env)
    assert found.stdout == f"1 {int(count == 1)}\n", found.stderr


def test_preparing_a_recipe_makes_no_devices():
    """They are made once, and a plan that comes later may need more."""
    code = (
        "from jaxpar import Data, Model, Plan, Recipe, prepare, simulate; from jaxpar.report import flops\n"
        "parts, _ = prepare(Recipe(Model('mlp', dropout=0.1), Data('digits'))); flops.of_model(parts)\n"
        "simulate(8); import jax; print(jax.device_count())"
    )
    found = python("-c", code, env={"XLA_FLAGS": ""})
    assert found.stdout == "8\n", found.stderr
