"""Look at versions, devices, memory and data; each problem with its fix.

python -m jaxpar doctor
python -c "import jaxpar; jaxpar.doctor()"
"""

import os
import platform
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, NamedTuple

from tyro.conf import arg

from jaxpar import cli
from jaxpar.core import family, files
from jaxpar.report import machine

OPEN_S = 120  # to open all devices; a chip that somebody else holds may never answer
LEAST = 1 << 30  # bytes: below this a run is likely to end for want of memory or disk
PYTHON = (3, 11)
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")  # drivers of accelerators for jax


class Line(NamedTuple):
    """What was found, and, if that is a problem, the one thing that mends it."""

    text: str
    fix: str = ""


def doctor(argv: Sequence[str] = ()) -> int | None:
    """Print what jaxpar stands on; lines begin with `ok` or `fix`.

    Returns:
        1 if something needs fixing.
    """
    return cli.flags(_told, argv, __doc__)


def _told(runs_dir: Annotated[str, arg(help="folder of all runs.")] = "runs") -> int | None:
    broken = 0
    for line in checks(Path(os.path.expanduser(runs_dir))):
        broken += bool(line.fix)
        print(f"fix  {line.text}: {line.fix}" if line.fix else f"ok   {line.text}", flush=True)
    print("all is well" if not broken else f"{broken} to fix: do what stands after the colon, then run this again")
    return 1 if broken else None


def checks(runs_dir: Path) -> Iterator[Line]:
    """All lines, as they are found."""
    yield python()
    yield from packages(_requirements("jaxpar"))
    yield from jax_parts()
    yield from devices()
    yield host()
    yield disk(runs_dir)
    yield compile_cache()
    yield from data()


def python() -> Line:
    """The version of Python."""
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return Line(text, "" if sys.version_info >= PYTHON else "install Python 3.11 or newer")


def packages(requirements: Sequence[str]) -> Iterator[Line]:
    """Each requirement, such as `optax>=0.2.5`, against what is installed."""
    found = []
    for requirement in requirements:
        name, bounds = re.match(r"([\w.-]+)\s*(.*)", requirement).groups()
        version = _version(name)
        if version is None:
            yield Line(f"{name} is not installed", f'pip install "{name}{bounds}"')
        elif not all(_within(version, bound) for bound in filter(None, bounds.split(","))):
            yield Line(f"{name} {version} is not {bounds}", f'pip install "{name}{bounds}"')
        else:
            found.append(f"{name} {version}")
    yield Line(", ".join([f"jaxpar {_version('jaxpar') or 'from a folder'}", *found]))


def jax_parts() -> Iterator[Line]:
    """What must be of one version with jax: jaxlib, and the drivers of TPUs and GPUs."""
    jax, jaxlib = _version("jax"), _version("jaxlib")
    if not jax or not jaxlib:
        yield Line("jax or jaxlib is not installed", 'pip install "jax>=0.10,<0.13"')
        return
    if _numbers(jax)[:3] != _numbers(jaxlib)[:3]:
        yield Line(f"jax is {jax} and jaxlib {jaxlib}", f'pip install "jax=={jax}" "jaxlib=={jax}"')
    imported = getattr(sys.modules.get("jax"), "__version__", jax)
    if imported != jax:
        yield Line(f"jax {jax} is installed, but {imported} is imported", "restart Python (Runtime > Restart session)")
    plugins = _plugins()
    for name in plugins:
        extra = "tpu" if name == "libtpu" else name.split("-")[1]
        wanted = f"=={_libtpu()}" if name == "libtpu" else f"=={jax}"
        if not _within(_version(name), wanted):
            yield Line(f"{name} {_version(name)} is not the one of jax {jax}", f'pip install "jax[{extra}]=={jax}"')
    there = [f"{name} {_version(name)}" for name in plugins]
    yield Line(f"jaxlib {jaxlib}, {', '.join(there) or 'no driver of an accelerator, so CPU only'}")
    chips = machine.chips()
    if chips and not any(chips.extra[:4] in name for name in plugins):
        what = f"{chips.count} {chips.kind} chips that jax has no driver for"
        yield Line(f"this machine has {what}", f'pip install "jax[{chips.extra}]=={jax}", then restart Python')


