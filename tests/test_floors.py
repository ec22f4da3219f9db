"""The shape of the code, read and not run: who may import whom, and the limits that keep every file easy to read."""

import ast
import functools
import graphlib
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# The tree of docs/design.md. A file imports only from lower floors; a mechanism also from its own folder.
FAMILIES = {
    "policies": 1,
    "norms": 1,
    "schemes": 1,
    "schedules": 1,
    "reducers": 1,
    "loss_scales": 1,
    "masks": 1,
    "optimizers": 1,
    "datasets": 1,
    "layers": 2,
    "models": 3,
    "sinks": 1,
    "commands": 8,
}
MECHANISMS = {"core": 0, "plan": 2, "step": 4, "report": 5, "train": 6}
FLOORS = FAMILIES | MECHANISMS
TOP_FILES = ("__init__.py", "__main__.py", "cli.py")
TOP = 7  # of those files; the commands stand above cli.py, which finds them by name
LOADER = "core/family.py"  # the one file below the top that imports by name: a folder is a registry

LONGEST_FILE = 300
LONGEST_FUNCTION = 60
MOST_PARAMETERS = 8

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "jaxpar"
SOURCES = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]
EXPERIMENTS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "experiments").rglob("*.py"))]

each_source = pytest.mark.parametrize("source", SOURCES)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def nodes(source: str) -> Iterator[ast.AST]:
    return ast.walk(tree_of(PACKAGE / source))


def functions(source: str) -> list[Function]:
    return [node for node in nodes(source) if isinstance(node, Function)]


def imports(node: ast.AST, package: str = "jaxpar") -> list[tuple[int, str]]:
    """Line and full dotted name of everything that is imported anywhere under `node`, a part of `package`."""
    found = []
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            found += [(part.lineno, alias.name) for alias in part.names]
        if isinstance(part, ast.ImportFrom):
            module = importlib.util.resolve_name("." * part.level + (part.module or ""), package)
            found += [(part.lineno, f"{module}.{alias.name}") for alias in part.names]
    return found


def imports_of(source: str) -> list[tuple[int, str]]:
    package = ".".join(["jaxpar", *Path(source).parent.parts])
    return imports(tree_of(PACKAGE / source), package)


def folder_of(source: str) -> str:
    """The folder that decides the floor of a file; empty for the files of the top floor."""
    return source.split("/")[0] if "/" in source else ""


def imported_folder(name: str) -> str:
    """The folder of `jaxpar.norms.rms`; empty for `jaxpar` itself and what it re-exports."""
    return next((part for part in name.split(".")[1:2] if part in FLOORS), "")


