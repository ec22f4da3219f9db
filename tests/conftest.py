"""Every test sees eight simulated CPU devices. Set up by environment variables, so that child processes do as well."""

import gc
import os
from importlib import metadata


def xla_flags(flags: str) -> str:
    """`flags` and those of ours that it does not set: a flag that a caller chose stays."""
    ours = {
        "--xla_force_host_platform_device_count": 8,
        "--xla_cpu_collective_call_terminate_timeout_seconds": 600,  # a busy machine is slow, not deadlocked
        "--xla_backend_optimization_level": 0,  # of LLVM only: the same program, compiled in a third of the time
    }
    if metadata.version("jaxlib").startswith("0.10."):  # later ones do not know it, and end the process
        # code of a fusion by LLVM alone: the same collectives, in half of the time that is left. Scatters become loops,
        # so a prediction of memory is compared with what is compiled without it (`harness.AS_USERS_DO`)
        ours["--xla_cpu_use_fusion_emitters"] = "false"
    return " ".join([flags, *(f"{flag}={value}" for flag, value in ours.items() if flag not in flags)]).strip()


def pytest_collection_finish():
    """Compile no program twice, and look for garbage less often: a trace is of many small objects that live on."""
    from compile_once import install  # not at the top: jax is imported after what is set below

    install()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


os.environ["XLA_FLAGS"] = xla_flags(os.environ.get("XLA_FLAGS", ""))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # numpy and scikit-learn; the cores belong to the simulated devices
os.environ.setdefault("MPLBACKEND", "Agg")
