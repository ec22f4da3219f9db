"""What the machine has, asked of the system and not of jax: chips, who holds them, memory, room on the disk."""

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

GOOGLE = "0x1ae0"  # PCI vendor of TPUs
TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}  # its devices: v3 to v7x
CUDA_13_DRIVER = 580  # the first driver that runs programs for CUDA 13
FILES = re.compile(r"/dev/(accel\d|vfio/\d|nvidia\d)")  # open as long as a process holds a chip


class Chips(NamedTuple):
    """Accelerators that the system shows.

    Attributes:
        kind: `tpu` or `nvidia`.
        count: how many.
        extra: of jax that drives them, such as `tpu` or `cuda13`.
    """

    kind: str
    count: int
    extra: str


def chips(root: Path = Path("/")) -> Chips | None:
    """The accelerators of this machine; None if there are none, or none of which jaxpar knows the driver.

    Args:
        root: folder of the system, for tests.
    """
    tpus = [card for card in root.glob("sys/bus/pci/devices/*") if _is_tpu(card)]
    if tpus:
        return Chips("tpu", len(tpus), "tpu")
    cards = [path for path in root.glob("dev/nvidia*") if path.name.removeprefix("nvidia").isdecimal()]
    driver = re.search(r"(\d+)\.\d+", _text(root / "proc/driver/nvidia/version"))
    if not cards or not driver:
        return None
    return Chips("nvidia", len(cards), "cuda13" if int(driver[1]) >= CUDA_13_DRIVER else "cuda12")


def holders(root: Path = Path("/")) -> list[str]:
    """The other processes that hold a chip, as `4711 (python train.py)`; those of other users cannot be seen."""
    found = []
    for folder in root.glob("proc/[0-9]*"):
        if folder.name != str(os.getpid()) and any(FILES.match(_target(handle)) for handle in _entries(folder / "fd")):
            command = _text(folder / "cmdline").replace("\0", " ").strip() or "unknown"
            found.append(f"{folder.name} ({command[:60]})")
    return found


def memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """Bytes of the host that are free and that there are, no more than this process may have; None if unknown."""
    said = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE))
    if not {"MemAvailable", "MemTotal"} <= said.keys():
        return None
    free, total = (int(said[key]) * 1024 for key in ("MemAvailable", "MemTotal"))
    limit, used = (_text(root / "sys/fs/cgroup" / f"memory.{name}").strip() for name in ("max", "current"))
    if limit.isdecimal() and used.isdecimal() and int(limit) < total:
        free, total = min(free, int(limit) - int(used)), int(limit)
    return max(free, 0), total


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def room(folder: Path) -> tuple[int, Path]:
    """Free bytes where `folder` is or would be, and the nearest folder above it that is there."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free, there


def _is_tpu(card: Path) -> bool:
    return _text(card / "vendor").strip() == GOOGLE and _text(card / "device").strip() in TPUS


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # another user's, or gone
        return []


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""
