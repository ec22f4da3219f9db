"""Every dataset keeps one contract: data is a pure function of the step.  No test uses the network."""

import hashlib
import http.client
import importlib
import io
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import urllib.response
from collections import Counter
from email.message import Message

import numpy as np
import pictures
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar.core import family, files, order
from jaxpar.core.images import normalized
from jaxpar.core.refuse import Refused
from jaxpar.core.windows import text_windows

BATCH, CONTEXT = 16, 512
stdlib = importlib.import_module("jaxpar.datasets.stdlib_text")
shakespeare = importlib.import_module("jaxpar.datasets.tiny_shakespeare")
digits = importlib.import_module("jaxpar.datasets.digits")
(PUBLISHED,) = shakespeare.FILES
TEXT = np.random.default_rng(0).integers(32, 127, 200_003, np.uint8).tobytes()


@pytest.fixture(autouse=True)
def no_network_and_an_empty_cache(monkeypatch, tmp_path):
    def connect(*_):
        raise OSError("tests have no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXPAR_OFFLINE", raising=False)


@pytest.fixture
def text_file(monkeypatch, tmp_path):
    """A stand-in for tiny Shakespeare: `TEXT`, with its own size and checksum pinned."""
    pinned = PUBLISHED._replace(size=len(TEXT), checksum=f"sha256:{hashlib.sha256(TEXT).hexdigest()}")
    monkeypatch.setattr(shakespeare, "FILES", (pinned,))
    path = tmp_path / "data" / "tinyshakespeare.txt"
    path.parent.mkdir()
    path.write_bytes(TEXT)
    return path


@pytest.fixture(params=family.names("datasets"))
def build(request, text_file, monkeypatch):
    """A builder for each dataset: `build(batch, seed)`; images come as they are (tests/test_images.py changes them)."""
    member = family.pick("datasets", request.param)
    if request.param in pictures.NAMES:
        pictures.stand_in(monkeypatch, request.param, text_file.parent)
    fields = {"context": CONTEXT, "data_dir": str(text_file.parent), "augment": False}
    return lambda batch=BATCH, seed=0: member(batch=batch, seed=seed, **family.accepted(member, fields))


def refusal(call, *words):
    """The message of the one problem that `call` is refused with; it must hold all `words`."""
    with pytest.raises(Refused) as caught:
        call()
    assert len(caught.value.problems) == 1
    message = str(caught.value)
    assert not [word for word in words if str(word) not in message], message
    return message


def examples(batches):
    """One hash per example (input and label), in order; blank ones of label -1 left out."""
    rows = []
    for inputs, labels in batches:
        real = labels.reshape(len(labels), -1)[:, 0] >= 0
        rows += [hash(x.tobytes() + y.tobytes()) for x, y in zip(inputs[real], labels[real], strict=True)]
    return rows


