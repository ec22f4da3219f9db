"""Archives of somebody else, unpacked so that nothing lands outside the folder or grows beyond what was agreed."""

import bz2
import gzip
import io
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import IO, NamedTuple

from jaxpar.core.refuse import Problem, Refused

PIECE = 1 << 20
HEADERS = 8192  # bytes of a tar that are no content, per entry at most
PACKED = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ\0": lzma}  # by the bytes that a file begins with
UNREADABLE = (  # what tarfile and zipfile raise
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


class Member(NamedTuple):
    """An entry of an archive: its name as written there, whether it is a file, its size in bytes, how it is read."""

    name: str
    is_file: bool
    size: int
    entry: tarfile.TarInfo | zipfile.ZipInfo


def unpack(archive: Path, folder: Path, *, files: int, size: int) -> Path:
    """Unpack a tar (plain, gz, bz2, xz) or zip archive into `folder`, which must not be there yet.

    Everything is checked before anything is written: only plain files and folders, with relative names that stay inside
    and differ from each other. It is unpacked aside, without the rights, owners and times of the archive, and gets its
    name when all of it is there.

    Args:
        archive: of which the checksum is known to be right, if there is one.
        folder: to be made.
        files: entries that there may be at most.
        size: bytes that all files may have at most, unpacked.

    Raises:
        Refused: naming the entry and what is wrong with it, or the archive if it cannot be read; nothing is left.
    """
    if os.path.lexists(folder):
        raise _refusal(archive, f"{folder} is there already.")
    aside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        with _opened(archive, aside, size + HEADERS * (files + 1)) as opened:
            members = list(_checked(archive, opened, files, size))
            for member, path in members:
                _write(archive, opened, member, aside / "out" / path)
        (aside / "out").mkdir(exist_ok=True)
        os.rename(aside / "out", folder)
    except Refused:
        raise
    except UNREADABLE as error:
        raise _refusal(archive, f"cannot be unpacked: {error or type(error).__name__}.") from error
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def contents(archive: Path, data: bytes, names: Collection[str], *, files: int, size: int) -> dict[str, bytes]:
    """Some files of a tar archive (plain, gz, bz2, xz) that is held in memory, by name; nothing is written.

    All of it is checked as by `unpack`, also what is not asked for.

    Args:
        archive: what it is called in messages.
        data: all of it.
        names: of the files, with their folders, as written in the archive.
        files, size: as of `unpack`.

    Raises:
        Refused: as `unpack`, and if a file is not there.
    """
    try:
        plain, packed = io.BytesIO(data), _packed(data[:6])
        if packed:
            with packed.open(plain) as source:
                plain = io.BytesIO()
                _inflate(archive, source, plain, size + HEADERS * (files + 1))
            plain.seek(0)
        with tarfile.open(fileobj=plain, mode="r:") as opened:
            found = {}
            for member, path in list(_checked(archive, opened, files, size)):
                if member.is_file and str(path) in names:
                    with opened.extractfile(member.entry) as source:
                        _copy(archive, source, target := io.BytesIO(), member)
                    found[str(path)] = target.getvalue()
    except Refused:
        raise
    except UNREADABLE as error:
        raise _refusal(archive, f"cannot be unpacked: {error or type(error).__name__}.") from error
    if missing := [name for name in names if name not in found]:
        raise _refusal(archive, f"does not hold {', '.join(missing)}.")
    return found


def _opened(archive: Path, aside: Path, most: int) -> tarfile.TarFile | zipfile.ZipFile:
    """The archive; a compressed tar is first decompressed into `aside`, since `tarfile` reads headers of any size."""
    if zipfile.is_zipfile(archive):
        return zipfile.ZipFile(archive)
    with open(archive, "rb") as stream:
        begins = stream.read(6)
    packed = _packed(begins)
    if packed is None:
        return tarfile.open(archive, "r:")
    plain = aside / "plain.tar"
    with packed.open(archive) as source, open(plain, "xb") as target:
        _inflate(archive, source, target, most)
    return tarfile.open(plain, "r:")


def _packed(begins: bytes) -> ModuleType | None:
    """What decompresses a file that begins so."""
    return next((module for magic, module in PACKED.items() if begins.startswith(magic)), None)


def _inflate(archive: Path, source: IO[bytes], target: IO[bytes], most: int) -> None:
    while piece := source.read(PIECE):
        if target.tell() + len(piece) > most:
            raise _refusal(archive, f"is more than {most:,} bytes, decompressed.")
        target.write(piece)


def _checked(archive: Path, opened, files: int, size: int) -> Iterator[tuple[Member, PurePosixPath]]:
    """Each entry and where it goes.

    Raises:
        Refused: at the first that may not be.
    """
    seen, total = set(), 0
    for count, member in enumerate(_members(opened), 1):
        path = _inside(archive, member)
        key = unicodedata.normalize("NFC", str(path)).casefold()  # one file on some systems
        total += member.size
        if count > files:
            raise _refusal(archive, f"has more than {files:,} entries.")
        if total > size:
            raise _refusal(archive, f"is more than {size:,} bytes, unpacked.")
        if member.is_file and key in seen:
            raise _refusal(archive, f"has {member.name!r} twice.")
        seen.add(key)
        if path.parts:
            yield member, path


def _members(opened) -> Iterator[Member]:
    """Every entry; a zip says in the upper half of a number what kind of file it was under Unix."""
    if isinstance(opened, zipfile.ZipFile):
        for entry in opened.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16)
            plain = kind in (0, stat.S_IFREG, stat.S_IFDIR) and not entry.flag_bits & 1  # 1: encrypted
            yield Member(entry.orig_filename, plain and not entry.is_dir(), entry.file_size if plain else -1, entry)
        return
    for entry in opened:
        plain = entry.isfile() or entry.isdir()  # no links, devices or pipes; `isfile` is of sparse ones too
        yield Member(entry.name, entry.isfile(), entry.size if plain else -1, entry)


def _inside(archive: Path, member: Member) -> PurePosixPath:
    """Where an entry goes, relative to the folder.

    Raises:
        Refused: if that is outside, or it is no plain file or folder.
    """
    name, path = member.name, PurePosixPath(member.name)
    if member.size < 0:
        raise _refusal(archive, f"has {name!r}, which is no plain file or folder.")
    if path.is_absolute() or ".." in path.parts:
        raise _refusal(archive, f"has {name!r}, which leads outside.")
    if "\\" in name or ":" in name or not all(map(str.isprintable, name)) or len(name) > 1000:
        raise _refusal(archive, f"has {name[:80]!r}, which is no name that every system reads alike.")
    return path


def _write(archive: Path, opened, member: Member, path: Path) -> None:
    if not member.is_file:
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    is_zip = isinstance(opened, zipfile.ZipFile)
    with (
        opened.open(member.entry) if is_zip else opened.extractfile(member.entry) as source,
        open(path, "xb") as target,
    ):
        _copy(archive, source, target, member)


def _copy(archive: Path, source: IO[bytes], target: IO[bytes], member: Member) -> None:
    """As many bytes as the entry said; what an archive says of itself may be false."""
    left = member.size
    while piece := source.read(min(PIECE, left + 1)):
        left -= len(piece)
        if left < 0:
            break
        target.write(piece)
    if left:
        raise _refusal(archive, f"has {member.name!r}, which is not of the {member.size:,} bytes that it says.")


def _refusal(archive: Path, rule: str) -> Refused:
    return Refused([Problem("archive", archive, rule, "the archive as it was published")])
