"""Datasets of images: augmentation, decoding, the cache, and everything that may be wrong with files.  No network."""

import errno
import gzip
import io
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pictures
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet as arrow

from jaxpar.core import archive, augment, decoded, family, files, waiting
from jaxpar.core.idx import idx
from jaxpar.core.images import Colours, Images, image_dataset, normalized
from jaxpar.core.recipe import Data, Model, Recipe
from jaxpar.core.refuse import Refused
from jaxpar.step.parts import prepare

COUNTS = pictures.COUNTS


@pytest.fixture(autouse=True)
def an_empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAXPAR_OFFLINE", "1")


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Tiny CIFAR-10, as the published archive."""
    pictures.stand_in(monkeypatch, "cifar10", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def empty(folder):
    """The same, without the archive."""
    (folder / "cifar-10-binary.tar.gz").unlink()
    return folder


def cifar10(folder, **fields):
    data_dir = None if folder is None else str(folder)
    return pictures.module("cifar10").cifar10(**{"batch": 32, "augment": False, "data_dir": data_dir, **fields})


def refusal(call, *words):
    with pytest.raises(Refused) as caught:
        call()
    message = str(caught.value)
    assert len(caught.value.problems) == 1 and not [word for word in words if str(word) not in message], message
    return message


def encoded(pixels, kind="PNG"):
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, kind)
    return held.getvalue()


def write_parquet(path, rows, labels, image="img", column="label"):
    table = pyarrow.table({image: [{"bytes": row, "path": None} for row in rows], column: labels})
    arrow.write_table(table, path)


def write_shards(folder, change=lambda split, rows, labels: (rows, labels)):
    """Tiny CIFAR-10 as parquet, the training split in two files."""
    for split, (pixels, labels) in zip(("train", "test"), pictures.cifar_arrays("cifar10"), strict=True):
        rows, own = change(split, [encoded(one) for one in pixels], labels.astype(np.int64).tolist())
        parts = 2 if split == "train" else 1
        for n in range(parts):
            cut = slice(n * len(rows) // parts, (n + 1) * len(rows) // parts)
            write_parquet(folder / f"{split}-{n:05}-of-{parts:05}.parquet", rows[cut], own[cut])


# What is read


def assert_is_cifar10(data):
    (train, _), (pixels, labels) = pictures.cifar_arrays("cifar10")
    for split, want in zip(data.splits, (train, pixels), strict=True):
        np.testing.assert_array_equal(split, want)
    held = data.held_out(0)
    np.testing.assert_array_equal(held[1], labels[:32])
    np.testing.assert_allclose(held[0], normalized(pixels[:32], pictures.module("cifar10").COLOURS))


def test_the_archive_its_files_and_parquet_are_the_same_images(folder):
    assert_is_cifar10(cifar10(folder))
    (folder / "cifar-10-binary.tar.gz").unlink()
    (folder / "cifar-10-batches-bin").mkdir()
    for name, data in pictures.cifar_files("cifar10").items():
        (folder / "cifar-10-batches-bin" / name).write_bytes(data)
    assert_is_cifar10(cifar10(folder))
    for path in (folder / "cifar-10-batches-bin").iterdir():
        path.rename(folder / path.name)
    assert_is_cifar10(cifar10(folder))
    for path in folder.glob("*.bin"):
        path.unlink()
    write_shards(folder)
    found = cifar10(folder)
    assert_is_cifar10(found)
    assert "encoded images" in found.source and "sha256:" in found.source


def test_cifar100_has_the_fine_labels(monkeypatch, tmp_path):
    pictures.stand_in(monkeypatch, "cifar100", tmp_path)
    data = pictures.module("cifar100").cifar100(batch=64, data_dir=str(tmp_path))
    pixels, labels = pictures.cifar_arrays("cifar100")[1]
    np.testing.assert_array_equal(data.held_out(0)[1], labels)
    np.testing.assert_array_equal(data.splits[1], pixels)
    assert data.classes == 100 and labels.max() > 20


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_are_read_under_their_published_names_as_well(monkeypatch, tmp_path, name):
    pictures.stand_in(monkeypatch, name, tmp_path)
    member = family.pick("datasets", name)
    for file in pictures.module(name).FILES:
        (tmp_path / file.names[0]).rename(tmp_path / file.names[1])
    data = member(batch=64, data_dir=str(tmp_path))
    contents = pictures.idx_files(name)
    assert data.splits[1].tobytes() == gzip.decompress(contents["t10k-images-idx3-ubyte.gz"])[16:]
    assert data.held_out(0)[1].tolist() == list(gzip.decompress(contents["t10k-labels-idx1-ubyte.gz"])[8:])


def test_two_datasets_of_equal_file_names_share_a_cache(monkeypatch, tmp_path):
    for name in ("mnist", "fashion_mnist"):
        assert not {one for file in pictures.module(name).FILES for one in file.names[:1]} & {
            one
            for other in ("mnist", "fashion_mnist")
            if other != name
            for f in pictures.module(other).FILES
            for one in f.names
        }


def test_pixels_are_normalized_by_the_published_numbers():
    colours = Colours((0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    pixels = np.array([[[[0, 0, 0], [255, 255, 255]]]], np.uint8)
    np.testing.assert_allclose(normalized(pixels, colours)[0, 0], [[-1, -1, 0], [1, 3, 1]], atol=1e-6)
    assert normalized(pixels, colours).dtype == np.float32


def test_a_short_last_batch_is_filled_up_and_a_batch_that_is_too_large_refused():
    pixels = np.arange(40 * 3, dtype=np.uint8).reshape(40, 1, 1, 3)
    images = Images(pixels, np.zeros(40, np.uint8), 30, "numbers")
    data = image_dataset(images, Colours((0.5,) * 3, (0.5,) * 3), batch=8, classes=2)
    assert data.held_out_batches == 2
    inputs, labels = data.held_out(1)
    assert labels.tolist() == [0, 0] + [-1] * 6 and not inputs[2:].any() and inputs[:2].any()
    refusal(lambda: image_dataset(images, Colours((0,) * 3, (1,) * 3), batch=11, classes=2), "batch = 11", "1 to 10")


# Augmentation

PLACES = st.lists(st.integers(0, 2**62), min_size=1, max_size=12)


def some(count, seed=0, size=(6, 5, 3)):
    return np.random.default_rng(seed).integers(1, 256, (count, *size), np.uint8)  # no black but at the border


@given(seed=st.integers(0, 2**32 - 1), places=PLACES, pad=st.integers(1, 4), data=st.data())
def test_augmentation_is_a_function_of_seed_and_position_alone(seed, places, pad, data):
    images, places = some(len(places)), np.array(places)
    before = images.copy()
    whole = augment.pad_crop_flip(images, seed, places, pad)
    np.testing.assert_array_equal(images, before)
    assert whole.dtype == np.uint8 and whole.shape == images.shape
    cut = data.draw(st.integers(0, len(places)))
    parts = [augment.pad_crop_flip(images[s], seed, places[s], pad) for s in (slice(cut), slice(cut, None))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@given(seed=st.integers(0, 2**32 - 1), places=PLACES, pad=st.integers(1, 4))
def test_what_is_moved_in_at_the_border_is_black_and_the_rest_is_the_image(seed, places, pad):
    images = some(len(places))
    got = augment.pad_crop_flip(images, seed, np.array(places), pad)
    choices = augment.choices(seed, np.array(places), pad)
    for image, one, down, right, mirrored in zip(images, got, *choices, strict=True):
        want = np.zeros_like(image)
        for y in range(image.shape[0]):
            for x in range(image.shape[1]):
                if 0 <= y + down - pad < image.shape[0] and 0 <= x + right - pad < image.shape[1]:
                    want[y, x] = image[y + down - pad, x + right - pad]
        np.testing.assert_array_equal(one, want[:, ::-1] if mirrored else want)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_every_offset_is_as_likely_and_each_choice_apart_from_the_others(seed):
    count = 81 * 400
    down, right, mirrored = augment.choices(seed, np.arange(count), 4)
    table = np.zeros((9, 9, 2))
    np.add.at(table, (down, right, mirrored.astype(int)), 1)
    expected = count / table.size
    assert ((table - expected) ** 2 / expected).sum() < 161 + 5 * (2 * 161) ** 0.5  # chi squared of 161 freedoms
    lagged = np.corrcoef(np.stack([down[:-1], down[1:], right[:-1], right[1:], mirrored[:-1], mirrored[1:]]))
    assert abs(lagged - np.eye(6)).max() < 5 / count**0.5


def test_another_seed_or_epoch_draws_anew():
    first = np.stack(augment.choices(0, np.arange(1000), 4))
    for other in (augment.choices(1, np.arange(1000), 4), augment.choices(0, np.arange(1000) + 50_000, 4)):
        assert 0.05 < (first[0] == other[0]).mean() < 0.2 and 0.4 < (first[2] == other[2]).mean() < 0.6


def test_draws_are_those_of_splitmix64():
    """A second computation of it, with Python's integers."""

    def mixed(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    assert mixed(golden) == 0xE220A8397B1DCDAF  # the first output for the state 0, as published
    for seed, place in ((0, 0), (7, 12345), (2**32 - 1, 2**40)):
        want = mixed((mixed((seed + golden) % 2**64) + (place + 1) * golden) % 2**64)
        assert augment.draws(seed, np.array([place]))[0] == want


def test_training_images_are_moved_by_their_place_in_the_run_and_others_never(folder):
    plain, moved = cifar10(folder), cifar10(folder, augment=True)
    small = cifar10(folder, augment=True, batch=16)
    for step in (0, 3, 11):  # 11: the second epoch
        inputs, labels = moved.batch(step)
        halves = [small.batch(2 * step + n)[0] for n in (0, 1)]
        np.testing.assert_array_equal(inputs, np.concatenate(halves))
        np.testing.assert_array_equal(inputs, moved.batch(np.int32(step))[0])
        np.testing.assert_array_equal(labels, plain.batch(step)[1])
        assert (inputs != plain.batch(step)[0]).any(axis=(1, 2, 3)).mean() > 0.9
    np.testing.assert_array_equal(moved.held_out(1)[0], plain.held_out(1)[0])


@pytest.mark.parametrize("name, default", [("cifar10", True), ("cifar100", True), ("mnist", False)])
def test_cifar_is_augmented_unless_the_recipe_says_otherwise(monkeypatch, tmp_path, name, default):
    pictures.stand_in(monkeypatch, name, tmp_path)

    def inputs(data):
        return prepare(Recipe(Model("mlp", layers=1, width=8), data, batch=8), str(tmp_path))[1].batch(0)[0]

    on, off = inputs(Data(f"{name}:augment=true")), inputs(Data(f"{name}:augment=false"))
    assert (on != off).any()
    np.testing.assert_array_equal(inputs(Data(name)), on if default else off)


def test_augment_is_refused_where_there_is_nothing_to_augment():
    for name in ("digits", "stdlib_text"):
        recipe = Recipe(Model("mlp", layers=1, width=8), Data(f"{name}:augment=true"), batch=8)
        with pytest.raises(Refused, match=rf"data.name = {name}:augment=true: {name} has no `augment`"):
            prepare(recipe)


# The cache


def decoded_files():
    return sorted((files.cache_folder() / "decoded").glob("*"))


def test_images_are_decoded_once(folder, monkeypatch):
    first = cifar10(folder)
    (path,) = decoded_files()
    assert path.name.startswith("cifar10-") and path.suffix == ".u8"
    cifar = sys.modules["jaxpar.core.cifar"]
    monkeypatch.setattr(cifar, "records", lambda *_: pytest.fail("decoded again"))
    assert_is_cifar10(cifar10(folder))
    for split in (*first.splits, *cifar10(folder).splits):
        with pytest.raises(ValueError, match="read-only"):
            split[0] = 0


def test_a_run_from_the_cache_needs_the_archive_no_more(folder):
    archive_there = files.cache_folder() / "cifar-10-binary.tar.gz"
    archive_there.parent.mkdir(parents=True)
    (folder / "cifar-10-binary.tar.gz").rename(archive_there)
    assert_is_cifar10(cifar10(None))
    archive_there.unlink()
    assert_is_cifar10(cifar10(None))


def flip(path):
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("spoil", [flip, shorten, lambda path: path.write_bytes(b"")], ids=["bit", "short", "empty"])
def test_a_damaged_cache_is_told_and_made_again(folder, capsys, spoil):
    cifar10(folder)
    (path,) = decoded_files()
    whole = path.read_bytes()
    spoil(path)
    assert_is_cifar10(cifar10(folder))
    assert f"{path} is damaged" in capsys.readouterr().err and path.read_bytes() == whole


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_where_nothing_can_be_written_images_stay_in_memory(folder, monkeypatch, capsys, code):
    def refused(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(decoded.os, "replace", refused)
    data = cifar10(folder)
    assert_is_cifar10(data)
    assert f"cannot be written ({os.strerror(code)})" in capsys.readouterr().err and not decoded_files()
    with pytest.raises(ValueError, match="read-only"):
        data.splits[0][0] = 0


def test_other_files_are_other_images(empty):
    write_shards(empty)
    first = cifar10(empty)
    write_shards(empty, lambda split, rows, labels: (rows[::-1], labels[::-1]))
    second = cifar10(empty)
    np.testing.assert_array_equal(second.splits[1], first.splits[1][::-1])
    assert len(decoded_files()) == 2 and first.source != second.source


def test_a_part_that_a_killed_process_left_is_cleared_away(folder):
    cifar10(folder)
    (path,) = decoded_files()
    left, fresh = (path.with_name(f"{path.name}.{one}.part") for one in ("old", "new"))
    for part in (left, fresh):
        part.write_bytes(b"half")
    os.utime(left, (1, 1))
    flip(path)
    cifar10(folder)
    assert not left.exists() and fresh.exists()


# What is wrong


def test_a_wrong_archive_is_refused_even_if_its_images_are_in_the_cache(folder):
    cifar10(folder)
    path = folder / "cifar-10-binary.tar.gz"
    path.write_bytes(path.read_bytes()[:-1])
    refusal(lambda: cifar10(folder), "truncated", "expected", "--data-dir")


def repacked(monkeypatch, folder, data):
    member = pictures.module("cifar10")
    monkeypatch.setattr(member, "FILES", (pictures.pinned(member.FILES[0], data),))
    monkeypatch.setattr(member, "KIND", member.KIND._replace(file=member.FILES[0]))
    (folder / member.FILES[0].names[0]).write_bytes(data)


def archived(change):
    inside = {f"cifar-10-batches-bin/{name}": data for name, data in pictures.cifar_files("cifar10").items()}
    change(inside)
    return inside


TEST = "cifar-10-batches-bin/test_batch.bin"


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda inside: inside.update({"../escaped.bin": b"x"}), "'../escaped.bin', which leads outside"),
        (lambda inside: inside.update({"/escaped.bin": b"x"}), "leads outside"),
        (lambda inside: inside.pop(TEST), f"does not hold {TEST}"),
        (lambda inside: inside.update({TEST: inside[TEST][:-1]}), "bytes, and 64 images are"),
        (lambda inside: inside.update({TEST: b"\x0a" + inside[TEST][1:]}), "image 0 has the label 10"),
        (lambda inside: inside.update({f"f{n}": b"" for n in range(70)}), "more than 64 entries"),
        (lambda inside: inside.update({"large": bytes(5_000_000)}), "more than"),
    ],
    ids=["outside", "absolute", "missing", "short", "label", "many", "large"],
)
def test_an_archive_that_is_not_cifar_is_refused_though_its_checksum_is_right(monkeypatch, folder, change, word):
    repacked(monkeypatch, folder, pictures.tar(archived(change)))
    refusal(lambda: cifar10(folder), word)
    assert not decoded_files() and not list(folder.parent.glob("**/escaped*"))