def train_examples(data, epochs=1):
    count = train_count(data)
    steps = -(-count * epochs // BATCH)
    rows = examples(data.batch(step) for step in range(steps))
    return [rows[epoch * count : (epoch + 1) * count] for epoch in range(epochs)]


def train_count(data):
    return len(data.splits[0]) if data.splits[0].ndim > 1 else (len(data.splits[0]) - 1) // CONTEXT


def colours_of(data):
    return pictures.module(data.source.partition(":")[0]).COLOURS


def held_out_examples(data):
    return examples(data.held_out(i) for i in range(data.held_out_batches))


def test_shapes_dtypes_and_range(build):
    data = build()
    assert data.held_out_batches >= 1 and data.classes >= 2 and "\n" not in data.source
    held_out = [data.held_out(i) for i in (0, data.held_out_batches - 1)]
    for inputs, labels in (data.batch(0), data.batch(10**6), *held_out):
        assert inputs.shape == (BATCH, *data.example) and len(labels) == BATCH
        assert labels.dtype == np.int32 and labels.min() >= -1 and labels.max() < data.classes
        assert inputs.dtype in (np.int32, np.float32)
        if data.splits[0].dtype == np.uint8 and inputs.ndim == 4:  # pixels, normalized: black to white
            colours = colours_of(data)
            black, white = ((value - np.array(colours.mean)) / colours.deviation for value in (0, 1))
            assert (inputs >= black - 1e-5).all() and (inputs <= white + 1e-5).all()
        else:
            assert inputs.min() >= 0 and inputs.max() <= (1 if inputs.dtype == np.float32 else data.classes - 1)


def test_a_batch_is_a_pure_function_of_the_step(build):
    data, again = build(), build()
    want = {step: examples([data.batch(step)]) for step in (0, 1, 2, 999)}
    for step in (999, 1, 0, 2, 1):
        for array in data.batch(step):
            array[:] = 0  # what a caller does to a batch changes no other
        assert examples([again.batch(step)]) == examples([data.batch(np.int32(step))]) == want[step]


def test_every_example_comes_once_per_epoch_in_a_new_order(build):
    data = build()
    first, second = train_examples(data, epochs=2)
    assert len(first) == train_count(data)
    assert Counter(first) == Counter(second)
    assert first != second


def test_the_training_batches_are_the_training_split(build):
    data = build()
    count = train_count(data)
    inputs = np.concatenate([data.batch(step)[0] for step in range(-(-count // BATCH))])[:count]
    split = data.splits[0] if data.splits[0].ndim > 1 else data.splits[0][: count * CONTEXT].reshape(count, CONTEXT)
    if split.dtype == np.uint8 and split.ndim == 4:
        split = normalized(split, colours_of(data))
    assert Counter(map(bytes, inputs)) == Counter(map(bytes, split.astype(inputs.dtype)))


def test_the_order_depends_on_the_seed_and_the_split_does_not(build):
    data, other = build(seed=0), build(seed=1)
    assert examples([data.batch(0)]) != examples([other.batch(0)])
    assert held_out_examples(data) == held_out_examples(other)
    for split, same in zip(data.splits, other.splits, strict=True):
        np.testing.assert_array_equal(split, same)


def test_the_held_out_split_is_fixed_and_apart_from_training(build):
    data = build()
    held_out = held_out_examples(data)
    assert held_out == held_out_examples(data)
    assert 0.05 < len(data.splits[1]) / sum(map(len, data.splits)) < 0.25
    repeated = set(held_out) & set(train_examples(data)[0])
    assert len(repeated) < 0.01 * len(held_out)  # not 0: files of code share some boilerplate to the letter


def test_a_batch_size_changes_no_order(build):
    small, large = build(batch=8), build(batch=16)
    assert examples([small.batch(2), small.batch(3)]) == examples([large.batch(1)])


def test_the_splits_cannot_be_changed(build):
    for split in build().splits:
        with pytest.raises(ValueError, match="read-only"):
            split[0] = 0


@pytest.mark.parametrize("fields", [{"batch": 0}, {"seed": -1}, {"batch": 1.5}])
def test_a_wrong_size_or_seed_is_refused(build, fields):
    refusal(lambda: build(**fields), *fields, "whole number")


@pytest.mark.parametrize("i", [-1, 10**6])
def test_a_held_out_batch_that_does_not_exist_is_refused(build, i):
    refusal(lambda: build().held_out(i), i, "no such batch")


# Order

sizes = st.integers(1, 40)


@given(seed=st.integers(0, 2**40), step=st.integers(0, 200), batch=sizes, count=sizes)
def test_a_batch_is_its_stretch_of_the_epochs(seed, step, batch, count):
    stretch = range(step * batch, (step + 1) * batch)  # it straddles up to 40 epochs
    epochs = {p // count: np.random.default_rng([seed, p // count]).permutation(count) for p in stretch}
    got = order.example(seed, step, batch, count)
    assert got.dtype == np.int64
    assert got.tolist() == [epochs[p // count][p % count] for p in stretch]


def test_the_order_is_the_same_under_every_version_of_numpy():
    assert order.example(7, 3, 4, 10).tolist() == [8, 6, 7, 1]


def test_a_late_step_does_not_overflow():
    assert 0 <= order.example(0, np.int32(2**31 - 1), 4096, 1000).min()


def test_a_negative_step_is_refused():
    refusal(lambda: order.example(0, -1, 4, 10), "step = -1")


# Text

TOKENS = np.arange(100, dtype=np.uint8)


def windows(train=TOKENS, held_out=TOKENS[:30], batch=2, context=4, vocab=256):
    return text_windows(train, held_out, batch=batch, context=context, seed=0, vocab=vocab, source="numbers")


def test_windows_overlap_by_the_one_token_that_is_only_a_label():
    data = windows(batch=7)  # 30 tokens: 7 windows of 4 + 1, one token left over
    inputs, labels = data.held_out(0)
    assert data.held_out_batches == 1
    np.testing.assert_array_equal(inputs, np.arange(28).reshape(7, 4))
    np.testing.assert_array_equal(labels, inputs + 1)


@pytest.mark.parametrize(
    "lengths, words",
    [
        ((100, 30), ("held-out", "30 bytes", "33 (", "batch up to 7", "context up to 3")),
        ((30, 100), ("training", "30 bytes", "33 (")),
        ((100, 8), ("8 bytes", "Legal: batch up to 1.")),
        ((100, 0), ("0 bytes", "a longer text")),
    ],
)
def test_a_split_that_is_too_short_is_refused(lengths, words):
    train, held_out = (TOKENS[:length] for length in lengths)
    refusal(lambda: windows(train, held_out, batch=8), "too short", *words)


def test_the_sizes_offered_for_a_short_split_are_legal_and_the_largest():
    refusal(lambda: windows(batch=9, context=4), "batch up to 7 or context up to 3")
    assert windows(batch=7, context=4).held_out_batches == windows(batch=9, context=3).held_out_batches == 1
    for larger in ({"batch": 8, "context": 4}, {"batch": 9, "context": 4}):
        refusal(lambda larger=larger: windows(**larger), "too short")


def test_a_token_beyond_the_vocabulary_is_refused():
    assert windows(vocab=100).classes == 100
    refusal(lambda: windows(vocab=99), "token id 99", "vocab = 99", "vocab = 100")


def test_every_wrong_field_is_named_at_once(tmp_path):
    with pytest.raises(Refused) as caught:
        stdlib.stdlib_text(batch=0, context=-1, seed=-1, vocab=0, data_dir=str(tmp_path / "none"))
    assert {problem.field for problem in caught.value.problems} == {"batch", "context", "seed", "vocab", "data_dir"}


@pytest.mark.parametrize(
    "member",
    [lambda **data: stdlib.stdlib_text(batch=1, context=8, **data), lambda **data: digits.digits(batch=1, **data)],
)
def test_a_data_dir_that_is_no_folder_is_refused_where_no_file_is_needed(member, tmp_path):
    (tmp_path / "file").touch()
    refusal(lambda: member(data_dir=str(tmp_path / "none")), "data_dir", tmp_path / "none")
    refusal(lambda: member(data_dir=str(tmp_path / "file")), "data_dir", tmp_path / "file")


# The standard library as text


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A folder in place of the standard library: `library(files)` fills it and gives the names that are read."""
    root = tmp_path / "library"
    root.mkdir()
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda _: str(root))

    def fill(contents):
        for name, data in contents.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        stdlib._corpus.cache_clear()
        return root

    yield fill
    stdlib._corpus.cache_clear()


def test_only_the_text_of_the_library_itself_is_read(library):
    wanted = {"b/a.py": b"one", "b.py": "zw\u00f6lf".encode(), "a.py": b"three"}
    others = (
        "test/a.py",
        "b/tests/a.py",
        "idlelib/idle_test/a.py",
        "site-packages/n/a.py",
        "__pycache__/a.py",
        "config-3.11/a.py",
        "_sysconfigdata_x.py",
        "a.pyc",
        "a.txt",
    )
    root = library(wanted | {"latin.py": b"\xe9"} | dict.fromkeys(others, b"no"))
    (root.parent / "outside.py").write_bytes(b"no")
    (root / "link.py").symlink_to(root.parent / "outside.py")
    (root / "inner.py").symlink_to(root / "a.py")
    (root / "loop").symlink_to(root, target_is_directory=True)
    os.mkfifo(root / "pipe.py")
    train, held_out, source = stdlib._corpus(str(root))
    assert sorted(train.tobytes() + held_out.tobytes()) == sorted(b"".join(wanted.values()))
    assert "3 files" in source


def test_a_file_stays_on_its_side_when_others_come(library):
    contents = {f"m{i}.py": b"%04d" % i for i in range(500)}
    root = library(contents)
    train, held_out, source = stdlib._corpus(str(root))
    held = {bytes(row) for row in held_out.reshape(-1, 4)}
    assert 30 < len(held) < 70 and not held & {bytes(row) for row in train.reshape(-1, 4)}
    library({f"n{i}.py": b"%04d" % (i + 1000) for i in range(500)})
    more = {bytes(row) for row in stdlib._corpus(str(root))[1].reshape(-1, 4)}
    assert {row for row in more if int(row) < 1000} == held
    assert stdlib._corpus(str(root))[2] != source


def test_the_library_is_read_once_per_process():
    first, second = (stdlib.stdlib_text(batch=1, context=8) for _ in range(2))
    assert first.splits[0] is second.splits[0]
    assert sum(map(len, first.splits)) > 2_000_000


def compiled(root):
    (root / "os.pyc").write_bytes(b"\x00")


@pytest.mark.parametrize(
    "spoil",
    [compiled, os.rmdir, lambda root: (os.rmdir(root), root.write_bytes(b"PK"))],
    ids=["compiled", "missing", "zip"],
)
def test_a_library_without_source_is_refused(library, spoil):
    root = library({})
    spoil(root)
    refusal(lambda: stdlib.stdlib_text(batch=1, context=8), root, "compiled (.pyc)", "zip")


def test_a_library_that_cannot_be_read_is_refused(library, monkeypatch):
    library({"a.py": b"text"})
    monkeypatch.setattr(stdlib.Path, "read_bytes", denied)
    refusal(lambda: stdlib.stdlib_text(batch=1, context=8), "cannot be read", "denied")


# Files


def read(folder=None, **fields):
    data_dir = None if folder is None else str(folder)
    return shakespeare.tiny_shakespeare(**{"batch": 2, "context": 64, "data_dir": data_dir, **fields})


def denied(*_, **__):
    raise PermissionError(13, "denied")


EXPECTED = ("expected", PUBLISHED.url, "--data-dir", "stdlib_text, which works offline")


def test_the_first_nine_tenths_train(text_file):
    train, held_out = read(text_file.parent).splits
    assert train.tobytes() + held_out.tobytes() == TEXT
    assert len(train) == len(TEXT) * 9 // 10


def test_the_pinned_file_is_the_published_one():
    pin = PUBLISHED
    assert pin.url.startswith("https://") and pin.size == 1_115_394
    assert pin.checksum == "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def test_the_file_may_have_the_name_it_was_published_under(text_file):
    text_file.rename(text_file.with_name("input.txt"))
    assert b"".join(split.tobytes() for split in read(text_file.parent).splits) == TEXT


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "empty: 0 bytes"),
        (TEXT[:999], "truncated: 999 bytes"),
        (TEXT + b"!", f"too long: {len(TEXT) + 1:,} bytes"),
        (TEXT[:-1] + b"\x00", f"altered: {len(TEXT):,} bytes"),
        (TEXT * 9, f"too long: {len(TEXT) * 9:,} bytes"),
    ],
    ids=["empty", "truncated", "longer", "altered", "much longer"],
)
@pytest.mark.parametrize("cached", [False, True])
def test_a_file_with_a_wrong_byte_is_refused(text_file, content, word, cached):
    path = files.cache_folder() / text_file.name if cached else text_file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    refusal(
        lambda: read(None if cached else text_file.parent),
        f"{path} is {word}",
        f"{len(TEXT):,} bytes",
        hashlib.sha256(content).hexdigest(),
        hashlib.sha256(TEXT).hexdigest(),
        *EXPECTED,
    )
    assert path.read_bytes() == content  # a user's file is never replaced


def replaced_by_a_folder(path):
    path.unlink()
    path.mkdir()


def replaced_by_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replaced_by_a_dangling_link(path):
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    "spoil, word",
    [
        (os.remove, "is missing"),
        (replaced_by_a_folder, "is a directory"),
        (replaced_by_a_pipe, "not a regular file"),
        (replaced_by_a_dangling_link, "is missing"),
    ],
)
def test_something_else_in_place_of_the_file_is_refused(text_file, spoil, word):
    spoil(text_file)
    refusal(lambda: read(text_file.parent), text_file, word, *EXPECTED)


def test_an_unreadable_file_is_refused(text_file, monkeypatch):
    monkeypatch.setattr(files.Path, "open", denied)
    refusal(lambda: read(text_file.parent), f"{text_file} cannot be read (denied)", *EXPECTED)


def test_a_data_dir_that_is_no_folder_is_refused(text_file, tmp_path):
    refusal(lambda: read(tmp_path / "none"), tmp_path / "none" / text_file.name, "is not a folder", *EXPECTED)
    refusal(lambda: read(text_file), f"{text_file} is not a folder", *EXPECTED)


# Download


@pytest.fixture
def answer(monkeypatch, text_file):
    """A stand-in for the network: `answer(content or error)` is what any address gives; it returns the calls."""

    def set_answer(content):
        calls = []

        class Opener:
            def open(self, url, timeout):
                calls.append((url, timeout))
                if isinstance(content, Exception):
                    raise content
                return io.BytesIO(content)

        monkeypatch.setattr(files, "https_opener", Opener)
        return calls

    return set_answer


def test_a_download_happens_once_and_is_kept(answer):
    calls = answer(TEXT)
    assert b"".join(split.tobytes() for split in read().splits) == TEXT
    assert read().splits[0].tobytes() == TEXT[: len(TEXT) * 9 // 10]
    assert calls == [(PUBLISHED.url, files.TIMEOUT_S)]
    assert [path.name for path in files.cache_folder().iterdir()] == ["tinyshakespeare.txt"]


def test_a_data_dir_is_never_filled_up_by_a_download(answer, tmp_path):
    calls = answer(TEXT)
    refusal(lambda: read(tmp_path), "is missing", *EXPECTED)
    assert not calls


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route"),
        TimeoutError("timed out"),
        urllib.error.HTTPError("https://x", 404, "Not Found", Message(), None),
        http.client.IncompleteRead(b""),
        ConnectionResetError(),
    ],
)
def test_a_failed_download_is_refused(answer, error):
    answer(error)
    refusal(read, files.cache_folder() / "tinyshakespeare.txt", "download failed", *EXPECTED)
    assert not files.cache_folder().exists()


@pytest.mark.parametrize(
    "content, word",
    [(b"", "empty"), (TEXT[:-1], "truncated"), (TEXT * 9, "too long"), (TEXT[::-1], "altered")],
    ids=["empty", "truncated", "long", "altered"],
)
def test_a_download_with_a_wrong_byte_is_refused_and_not_kept(answer, content, word):
    answer(content)
    refusal(read, word, "sha256", *EXPECTED)
    assert not files.cache_folder().exists()


def test_a_cache_that_cannot_be_written_is_refused(answer, monkeypatch, tmp_path):
    answer(TEXT)
    (tmp_path / "cache").touch()  # a file where the folder should be
    refusal(read, "cannot be written", *EXPECTED)


def test_a_broken_write_leaves_nothing_behind(answer, monkeypatch):
    answer(TEXT)
    monkeypatch.setattr(files.os, "replace", denied)
    refusal(read, "cannot be written (denied)", *EXPECTED)
    assert not list(files.cache_folder().iterdir())


def test_offline_skips_the_network_but_not_the_cache(answer, monkeypatch):
    calls = answer(TEXT)
    monkeypatch.setenv("JAXPAR_OFFLINE", "1")
    refusal(read, "JAXPAR_OFFLINE", *EXPECTED)
    assert not calls
    monkeypatch.setenv("JAXPAR_OFFLINE", "0")
    read()
    monkeypatch.setenv("JAXPAR_OFFLINE", "1")
    read()
    assert len(calls) == 1


def test_the_cache_is_under_the_home_folder_unless_xdg_says_otherwise(monkeypatch, tmp_path):
    assert files.cache_folder() == tmp_path / "cache" / "jaxpar" / "data"
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert files.cache_folder() == tmp_path / ".cache" / "jaxpar" / "data"


@pytest.mark.parametrize("target", ["http://x.invalid/a", "ftp://x.invalid/a", "https://x.invalid/a"])
def test_a_redirect_is_followed_to_https_only(target):
    class Redirecting(urllib.request.BaseHandler):
        handler_order = 1

        def https_open(self, request):
            headers = Message()
            first = request.full_url.endswith("start")
            headers["Location"] = target
            answer = urllib.response.addinfourl(io.BytesIO(b"end"), headers, request.full_url, 302 if first else 200)
            answer.msg = ""
            return answer

    opener = files.https_opener()
    opener.add_handler(Redirecting())
    if target.startswith("https:"):
        assert opener.open("https://x.invalid/start").read() == b"end"
    else:
        with pytest.raises(urllib.error.URLError, match="unknown url type"):
            opener.open("https://x.invalid/start")


# Digits


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits  # here, since it takes seconds

    want = load_digits()
    data = digits.digits(batch=32)
    got = np.concatenate(data.splits)
    assert Counter(map(bytes, got)) == Counter(map(bytes, (want.images / 16).astype(np.float32)[..., None]))
    labels = {bytes(x.astype(np.float32)): y for x, y in zip(want.images / 16, want.target, strict=True)}
    inputs, found = data.batch(0)
    assert [labels[bytes(x)] for x in inputs] == found.tolist()


def test_both_splits_of_digits_hold_every_class_and_blanks_are_ignored():
    data = digits.digits(batch=100)
    labels = np.concatenate([data.held_out(i)[1] for i in range(data.held_out_batches)])
    inputs = np.concatenate([data.held_out(i)[0] for i in range(data.held_out_batches)])
    assert sorted(set(labels.tolist())) == [-1, *range(10)]
    assert (labels >= 0).sum() == len(data.splits[1])
    assert not inputs[labels < 0].any()
    assert {label for step in range(15) for label in data.batch(step)[1].tolist()} == set(range(10))


def test_a_batch_larger_than_the_held_out_digits_is_refused():
    most = len(digits.digits(batch=1).splits[1])
    assert digits.digits(batch=most).held_out_batches == 1
    refusal(lambda: digits.digits(batch=most + 1), f"batch = {most + 1}", f"1 to {most}")


@pytest.fixture
def no_digits_kept():
    digits._splits.cache_clear()
    yield
    digits._splits.cache_clear()


def test_digits_without_scikit_learn_are_refused(monkeypatch, no_digits_kept):
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda _: None)
    refusal(lambda: digits.digits(batch=8), "pip install scikit-learn")


@pytest.mark.parametrize("content", [None, b"", b"\x1f\x8bnothing"])
def test_damaged_digits_are_refused(monkeypatch, no_digits_kept, tmp_path, content):
    path = tmp_path / "datasets" / "data" / "digits.csv.gz"
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_bytes(content)
    package = importlib.machinery.ModuleSpec("sklearn", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda _: package)
    refusal(lambda: digits.digits(batch=8), path, "force-reinstall")


def test_members_are_light():
    """Building data imports neither jax nor scikit-learn: a process that only reads data starts fast."""
    code = (
        "import sys; from jaxpar.datasets.digits import digits; digits(batch=8);"
        "sys.exit(' '.join({'jax', 'sklearn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
