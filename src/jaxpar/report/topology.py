"""Devices that are only described: what a word such as `v5e:4x4*2` or `h100:1x8x8` stands for, to compile for it.

Nothing of a described device is opened, so a program for thousands of them compiles on a laptop that has none.
"""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.experimental import topologies

from jaxpar.core.refuse import Problem, Refused, near_miss
from jaxpar.report import chips
from jaxpar.report.chips import Chip

# what libtpu would otherwise ask a metadata server for, or write below /tmp
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nobody else is to wait for what opens no chip
}
EXTRAS = {"tpu": ("aot-tpu", ("libtpu",)), "cuda": ("aot-cuda12", ("jax_cuda12_plugin", "jax_cuda13_plugin"))}
# How XLA describes a Hopper GPU; without a runtime version it refuses (openxla/xla issue 25910). No tuning on the GPU.
HOPPER = """gpu_device_info {
  cuda_compute_capability { major: 9 }  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  threads_per_warp: 32
  threads_per_block_limit: 1024  threads_per_core_limit: 2048  registers_per_core_limit: 65536
  registers_per_block_limit: 65536  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448  l2_cache_size: 52428800
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: %(memory_rate)d  device_memory_size: %(memory)d
}
platform_name: "CUDA"  device_description_str: "%(kind)s"
dnn_version_info { major: 9 minor: 8 }  runtime_version { major: 12 minor: 9 }
"""
UNTUNED = {"xla_gpu_autotune_level": "0"}
TARGETS = ("h100", "h200")


class Topology(NamedTuple):
    """A set of devices that need not be there.

    Attributes:
        word: as the user wrote it.
        chip: what they are.
        shape: chips of one slice, by dim of the torus; of GPUs (hosts, GPUs of each).
        slices: sets that only a network joins.
    """

    word: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def platform(self) -> str:
        """`tpu` or `cuda`."""
        return "tpu" if self.chip.torus else "cuda"

    @property
    def chips(self) -> int:
        """How many chips, over all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def count(self) -> int:
        """How many devices as jax counts them."""
        return self.chips * self.chip.cores

    @property
    def memory(self) -> float:
        """Bytes that one device has."""
        return self.chip.memory / self.chip.cores


def parse(word: str) -> Topology:
    """What a topology's word stands for: `chip:AxB*slices` for TPUs, `chip:slices x hosts x gpus` for GPUs.

    Raises:
        Refused: for a chip that is not in the table or cannot be compiled for, and for a shape it is not sold in.
    """
    form = re.fullmatch(r"([a-z]\w*):(\d+(?:x\d+)*)(?:\*(\d+))?", word.strip().lower())
    if not form:
        raise _refused(word, "is no topology.", "such as v5e:4x4, v5p:4x4x4, v5e:4x4*2 (slices) or h100:1x8x8")
    legal = [chip.name for chip in chips.CHIPS if chip.torus or chip.name in TARGETS]
    if form[1] not in legal:
        raise _refused(word, f"there is no chip {form[1]} to compile for.", near_miss(form[1], legal))
    chip, dims = chips.named(form[1]), tuple(map(int, form[2].split("x")))
    if not chip.torus:
        slices, *shape = dims if len(dims) == 3 and form[3] is None else (0, 0, 0)
        if slices < 1 or shape[0] < 1 or shape[1] not in (1, 2, 4, 8):
            rule = f"{chip.name} takes slices x hosts x GPUs of a host."
            raise _refused(word, rule, f"{chip.name}:1x1x8, {chip.name}:1x8x8; 1, 2, 4 or 8 GPUs of a host")
        return Topology(word, chip, tuple(shape), slices)
    cubes = len(dims) == 3 and all(dim and dim % 4 == 0 for dim in dims) and math.prod(dims) <= chip.most
    if not (form[2] in chip.shapes or (chip.torus == 3 and cubes)) or form[3] == "0":
        larger = f", or three multiples of 4 with up to {chip.most} chips" if chip.torus == 3 else ""
        rule = f"{chip.name} has no slice of this shape." if form[3] != "0" else "needs a slice or more."
        raise _refused(word, rule, f"{', '.join(f'{chip.name}:{one}' for one in chip.shapes)}{larger}; *2 for 2 slices")
    return Topology(word, chip, dims, int(form[3] or 1))


def devices(topology: Topology) -> list[jax.Device]:
    """The devices of a topology, to make a mesh of and compile for; they hold nothing and run nothing.

    Raises:
        Refused: if the compiler for them is not installed, or does not know this topology.
    """
    extra, packages = EXTRAS[topology.platform]
    if not any(map(importlib.util.find_spec, packages)):
        rule = f"needs the compiler for {topology.chip.name}, which is not installed."
        raise _refused(topology.word, rule, f"pip install 'jaxpar[{extra}]'")
    try:
        with _quiet():
            return topologies.get_topology_desc(**_asked(topology)).devices
    except NotImplementedError as error:  # of RuntimeErrors: jax has looked for a GPU here, and given the plugin up
        rule = f"jax has set the compiler for {topology.chip.name} aside."
        raise _refused(topology.word, rule, "the same with JAX_PLATFORMS=cpu in the environment") from error
    except RuntimeError as error:
        raise _refused(topology.word, f"the compiler says: {str(error).splitlines()[0]}", "another shape") from error


def compiler_options(topology: Topology) -> dict[str, str]:
    """What to compile for these devices with: nothing can be tried out on a GPU that is not there."""
    return UNTUNED if topology.platform == "cuda" else {}


def _asked(topology: Topology) -> dict:
    """The arguments of `get_topology_desc`."""
    chip, shape = topology.chip, "x".join(map(str, topology.shape))
    if topology.platform == "cuda":
        figures = {"memory": chip.memory, "memory_rate": chip.memory_rate, "kind": chip.kinds[0]}
        return {"platform": "cuda", "topology": f"{topology.slices}x{shape}", "target_config": HOPPER % figures}
    asked = {"platform": "tpu", "topology_name": f"{chip.name}:{shape}"}
    if topology.slices > 1:
        asked["num_slices"] = topology.slices
    if chip.name == "v4":
        asked["chip_config_name"] = "megacore"  # else jax would count its two cores
    if math.prod(topology.shape) == 1:
        asked["chips_per_host_bounds"] = (1, 1, 1)
    return asked


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither network nor log files nor warnings of libtpu; what the user has set stays, and is put back."""
    before = {name: os.environ.get(name) for name in QUIET}
    os.environ.update({name: value for name, value in QUIET.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def _refused(word: str, rule: str, legal: str) -> Refused:
    return Refused([Problem("topology", word, rule, legal)])