def test_links_and_broken_archives_are_refused(monkeypatch, folder):
    repacked(monkeypatch, folder, pictures.tar(archived(lambda inside: None), links=[f"{TEST}.link"]))
    refusal(lambda: cifar10(folder), "no plain file or folder")
    whole = pictures.tar(archived(lambda inside: None))
    for data in (whole[: len(whole) // 2], b"no archive", gzip.compress(b"no archive")):
        repacked(monkeypatch, folder, data)
        refusal(lambda: cifar10(folder), "cannot be unpacked")


def test_a_file_of_an_archive_may_come_before_what_is_wrong_with_it(tmp_path):
    packed = pictures.tar({"good": b"1", "../bad": b"2"})
    with pytest.raises(Refused, match="leads outside"):
        archive.contents(tmp_path / "x.tar.gz", packed, ["good"], files=4, size=100)


def test_unpacked_files_are_checked(empty):
    for name, data in pictures.cifar_files("cifar10").items():
        (empty / name).write_bytes(data)
    path = empty / "data_batch_3.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refusal(lambda: cifar10(empty), "data_batch_3.bin", "bytes")
    path.write_bytes(whole[:3073] + b"\xff" + whole[3074:])
    refusal(lambda: cifar10(empty), "data_batch_3.bin: image 1 has the label 255", "0 to 9")
    path.unlink()
    refusal(lambda: cifar10(empty), "holds none of", "data_batch_3.bin", "train-*.parquet", "--data-dir")


def test_a_folder_that_is_none_is_refused(tmp_path):
    refusal(lambda: cifar10(tmp_path / "none"), "data_dir", "there is no such folder")


def broken(split, rows, labels):
    return [*rows[:5], rows[5][:-40], *rows[6:]], labels


def tall(split, rows, labels):
    return [*rows[:5], encoded(np.zeros((33, 32, 3), np.uint8)), *rows[6:]], labels


def grey(split, rows, labels):
    return [*rows[:5], encoded(np.zeros((32, 32), np.uint8)), *rows[6:]], labels


def other_format(split, rows, labels):
    return [*rows[:5], encoded(np.zeros((32, 32, 3), np.uint8), "BMP"), *rows[6:]], labels


@pytest.mark.parametrize(
    "change, words",
    [
        (broken, ("train-00000-of-00002.parquet: row 5", "cannot be decoded")),
        (tall, ("row 5", "33 x 32 x 3", "32 x 32 x 3 is needed")),
        (grey, ("row 5", "32 x 32 x 1")),
        (other_format, ("row 5", "cannot be decoded as JPEG or PNG")),
        (lambda split, rows, labels: ([*rows[:5], None, *rows[6:]], labels), ("row 5", "no encoded image")),
        (lambda split, rows, labels: (rows[:-2], labels[:-2]), ("holds 318 of 320 images", "a file is missing")),
        (lambda split, rows, labels: (rows + rows[:2], labels + labels[:2]), ("more than the 320 images",)),
        (lambda split, rows, labels: (rows, [*labels[:7], 10, *labels[8:]]), ("image 7 has the label 10",)),
        (lambda split, rows, labels: (rows, [*labels[:7], -1, *labels[8:]]), ("image 7 has the label -1",)),
        (lambda split, rows, labels: (rows, [*labels[:7], 1000, *labels[8:]]), ("image 7 has the label 1000",)),
        (lambda split, rows, labels: (rows, [float(one) for one in labels]), ("whole numbers",)),
    ],
    ids=["broken", "tall", "grey", "format", "none", "few", "many", "10", "-1", "1000", "float"],
)
def test_encoded_images_that_are_wrong_are_refused(empty, change, words):
    write_shards(empty, change)
    refusal(lambda: cifar10(empty), *words)
    assert not decoded_files()


def test_parquet_that_cannot_be_read_is_refused(empty):
    write_shards(empty)
    path = empty / "train-00001-of-00002.parquet"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PAR1" + bytes(100) + b"PAR1"):
        path.write_bytes(content)
        refusal(lambda: cifar10(empty), path, "cannot be read as parquet")
    for columns in ({"image": "picture"}, {"column": "fine_label"}):
        write_parquet(path, [b""], [0], **columns)
        refusal(lambda: cifar10(empty), path, "`img`")
    path.unlink()
    path.mkdir()
    refusal(lambda: cifar10(empty), path, "not a regular file")


@pytest.mark.parametrize("module, package", [("pyarrow", "pyarrow"), ("PIL", "pillow")])
def test_without_the_extra_parquet_is_refused_with_the_line_that_installs_it(empty, monkeypatch, module, package):
    write_shards(empty)
    for name in [name for name in sys.modules if name.split(".")[0] == module] + [module]:
        monkeypatch.setitem(sys.modules, name, None)
    refusal(lambda: cifar10(empty), f"{package} is needed", 'pip install "jaxpar[images]"')
    assert re.search(r"(?m)^images = .*pyarrow.*pillow", (Path(__file__).parent.parent / "pyproject.toml").read_text())


IDX = struct.pack(">4I", 0x803, 2, 3, 3) + bytes(range(18))


@pytest.mark.parametrize(
    "data, word",
    [
        (gzip.compress(IDX[:-1]), "less than 18 bytes"),
        (gzip.compress(IDX + b"!"), "more than 18 bytes"),
        (gzip.compress(IDX[:10]), "begins with"),
        (gzip.compress(b"\0\0\x0d" + IDX[3:]), "begins with 00000d03"),
        (gzip.compress(IDX)[:-9], "cannot be unpacked"),
        (b"no gzip", "cannot be unpacked"),
    ],
    ids=["short", "long", "header", "type", "cut", "plain"],  # gzip writes the time of day
)
def test_idx_files_that_are_wrong_are_refused(data, word):
    assert idx(gzip.compress(IDX), (2, 3, 3)).tolist() == np.arange(18).reshape(2, 3, 3).tolist()
    with pytest.raises(ValueError, match=word):
        idx(data, (2, 3, 3))


def test_a_label_beyond_the_classes_of_mnist_is_refused(monkeypatch, tmp_path):
    whole = pictures.idx_files("mnist")
    labels = bytearray(gzip.decompress(whole["train-labels-idx1-ubyte.gz"]))
    labels[20] = 10
    whole["train-labels-idx1-ubyte.gz"] = gzip.compress(bytes(labels), mtime=0)
    monkeypatch.setattr(pictures, "idx_files", lambda name: whole)
    pictures.stand_in(monkeypatch, "mnist", tmp_path)
    refusal(lambda: pictures.module("mnist").mnist(batch=8, data_dir=str(tmp_path)), "train-labels", "the label 10")


# Waiting, and weight


def test_what_takes_long_says_how_long(capsys):
    now = [0.0]
    done = waiting.waiting("decoding", 100, "images", lambda: now[0])
    for count in range(1, 101):
        now[0] += 1
        done(count)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "decoding: 2 of 100 images, about 1:38 left"
    assert [int(line.split()[1]) for line in said] == [2, 4, 8, 16, 32, 62, 92]


def test_images_are_light():
    """Neither jax nor what decodes parquet is imported before it is needed."""
    code = (
        "import sys; from jaxpar.datasets.cifar10 import cifar10; from jaxpar.datasets.mnist import mnist;"
        "sys.exit(' '.join({'jax', 'pyarrow', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
