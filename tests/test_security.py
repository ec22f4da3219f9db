"""What jaxpar never does: run code that came as data, write outside its folders, open a port, call home."""

import ast
import hashlib
import http.client
import http.server
import io
import os
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar.core import archive, family, files
from jaxpar.core.files import File
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Refused
from jaxpar.train import folder, record

ROOT = Path(__file__).resolve().parent.parent
WATCHED = [
    path for name in ("src", "experiments", "colab", "benchmarks") for path in sorted((ROOT / name).rglob("*.py"))
]

# Code

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "joblib", "shelve", "torch", "jsonpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    "extractall",
    "extract",
    "unpack_archive",
    "exec_module",
    "load_module",
    "os.system",
    "os.popen",
    "torch.load",
}
ALLOWED = {
    ("src/jaxpar/core/family.py", "exec_module"),  # a file that the user names as path/to/file.py:name
    ("benchmarks/step_time.py", "torch"),  # to compare with; it loads no file
}


def unsafe(tree):
    """Line and words for each thing that could run code from data, or send something in the clear."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
                yield node.lineno, node.func.id
            if isinstance(node.func, ast.Attribute):
                yield from ((node.lineno, name) for name in {node.func.attr, ast.unparse(node.func)} & METHODS)
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "shell") and ast.unparse(keyword.value) != "False":
                    yield node.lineno, keyword.arg
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if "http://" in node.value:
                yield node.lineno, "http://"
            if node.value in MODULES - {"torch"}:
                yield node.lineno, f"names {node.value}"


@pytest.mark.parametrize("path", WATCHED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_code_from_data(path):
    where = path.relative_to(ROOT).as_posix()
    found = [(line, what) for line, what in unsafe(ast.parse(path.read_text())) if (where, what) not in ALLOWED]
    assert not found, f"{where}: {found}"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from torch import load",
        "import numpy as np; np.load('a', allow_pickle=True)",
        "eval('1')",
        "exec(text)",
        "import subprocess; subprocess.run('ls', shell=True)",
        "import tarfile; tarfile.open('a').extractall()",
        "import os; os.system('ls')",
        "url = 'http://example.org'",
        "compile(text, 'a', 'exec')",
        "import importlib; importlib.import_module('pickle')",
    ],
)
def test_the_check_sees_what_it_looks_for(code):
    assert list(unsafe(ast.parse(code)))


# Paths


@given(st.text(max_size=80))
def test_a_run_stays_in_its_folder(name):
    with suppress(Refused):
        path = folder.locate(Recipe(), name, "runs")
        assert path.parent == Path("runs") and path.name == name and path.name not in ("", ".", "..")


@pytest.mark.parametrize(
    "name", ["../a", "a/b", "/etc", "a\0b", "a\n", "", ".", "..", "~", "a" * 65, "ä", "a b", "-x/.."]
)
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(Refused, match="name ="):
        folder.locate(Recipe(), name, "runs")


@given(st.lists(st.sampled_from(["..", ".", "a", "/", "\\", "~", "etc"]), max_size=6).map("".join))
def test_a_run_that_is_looked_for_by_name_is_not_looked_for_outside(name):
    with suppress(Refused):
        pytest.fail(str(record.find(name, "runs")))


@pytest.mark.parametrize("name", family.names("datasets"))
def test_a_dataset_pins_its_files(name):
    for file in family.constant(family.pick("datasets", name), "FILES", ()):
        assert file.url.startswith("https://") and file.size > 0 and file.dataset == name
        algorithm, digest = file.checksum.split(":")
        assert algorithm in ("sha256", "sha512") and len(bytes.fromhex(digest)) == hashlib.new(algorithm).digest_size
        assert all(Path(known).name == known and not known.startswith(".") for known in file.names)


@pytest.mark.parametrize("family_name", ["models", "datasets", "schemes", "commands", "sinks"])
@pytest.mark.parametrize("name", ["../core/family", "os", "__init__", "", "a.b", "/etc/passwd", "..", "digits/../../x"])
def test_a_family_has_no_members_outside(family_name, name):
    with pytest.raises(Refused):
        family.pick(family_name, name)


# Downloads, through the whole of urllib: a server on this machine answers in place of the published address.

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def server(monkeypatch, tmp_path):
    """`server(answer)` makes `answer(handler)` what any https address says, and returns what was asked for."""
    running, asked = [], []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append((self.headers["Host"], self.path))
                with suppress(OSError):
                    answer(self)

            def log_message(self, *_):
                pass

        found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        running.append(found)
        threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

        class Connection(http.client.HTTPConnection):
            def __init__(self, host, **_):
                super().__init__(host, timeout=5)

            def connect(self):
                self.sock = socket.create_connection(found.server_address, 5)

        monkeypatch.setattr(http.client, "HTTPSConnection", Connection)
        return asked

    monkeypatch.delenv("JAXPAR_OFFLINE", raising=False)
    for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    yield start
    for found in running:
        found.shutdown()
        found.server_close()


def body(content, length=None):
    def answer(handler):
        handler.send_response(200)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def redirect(target):
    def answer(handler):
        if handler.path == "/file":
            handler.send_response(302)
            handler.send_header("Location", target)
            handler.end_headers()
        else:
            body(CONTENT)(handler)

    return answer


def pinned(content=CONTENT):
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return File("mine", ("file.bin",), "https://data.invalid/file", len(content), checksum, "digits")


def test_a_download_lies_there_whole(server, tmp_path):
    asked = server(body(CONTENT))
    assert files.fetch(pinned(), tmp_path / "data") and not files.fetch(pinned(), tmp_path / "data")
    assert asked == [("data.invalid", "/file")]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["file.bin"]
    assert (tmp_path / "data" / "file.bin").read_bytes() == CONTENT


def endless(handler):
    body(b"")(handler)
    while True:
        handler.wfile.write(bytes(1 << 16))


@pytest.mark.parametrize(
    "answer, told",
    [
        (body(CONTENT[::-1]), "altered"),
        (body(CONTENT[:-1]), "truncated"),
        (body(CONTENT[:-1], len(CONTENT)), "truncated"),
        (body(b""), "empty"),
        (body(CONTENT + b"!"), "too long"),
        (endless, "too long"),
        (redirect("http://data.invalid/other"), "unknown url type: http"),
        (redirect("file:///etc/passwd"), "302"),
        (redirect("ftp://data.invalid/other"), "unknown url type: ftp"),
        (lambda handler: handler.send_error(500), "500"),
        (lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"), "download failed"),
    ],
    ids=[
        "altered",
        "short",
        "shorter",
        "empty",
        "longer",
        "endless",
        "http",
        "file",
        "ftp",
        "500",
        "nonsense",
    ],
)
def test_a_wrong_download_is_refused_and_leaves_nothing(answer, told, server, tmp_path):
    server(answer)
    with pytest.raises(Refused) as refused:
        files.fetch(pinned(), tmp_path / "data")
    assert told in str(refused.value) and "expected: 256,000 bytes" in str(refused.value)
    assert not (tmp_path / "data").exists()


def test_a_redirect_to_https_is_followed(server, tmp_path):
    asked = server(redirect("https://other.invalid/elsewhere"))
    assert files.fetch(pinned(), tmp_path / "data")
    assert asked == [("data.invalid", "/file"), ("other.invalid", "/elsewhere")]


def test_a_server_that_drips_is_given_up(server, tmp_path, monkeypatch):
    def drip(handler):
        body(b"")(handler)
        for byte in CONTENT[:200]:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.02)

    server(drip)
    monkeypatch.setattr(files, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(files, "SLOWEST", 10**9)
    began = time.perf_counter()
    with pytest.raises(Refused, match="slower than 1,000,000,000 bytes per second"):
        files.fetch(pinned(), tmp_path / "data")
    assert time.perf_counter() - began < 2 and not (tmp_path / "data").exists()


def test_offline_asks_nobody(server, tmp_path, monkeypatch):
    asked = server(body(CONTENT))
    monkeypatch.setenv("JAXPAR_OFFLINE", "1")
    with pytest.raises(Refused, match="JAXPAR_OFFLINE"):
        files.fetch(pinned(), tmp_path / "data")
    assert not asked


# Archives


def tar(*entries, mode="w"):
    """A tar of (name, content, changes of its header)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as opened:
        for name, content, changes in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for field, value in changes.items():
                setattr(entry, field, value)
            opened.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def zipped(*entries):
    """A zip of (name, content, mode)."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content, mode in entries:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            opened.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def with_false_size(content):
    """A zip whose directory says that its one file is smaller than it is."""
    made = bytearray(zipped(("a", content, 0o644)))
    at = made.rindex(b"PK\x01\x02") + 24
    made[at : at + 4] = (10).to_bytes(4, "little")
    return bytes(made)


FINE = ("a/b.txt", b"text", {})
PLAIN = stat.S_IFREG | 0o644
EVIL = {
    "tar, absolute": (tar(("/etc/evil", b"x", {})), "leads outside"),
    "tar, parent": (tar(("a/../../evil", b"x", {})), "leads outside"),
    "tar, link": (
        tar(("a", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc"}), ("a/evil", b"x", {})),
        "no plain file",
    ),
    "tar, hard link": (tar(("a", b"", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"})), "no plain file"),
    "tar, device": (tar(("a", b"", {"type": tarfile.CHRTYPE, "devmajor": 1})), "no plain file"),
    "tar, pipe": (tar(("a", b"", {"type": tarfile.FIFOTYPE})), "no plain file"),
    "tar, many": (tar(*((f"f{i}", b"", {}) for i in range(101))), "more than 100 entries"),
    "tar, large": (tar(("a", bytes(20_000), {}), mode="w:gz"), "more than 10,000 bytes"),
    "tar, twice": (tar(("a", b"1", {}), ("a", b"2", {})), "twice"),
    "tar, case": (tar(("a", b"1", {}), ("A", b"2", {})), "twice"),
    "tar, file over folder": (tar(("a/b", b"1", {}), ("a", b"2", {})), "cannot be unpacked"),
    "tar, cut off": (tar(("a", bytes(5000), {}))[:3000], "cannot be unpacked"),
    "tar, backslash": (tar(("..\\evil", b"x", {})), "no name that every system"),
    "tar, drive": (tar(("C:evil", b"x", {})), "no name that every system"),
    "tar, newline": (tar(("a\nb", b"x", {})), "no name that every system"),
    "tar, header": (tar(("a", b"", {"pax_headers": {"comment": "x" * 10**6}}), mode="w:gz"), "decompressed"),
    "zip, absolute": (zipped(("/etc/evil", b"x", PLAIN)), "leads outside"),
    "zip, parent": (zipped(("../evil", b"x", PLAIN)), "leads outside"),
    "zip, link": (zipped(("a", b"/etc", stat.S_IFLNK | 0o777)), "no plain file"),
    "zip, bomb": (zipped(("a", bytes(10**7), PLAIN)), "more than 10,000 bytes"),
    "zip, false size": (with_false_size(bytes(9000)), ""),
    "zip, many": (zipped(*((f"f{i}", b"", PLAIN) for i in range(101))), "more than 100 entries"),
    "zip, cut off": (zipped(("a", b"text", PLAIN))[:-30], "cannot be unpacked"),
    "nothing": (b"", "cannot be unpacked"),
    "nonsense": (b"no archive" * 100, "cannot be unpacked"),
}


@pytest.mark.parametrize("name", EVIL)
def test_an_evil_archive_is_refused_and_leaves_nothing(name, tmp_path):
    content, told = EVIL[name]
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "archive"
    path.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Refused) as refused:
        archive.unpack(path, tmp_path / "in" / "out", files=100, size=10_000)
    assert told in str(refused.value) and str(path) in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", [b"", b"123", b"12345"])
def test_an_entry_that_is_not_as_large_as_it_says_is_refused(content):
    """Python's own readers notice it too; other versions of them may not."""
    member = archive.Member("a", True, 4, None)
    with pytest.raises(Refused, match="not of the 4 bytes that it says"):
        archive._copy(Path("b"), io.BytesIO(content), target := io.BytesIO(), member)
    assert len(target.getvalue()) <= 4


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_a_good_archive_is_unpacked_whole(mode, tmp_path):
    entries = [("./a/b.txt", b"text"), ("c.txt", b""), ("a/d.bin", CONTENT)]
    rights = {"mode": 0o4777, "uid": 7}
    content = (
        zipped(*((name, data, stat.S_IFREG | 0o4777) for name, data in entries))
        if mode == "zip"
        else tar(("./a", b"", {"type": tarfile.DIRTYPE}), *((name, data, rights) for name, data in entries), mode=mode)
    )
    (tmp_path / "archive").write_bytes(content)
    out = archive.unpack(tmp_path / "archive", tmp_path / "new" / "out", files=4, size=len(CONTENT) + 4)
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert found == {"a/b.txt": b"text", "c.txt": b"", "a/d.bin": CONTENT}
    assert not (out / "a" / "b.txt").stat().st_mode & (stat.S_ISUID | stat.S_IXUSR)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(Refused, match="is there already"):
        archive.unpack(tmp_path / "archive", out, files=9, size=10**6)


