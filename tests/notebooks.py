"""Notebooks and their sources: `python tests/notebooks.py colab/NAME.py` runs one by a real kernel, outputs kept.

A source is Python in cells, each begun by a line `# %%`, or by `# %% [markdown]` for text in comments.
"""

import sys
from pathlib import Path
from typing import NamedTuple


class Cell(NamedTuple):
    """`kind` is `code` or `markdown`; `text` is what a notebook shows of it."""

    kind: str
    text: str


def cells(path: Path) -> list[Cell]:
    """The cells of a source."""
    found: list[tuple[str, list[str]]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# %%"):
            found.append(("markdown" if "[markdown]" in line else "code", []))
        elif found:
            kind, lines = found[-1]
            lines.append(line.removeprefix("#").removeprefix(" ") if kind == "markdown" else line)
    return [Cell(kind, "\n".join(lines).strip()) for kind, lines in found]


def run(source: Path) -> None:
    """Write the notebook beside its source, with outputs but without times and places of this machine."""
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(source)
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    client = NotebookClient(notebook, timeout=600, coalesce_streams=True, record_timing=False)
    client.execute(cwd=str(source.parent))
    notebook.metadata.pop("language_info", None)
    jupytext.write(notebook, source.with_suffix(".ipynb"))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(Path(name))
