"""Notebooks run from top to bottom, show what their sources say, and install what the machine needs."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from notebooks import cells

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "colab").glob("*.py"))
QUICK = {
    "steps=300": "steps=12",
    "steps=30,": "steps=3,",
    "(1, 10, 20, 30)": "(1, 2, 3)",
    "count=300": "count=20",
    "layers=2, width=64": "layers=1, width=32",
}

# IPython is not needed to run a notebook's cells one after the other; what it would show is written down instead.
STAND_IN = """
import sys, types
shown = []
display, ipython = types.ModuleType("IPython.display"), types.ModuleType("IPython")
display.Image = lambda data, **_: shown.append(data)
ipython.display, ipython.version_info = display, (9, 0)
sys.modules |= {"IPython": ipython, "IPython.display": display}
"""


def executed(source, tmp_path, changes):
    """Stdout of a fresh Python that runs the code of all cells."""
    text = "\n".join(cell.text for cell in cells(source) if cell.kind == "code")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / source.name
    path.write_text(f"{STAND_IN}\n{text}\nprint('PNG', all(data[:4] == b'\\x89PNG' for data in shown), len(shown))\n")
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "JAX_PLATFORMS": "cpu", "JAXPAR_OFFLINE": "1"}
    found = subprocess.run([sys.executable, path], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == [source.name], "a notebook leaves nothing behind"
    return found.stdout


def quickstart(said, tolerance):
    assert said.startswith("No restart is needed.\nok   Python") and said.endswith("PNG True 1\n")
    assert "def " in said and "column        all_gather" in said and "warning:" not in said
    assert float(re.search(r"largest difference in \d+ steps: (\S+) nats", said)[1]) < tolerance
    assert "problems, nothing was started" in said


def test_the_quickstart_runs_with_few_steps(tmp_path):
    quickstart(executed(ROOT / "colab" / "quickstart.py", tmp_path, QUICK), 1e-5)


@pytest.mark.slow
def test_the_quickstart_runs_as_it_stands_within_three_minutes(tmp_path):
    quickstart(executed(ROOT / "colab" / "quickstart.py", tmp_path, {}), 1e-3)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_notebook_is_its_source_executed_in_order(source):
    """Else: make notebooks."""
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]] == cells(source)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    told = "".join("".join(output.get("text", [])) for output in outputs)
    assert not re.search(r"(?<![\w.~/])/\w+/", told), "a path of the machine that ran it"
    assert not re.search(r"https?://|127\.0\.0\.1", told) and len(text) < 500_000


# The first cell, on machines that are not this one.


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(files, **versions)`: what the first cell of the quickstart runs and says there."""
    source = next(cell.text for cell in cells(ROOT / "colab" / "quickstart.py") if cell.kind == "code")
    for name in ("/sys/", "/proc/"):
        assert f'"{name}' in source
        source = source.replace(f'"{name}', f'"{tmp_path}{name}')
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    calls = []

    def run(files, installed=False):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if installed else None)
        monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append((command, check)))
        exec(compile(source, "first cell", "exec"), {})
        return calls

    return run


NETWORK_CARD = {"sys/bus/pci/devices/0/vendor": "0x1ae0\n", "sys/bus/pci/devices/0/device": "0x0042\n"}
TPU = NETWORK_CARD | {"sys/bus/pci/devices/1/vendor": "0x1ae0\n", "sys/bus/pci/devices/1/device": "0x0063\n"}
FOREIGN = {"sys/bus/pci/devices/2/vendor": "0x8086\n", "sys/bus/pci/devices/2/device": "0x0063\n"}
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}.82.07  Wed\n"


@pytest.mark.parametrize(
    "files, wanted",
    [
        ({}, ["jaxpar"]),
        (NETWORK_CARD | FOREIGN, ["jaxpar"]),
        (TPU, ["jaxpar[tpu]"]),
        ({"proc/driver/nvidia/version": DRIVER.format(550)}, ["jaxpar[cuda12]"]),
        ({"proc/driver/nvidia/version": DRIVER.format(580)}, ["jaxpar[cuda13]"]),
        (TPU | {"src/jaxpar/cli.py": ""}, ["--editable", "..[tpu]"]),
        ({"src/jaxpar/cli.py": ""}, ["--editable", ".."]),
    ],
)
def test_the_first_cell_installs_what_the_chip_needs(files, wanted, machine, capsys):
    ((command, check),) = machine(files)
    assert command == [sys.executable, "-m", "pip", "install", "--quiet", *wanted] and check
    assert capsys.readouterr().out == "No restart is needed.\n"


def test_the_first_cell_installs_nothing_twice(machine, capsys):
    assert machine(TPU, installed=True) == []


def test_the_first_cell_says_when_to_restart(machine, capsys, monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99" if name in ("jax", "numpy") else version(name))
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(__version__="0.7.2"))  # Colab's own, already imported
    monkeypatch.setitem(sys.modules, "numpy", SimpleNamespace(__version__="2.0.2"))
    machine({})
    assert capsys.readouterr().out == "Restart now (Runtime > Restart session): jax, numpy changed.\n"


def test_the_extras_that_the_first_cell_asks_for_are_there():
    text = (ROOT / "pyproject.toml").read_text()
    for extra in ("tpu", "cuda12", "cuda13"):
        assert f'{extra} = ["jax[{extra}]"]' in text
