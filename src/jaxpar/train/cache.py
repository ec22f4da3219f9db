"""Compiled programs, kept from one run to the next."""

import os
import time
from contextlib import suppress
from pathlib import Path

import jax

MIN_COMPILE_S = 0.5  # faster ones are not worth a file; every step of a model is above
DAYS = 30  # a program that old is compiled again


def use_cache() -> str:
    """Keep compiled programs in `$XDG_CACHE_HOME/jaxpar/xla`, by default `~/.cache/jaxpar/xla`, of this user alone.

    What lies there is executed, so it must belong to this user and be closed to all others. A cache that the caller has
    chosen, by jax's own settings, stays. Programs over several CPU devices are in none (`core.compat`).

    Returns:
        Empty if all is well; else, in one line, why there is no cache: a reason to be slower, never to stop.
    """
    if jax.config.jax_compilation_cache_dir or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return ""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "jaxpar", "xla")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.name == "posix" and folder.stat().st_uid != os.getuid():
            raise PermissionError(1, "it belongs to another user")
        folder.chmod(0o700)
        if not os.access(folder, os.W_OK):
            raise PermissionError(1, "it is not writable")
        _forget_old(folder)
    except OSError as error:
        return f"no compile cache in {folder}, so every start compiles anew: {error.strerror or error}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_S)
    return ""


def _forget_old(folder: Path) -> None:
    oldest = time.time() - DAYS * 86400
    for program in folder.iterdir():
        with suppress(OSError):  # another process may have been faster
            if program.is_file() and program.stat().st_mtime < oldest:
                program.unlink()