def devices() -> Iterator[Line]:
    """What jax can compute on; opened in a thread, since a chip that is in use may keep us waiting for ever."""
    found = []

    def opened():
        try:
            import jax

            found.extend(jax.devices())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=opened, daemon=True)
    thread.start()
    thread.join(OPEN_S)
    if not found or isinstance(found[-1], Exception):
        why = str(found[-1]).partition("\n")[0] if found else f"no answer in {OPEN_S} s"
        others = machine.holders()
        mend = f"end process {', '.join(others)}; or set" if others else "restart this machine or runtime; or set"
        yield Line(f"the devices cannot be opened ({why})", f"{mend} JAX_PLATFORMS=cpu")
        return
    first = found[0]
    sizes = getattr(first, "memory_stats", dict)() or {}
    memory = f", {sizes['bytes_limit'] / 2**30:.1f} GiB each" if "bytes_limit" in sizes else ""
    count = f"{len(found)} device{'s' * (len(found) > 1)}"
    yield Line(f"{count} of platform {first.platform}: {first.device_kind}{memory}")
    chips, chosen = machine.chips(), os.environ.get("JAX_PLATFORMS", "")
    if chips and first.platform == "cpu":
        what = f"{chips.count} {chips.kind} chips are left alone"
        if "cpu" in chosen:
            yield Line(f"{what}, as JAX_PLATFORMS={chosen} says")
        elif any(name in _plugins() for name in PLUGINS if chips.extra[:4] in name):
            asked = "tpu" if chips.kind == "tpu" else "cuda"
            yield Line(f"{what}, although their driver is installed", f"JAX_PLATFORMS={asked} jaxpar doctor says why")


def host() -> Line:
    """Memory and cores."""
    sizes = machine.memory()
    cores = f"{machine.cores()} cores"
    if sizes is None:
        return Line(f"{cores}; this system does not say how much memory is free")
    text = f"{cores}, {sizes[0] / 2**30:.1f} of {sizes[1] / 2**30:.1f} GiB of memory free"
    return Line(text, "" if sizes[0] >= LEAST else "end other programs, or take a machine with more memory")


def disk(runs_dir: Path) -> Line:
    """Room for runs."""
    try:
        free, there = machine.room(runs_dir)
    except OSError as error:
        return Line(f"the disk of {runs_dir} cannot be read ({error.strerror})", "name another folder by --runs-dir")
    text = f"{free / 2**30:.1f} GiB free for runs in {runs_dir}"
    if not os.access(there, os.W_OK):
        return Line(f"{there}, for runs, is not writable", "name a folder of yours by --runs-dir")
    return Line(text, "" if free >= LEAST else "delete runs, or name a folder on another disk by --runs-dir")


def compile_cache() -> Line:
    """Where compiled programs are kept."""
    try:
        import jax

        from jaxpar.train.cache import use_cache
    except Exception as error:
        return Line(f"jax cannot be imported ({str(error).partition(chr(10))[0]})", 'pip install -U "jax>=0.10,<0.13"')
    if warning := use_cache():
        return Line(warning.replace(":", ","), "set XDG_CACHE_HOME to a folder of yours")
    folder = Path(jax.config.jax_compilation_cache_dir or os.environ["JAX_COMPILATION_CACHE_DIR"])
    programs = [path.stat().st_size for path in folder.glob("*-cache")] if folder.is_dir() else []
    return Line(f"compile cache {_short(folder)}: {len(programs)} programs, {sum(programs) / 1e6:.0f} MB")


def data() -> Iterator[Line]:
    """Which datasets are there."""
    folder, away = files.cache_folder(), "off, as JAXPAR_OFFLINE says" if files.offline() else "on"
    here, missing = [], []
    for name in family.names("datasets"):
        found = [files.fault(file, folder) for file in family.constant(family.pick("datasets", name), "FILES", ())]
        for wrong in filter(None, found):
            yield Line(f"data: {name}: {wrong.rstrip('.')}", f"rm that file, then python -m jaxpar data get {name}")
        (missing if None in found else here).append(name)
    lacking = f"; not yet downloaded: {', '.join(missing)}" if missing else ""
    yield Line(f"data {_short(folder)}: {', '.join(here)} are here{lacking}; downloads are {away}")


def _requirements(package: str) -> list[str]:
    """What `package` needs, without extras; nothing if it is not installed."""
    try:
        return [needed for needed in metadata.requires(package) or [] if "extra" not in needed]
    except metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _plugins() -> list[str]:
    return [name for name in PLUGINS if _version(name)]


def _libtpu() -> str:
    """The version of libtpu that the installed jax asks for, such as `0.0.42.*`."""
    asked = re.search(r"libtpu==([\d.*]+)", " ".join(metadata.requires("jax") or []))
    return asked[1] if asked else "*"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", re.match(r"[\d.]*", version)[0])))


def _within(version: str, bound: str) -> bool:
    """Whether `version` keeps a bound such as `>=0.10`, `<0.13` or `==0.0.42.*`."""
    sign, limit = re.match(r"([<>=!]*)(.*)", bound.strip()).groups()
    here, there = _numbers(version), _numbers(limit)
    if sign == "==":
        return here[: len(there)] == there
    return {">=": here >= there, "<": here < there, ">": here > there, "<=": here <= there}.get(sign, True)


def _short(folder: Path) -> str:
    return str(folder).replace(str(Path.home()), "~", 1)