# Network

GUARD = """
import socket, sys
seen = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[1] if event in ("socket.connect", "socket.bind", "socket.sendto") else arguments[0]
        if not isinstance(address, (str, bytes)) or event.startswith("socket.get"):  # a path is of this machine
            seen.append((event, str(address)))
            raise OSError(f"guarded: {event} {address}")

sys.addaudithook(watch)
"""
LISTENS = """
import glob, os

def listening():
    "Sockets of this process that listen (state 0A), are connected or are UDP, whoever opened them."
    inodes = {os.readlink(path) for path in glob.glob("/proc/self/fd/*") if os.path.lexists(path)}
    found = []
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for line in open(f"/proc/self/net/{kind}").read().splitlines()[1:]:
            words = line.split()
            is_open = words[3] == "0A" or words[2][-4:] != "0000" or kind.startswith("udp")
            if is_open and f"socket:[{words[9]}]" in inodes:
                found.append((kind, *words[1:4]))
    return found
"""


def guarded(code, tmp_path):
    """Stdout of a fresh Python under the guard."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", GUARD + LISTENS + code]
    found = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()[-1]


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="only Linux says which sockets listen")
def test_a_default_run_neither_listens_nor_calls(tmp_path):
    flags = "--model.name mlp --model.layers 1 --model.width 16 --data.name digits --batch 8 --steps 3 --plan data=2"
    code = f"""
from jaxpar import cli
from jaxpar.train import folder
during = []
written = folder.write
folder.write = lambda *_: (during.extend(listening()), written(*_))
cli.main(["train", *{flags.split()!r}])
print(seen, during, listening())
"""
    assert guarded(code, tmp_path) == "[] [] []"
    assert (tmp_path / "runs" / "train" / "summary.json").is_file()


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="only Linux says which sockets listen")
@pytest.mark.parametrize(
    "code",
    [
        "s = socket.socket(); s.connect(('192.0.2.1', 80))",
        "s = socket.socket(); s.bind(('127.0.0.1', 0))",
        "socket.getaddrinfo('example.invalid', 80)",
    ],
)
def test_the_guard_sees_what_it_looks_for(code, tmp_path):
    lines = f"\ntry:\n    {code}\nexcept OSError:\n    print(len(seen))\n"
    assert guarded(lines, tmp_path) == "1"


def test_listening_sockets_are_seen():
    """Sockets that are opened below Python, here before the guard is told of them."""
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(len(listening()))"
    found = subprocess.run([sys.executable, "-c", LISTENS + code], capture_output=True, text=True)
    assert found.stdout.strip() == "1", found.stderr
