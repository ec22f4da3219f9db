"""The README says what happens: its Python runs, and prints what stands below it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
SLOW = pytest.mark.slow  # three runs


@pytest.mark.parametrize("code, prints", [pytest.param(*BLOCKS[0], marks=SLOW), *BLOCKS[1:]], ids=["runs", "own loss"])
def test_python_of_the_readme_prints_what_it_says(code, prints, tmp_path):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{code}"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr
    assert told.stdout == prints
