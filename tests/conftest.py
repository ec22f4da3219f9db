"""Every test sees eight simulated CPU devices. Set up by environment variables, so that child processes do as well."""

import os
import time
from contextlib import suppress
from pathlib import Path

CACHE_DAYS = 14


def _xla_flags(flags: str) -> str:
    """`flags` and those of ours that it does not set: a flag that a caller chose stays."""
    ours = {
        "--xla_force_host_platform_device_count": 8,
        "--xla_cpu_collective_call_terminate_timeout_seconds": 600,  # a busy machine is slow, not deadlocked
        "--xla_backend_optimization_level": 0,  # of LLVM only: the same program, compiled in a third of the time
    }
    return " ".join([flags, *(f"{flag}={value}" for flag, value in ours.items() if flag not in flags)]).strip()


def _compile_cache() -> str:
    """A folder for compiled programs, private since what lies there is executed; empty if there can be none."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "jaxpar" / "tests"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)  # also refuses a folder of somebody else's
    except (OSError, RuntimeError):
        return ""
    for program in folder.iterdir():
        with suppress(OSError):  # another test process may have been faster
            if program.stat().st_mtime < time.time() - CACHE_DAYS * 86400:
                program.unlink()
    return str(folder)


os.environ["XLA_FLAGS"] = _xla_flags(os.environ.get("XLA_FLAGS", ""))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ and (cache := _compile_cache()):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # numpy and scikit-learn; the cores belong to the simulated devices
os.environ.setdefault("MPLBACKEND", "Agg")