def called(node: ast.AST) -> str:
    """The last word of what a call calls: `load` for `numpy.load(...)`."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def refuse(source: str, wrong: list[tuple[int, str]], advice: str) -> None:
    """Fail with one line for each wrong place, and what to do about it."""
    if wrong:
        lines = [f"src/jaxpar/{source}:{line}: {what}" for line, what in sorted(set(wrong))]
        pytest.fail("\n".join([advice, *lines]), pytrace=False)


def test_every_folder_has_a_floor():
    for source in SOURCES:
        folder = folder_of(source)
        assert folder or source in TOP_FILES, (
            f"src/jaxpar/{source} is on no floor: the top holds only {', '.join(TOP_FILES)}. Move it into a folder."
        )
        assert not folder or folder in FLOORS, (
            f"src/jaxpar/{folder}/ has no floor. Add it to FAMILIES (plural: files that never import each other) or to "
            "MECHANISMS (singular) in tests/test_floors.py, and to the tree in docs/design.md, one floor above the "
            "highest that it imports."
        )


@each_source
def test_imports_go_down(source):
    own = folder_of(source)
    floor = FLOORS.get(own, TOP)
    wrong = []
    for line, name in imports_of(source):
        if name.split(".")[0] != "jaxpar":
            continue
        other = imported_folder(name)
        above = FLOORS.get(other, TOP)
        allowed = above < floor or (other == own and own not in FAMILIES)
        if not allowed:
            wrong.append((line, f"imports {name}, which is on floor {above}, from floor {floor}"))
    refuse(
        source,
        wrong,
        "A file imports only from lower floors, and members of a family never import each other. Move what is shared "
        "down, to core/ or to a mechanism in between, or take it as an argument.",
    )


@each_source
def test_no_import_hides(source):
    if folder_of(source) in ("", "commands") or source == LOADER:
        return
    wrong = [(line, f"imports {name} inside a function") for node in functions(source) for line, name in imports(node)]
    wrong += [
        (node.lineno, f"imports by a call of {called(node)}")
        for node in nodes(source)
        if called(node) in {"import_module", "__import__", "spec_from_file_location"}
    ]
    refuse(
        source,
        wrong,
        "Imports stand at the top of a file, where the floors are plain to see; only the command line, its "
        "commands and jaxpar's own __init__ import late. A member of a family is picked by name: jaxpar."
        f"{LOADER[:-3].replace('/', '.')}.pick.",
    )


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_no_import_cycles(mechanism):
    files = {source[:-3].replace("/", "."): source for source in SOURCES if folder_of(source) == mechanism}
    graph = {
        file: {other for _, name in imports_of(source) for other in files if f"{name}.".startswith(f"jaxpar.{other}.")}
        for file, source in files.items()
    }
    circle = []
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
    assert not circle, f"{' -> '.join(circle)}: these import each other; move what they share into one of them."


@pytest.mark.parametrize("source", [source for source in SOURCES if folder_of(source) == "core"])
def test_core_is_light(source):
    heavy = [(line, name) for line, name in imports_of(source) if name.split(".")[0] in {"flax", "optax", "orbax"}]
    refuse(source, heavy, "core/ is imported by everything and so stays light: no flax, no optax, no orbax.")


@pytest.mark.parametrize("path", EXPERIMENTS)
def test_experiments_use_public_parts(path):
    for line, name in imports(tree_of(ROOT / path), "experiments"):
        first, *parts = name.split(".")
        assert first != "jaxpar" or not any(part.startswith("_") for part in parts), (
            f"{path}:{line}: {name} is private. An experiment uses what any reader could use."
        )


@each_source
def test_no_code_hides_in_data(source):
    unsafe = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "torch"}
    wrong = [(line, f"imports {name}") for line, name in imports_of(source) if name.split(".")[0] in unsafe]
    for node in nodes(source):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
            wrong.append((node.lineno, f"calls {node.func.id}"))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            wrong.append((node.value.lineno, "allows pickles"))
    refuse(source, wrong, "A file that was fetched must not be able to run code: read .npz, safetensors or JSON.")


@each_source
def test_no_assert(source):
    wrong = [(node.lineno, "assert") for node in nodes(source) if isinstance(node, ast.Assert)]
    refuse(source, wrong, "An assert vanishes under -O: raise ValueError, saying what was got and what mends it.")


@each_source
def test_public_parts_have_docstrings(source):
    tree = tree_of(PACKAGE / source)
    parts = [("this file", tree)] if tree.body else []
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef):
            parts.append((node.name, node))
            methods = node.body if isinstance(node, ast.ClassDef) else []
            parts += [(f"{node.name}.{method.name}", method) for method in methods if isinstance(method, Function)]
    wrong = [
        (getattr(part, "lineno", 1), name)
        for name, part in parts
        if not any(word.startswith("_") for word in name.split(".")) and not ast.get_docstring(part)
    ]
    refuse(source, wrong, "Say in a docstring what it is, in which units; comments then say why.")


@each_source
def test_files_are_short(source):
    lines = len((PACKAGE / source).read_text(encoding="utf-8").splitlines())
    advice = f"A file has at most {LONGEST_FILE} lines: split it along its ideas; one concept, one home."
    refuse(source, [(lines, f"{lines} lines")] if lines > LONGEST_FILE else [], advice)


@each_source
def test_functions_are_short(source):
    lengths = [(node.lineno, node.name, node.end_lineno - node.lineno + 1) for node in functions(source)]
    wrong = [(line, f"{name} has {length} lines") for line, name, length in lengths if length > LONGEST_FUNCTION]
    refuse(source, wrong, f"A function has at most {LONGEST_FUNCTION} lines: name its steps and call them.")


@each_source
def test_functions_take_few_parameters(source):
    wrong = []
    for node in functions(source):
        if folder_of(source) in FAMILIES and node.name == Path(source).stem:
            continue  # a member takes the fields of a recipe, by name
        count = sum(map(len, (node.args.posonlyargs, node.args.args, node.args.kwonlyargs)))
        if count > MOST_PARAMETERS:
            wrong.append((node.lineno, f"{node.name} takes {count} parameters"))
    refuse(source, wrong, f"A function takes at most {MOST_PARAMETERS} parameters: gather those that travel together.")


def test_files_name_no_machine():
    # spelled so that this file does not contain what it looks for
    folder = r"(?<![\w.~])/(hom[e]|roo[t]|tm[p]|wor[k]|User[s])/"
    host = r"\b(pyp[i]\.org|pythonhoste[d]|npmj[s]\.|deb\.debia[n])"
    place = re.compile(f"{folder}|{host}")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout, so nothing says which files belong to the project")
    wrong = []
    for name in filter(None, listed.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # deleted, or no text
            continue
        wrong += [f"{name}:{number}" for number, line in enumerate(text.splitlines(), 1) if place.search(line)]
    assert not wrong, "Paths are relative, and hosts are the reader's own choice; name neither: " + ", ".join(wrong)
