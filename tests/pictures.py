"""Tiny stand-ins for the datasets of images, in the formats in which they are published, with their sizes pinned."""

import gzip
import hashlib
import importlib
import io
import struct
import tarfile

import numpy as np

COUNTS = 320, 64
NAMES = "cifar10", "cifar100", "fashion_mnist", "mnist"


def module(name):
    return importlib.import_module(f"jaxpar.datasets.{name}")


def cifar_arrays(name, seed=0):
    """Pixels and labels of both splits."""
    rng, classes = np.random.default_rng(seed), module(name).KIND.classes
    return [
        (rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, classes, n).astype(np.uint8)) for n in COUNTS
    ]


def cifar_files(name):
    """Content of each binary file, by name."""
    kind, found = module(name).KIND, {}
    for names, (pixels, labels) in zip(kind.files, cifar_arrays(name), strict=True):
        planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        coarse = np.zeros((len(pixels), kind.heading - 1), np.uint8)
        table = np.concatenate([coarse, labels[:, None], planes], 1)
        found |= {one: part.tobytes() for one, part in zip(names, np.split(table, len(names)), strict=True)}
    return found


def tar(files, links=()):
    """A tar.gz of these files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for name in links:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, "batches.meta.txt"
            archive.addfile(entry)
    return packed.getvalue()


def cifar_archive(name):
    kind = module(name).KIND
    return tar({f"{kind.folder}/{one}": data for one, data in cifar_files(name).items()} | {"batches.meta.txt": b""})


def idx_files(name):
    """Content of the four files, by their published names."""
    rng, found = np.random.default_rng(1), {}
    for split, count in zip(("train", "t10k"), COUNTS, strict=True):
        arrays = {
            "images-idx3": rng.integers(0, 256, (count, 28, 28), np.uint8),
            "labels-idx1": rng.integers(0, 10, count).astype(np.uint8),
        }
        for kind, array in arrays.items():
            header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
            found[f"{split}-{kind}-ubyte.gz"] = gzip.compress(header + array.tobytes(), mtime=0)
    return found


def pinned(file, data):
    return file._replace(size=len(data), checksum=f"sha256:{hashlib.sha256(data).hexdigest()}")


def stand_in(monkeypatch, name, folder):
    """Write the tiny dataset into `folder`, and let its member expect that."""
    member = module(name)
    folder.mkdir(parents=True, exist_ok=True)
    if "cifar" in name:
        archive = cifar_archive(name)
        monkeypatch.setattr(member, "FILES", (pinned(member.FILES[0], archive),))
        monkeypatch.setattr(member, "KIND", member.KIND._replace(file=member.FILES[0], counts=COUNTS))
        (folder / member.FILES[0].names[0]).write_bytes(archive)
        return
    contents = idx_files(name)
    monkeypatch.setattr(member, "COUNTS", COUNTS)
    monkeypatch.setattr(member, "FILES", tuple(pinned(file, contents[file.names[1]]) for file in member.FILES))
    for file in member.FILES:
        (folder / file.names[0]).write_bytes(contents[file.names[1]])
