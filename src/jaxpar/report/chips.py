"""What makers state of their chips, each figure with its source. A new chip is one row.

Figures are of one chip; jax may count each of its cores as a device (`Chip.cores`). None: not stated anywhere we know.
"""

from typing import NamedTuple

GIB = 2**30
ASSIGNED = "the most that buffer assignments of libtpu 0.0.42.1 were seen to take"
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # parts of a 4x4x4 cube; larger tori are of whole cubes
SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


class Chip(NamedTuple):
    """One chip.

    Attributes:
        name: the word that users write.
        kinds: how `device_kind` of jax may begin.
        flops: of dense matrix products per second, by dtype: `bf16`, `tf32`, `fp8`, `int8`.
        sparse: the same where two of four weights are zero, which training has no use for.
        memory: bytes of HBM.
        memory_rate: bytes per second from HBM.
        near: bytes beside each core in which the compiler lays arrays rather than in HBM.
        link: bytes per second through one link to another chip, one way.
        links: how many such links a chip has.
        torus: dims of the torus that the links form; 0 if they all lead to one switch.
        ring: from which length on a dim of the torus is closed to a ring; 4 stands for multiples of 4.
        shapes: tori that can be had; with `CUBES` also those whose dims are all multiples of 4. Empty for GPUs.
        most: chips that links join: of a pod, or around a switch.
        network: bytes per second that each chip's share of the network between slices or hosts carries, one way.
        host: bytes per second between a chip and the memory of its host, one way.
        clock: cycles per second of the core that the compiler's cycle counts are of.
        assumed: whether `clock` is our assumption, so that times serve to compare programs on this chip alone.
        cores: devices that jax counts for a chip.
        price: US dollars per hour, on demand.
        sources: who states it, by field; `*` for the rest.
    """

    name: str
    kinds: tuple[str, ...]
    flops: dict[str, float]
    sources: dict[str, str]
    sparse: dict[str, float] = {}  # noqa: RUF012 (never written to)
    memory: float | None = None
    memory_rate: float | None = None
    near: int = 0
    link: float | None = None
    links: int = 0
    torus: int = 0
    ring: int = 0
    shapes: tuple[str, ...] = ()
    most: int = 1
    network: float | None = None
    host: float | None = None
    clock: float | None = None
    assumed: bool = False
    cores: int = 1
    price: float | None = None

    def source(self, field: str) -> str:
        """Who states a figure."""
        return self.sources.get(field, self.sources["*"])


GOOGLE = "Google Cloud documentation, TPU "
BOOK = "Austin et al., How to Scale Your Model, "
PRICE = BOOK + "part 8, 2025-02"
PER_LINK = ", bidirectional bandwidth per chip over 2 x links"
PCIE = BOOK + "part 2: PCIe, 16 GB/s each way, on v6e 32"
DGX = BOOK + "part 12: DGX SuperPOD, one 400 Gbit/s NIC per GPU"

CHIPS = (
    Chip(
        name="v4",
        kinds=("TPU v4",),
        flops={"bf16": 275e12, "int8": 275e12},
        memory=32 * GIB,
        memory_rate=1.2e12,
        link=45e9,
        links=6,
        torus=3,
        ring=4,
        shapes=CUBES,
        most=4096,
        network=2.5e10 / 4,
        host=16e9,
        clock=1.05e9,
        sources={
            "host": PCIE,
            "*": GOOGLE + "v4",
            "link": BOOK + "part 2",
            "network": BOOK + "part 2: 2.5e10 per host of 4",
            "clock": "Jouppi et al. 2023, arXiv:2304.01433, table 4",
        },
    ),
    Chip(
        name="v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        flops={"bf16": 197e12, "int8": 393e12},
        memory=16 * GIB,
        memory_rate=0.819e12,
        link=400e9 / 8,
        links=4,
        torus=2,
        ring=16,
        shapes=SQUARES,
        most=256,
        network=6.4e12 / 8 / 256,
        host=16e9,
        clock=1.5e9,
        price=1.2,
        near=117_440_512,
        sources={
            "near": ASSIGNED,
            "host": PCIE,
            "*": GOOGLE + "v5e",
            "link": GOOGLE + "v5e" + PER_LINK,
            "network": GOOGLE + "v5e: 6.4 Tbit/s per pod of 256",
            "ring": BOOK + "part 2",
            "clock": BOOK + "part 2",
            "price": PRICE,
        },
    ),
    Chip(
        name="v5p",
        kinds=("TPU v5p", "TPU v5"),
        flops={"bf16": 459e12, "int8": 918e12},
        memory=95 * GIB,
        memory_rate=2.765e12,
        link=1200e9 / 12,
        links=6,
        torus=3,
        ring=4,
        shapes=CUBES,
        most=8960,
        network=50e9 / 8,
        host=16e9,
        clock=459e12 / (8 * 128**2 * 2),
        price=4.2,
        near=48_627_712,
        sources={
            "near": ASSIGNED,
            "host": PCIE,
            "*": GOOGLE + "v5p",
            "link": GOOGLE + "v5p" + PER_LINK,
            "clock": "follows from the peak: 8 units of 128 x 128 multiply and add in each cycle",
            "price": PRICE,
        },
    ),
    Chip(
        name="v6e",
        kinds=("TPU v6 lite", "TPU v6e"),
        flops={"bf16": 918e12, "int8": 1836e12},
        memory=32 * GIB,
        memory_rate=1.638e12,
        link=800e9 / 8,
        links=4,
        torus=2,
        ring=16,
        shapes=SQUARES,
        most=256,
        network=100e9 / 8,
        host=32e9,
        clock=1.75e9,
        assumed=True,
        near=96_837_632,
        sources={
            "*": GOOGLE + "v6e",
            "link": GOOGLE + "v6e" + PER_LINK,
            "clock": "assumed: as v5p",
            "host": PCIE,
            "near": ASSIGNED,
        },
    ),
    Chip(
        name="tpu7x",
        kinds=("TPU7x", "TPU7"),
        flops={"bf16": 2307e12, "fp8": 4614e12},
        memory=192 * GIB,
        memory_rate=7.38e12,
        link=1200e9 / 12,
        links=6,
        torus=3,
        ring=4,
        shapes=CUBES,
        most=9216,
        network=100e9 / 8,
        clock=2.2e9,
        assumed=True,
        cores=2,
        near=67_108_864,
        sources={"near": ASSIGNED, "*": GOOGLE + "7x", "link": GOOGLE + "7x" + PER_LINK, "clock": "assumed"},
    ),
    Chip(
        name="a100",
        kinds=("NVIDIA A100",),
        flops={"bf16": 312e12, "tf32": 156e12, "int8": 624e12},
        sparse={"bf16": 624e12, "tf32": 312e12, "int8": 1248e12},
        memory=80e9,
        memory_rate=2.039e12,
        link=25e9,
        links=12,
        most=8,
        network=200e9 / 8,
        host=64e9 / 2,
        sources={
            "*": "NVIDIA A100 datasheet, SXM 80GB",
            "link": BOOK + "part 12",
            "network": "NVIDIA DGX A100 datasheet, one 200 Gbit/s NIC per GPU",
        },
    ),
    Chip(
        name="h100_pcie",
        kinds=("NVIDIA H100 PCIe",),
        flops={"bf16": 756e12},
        sparse={"bf16": 1513e12},
        memory=80e9,
        memory_rate=2e12,
        host=128e9 / 2,
        sources={"*": "NVIDIA H100 datasheet"},
    ),
    Chip(
        name="h100_nvl",
        kinds=("NVIDIA H100 NVL",),
        flops={"bf16": 835e12},
        sparse={"bf16": 1671e12},
        memory=94e9,
        memory_rate=3.9e12,
        host=128e9 / 2,
        sources={"*": "NVIDIA H100 datasheet"},
    ),
    Chip(
        name="h100",
        kinds=("NVIDIA H100",),
        flops={"bf16": 989e12, "tf32": 494.5e12, "fp8": 1979e12, "int8": 1979e12},
        sparse={"bf16": 1979e12, "tf32": 989e12, "fp8": 3958e12, "int8": 3958e12},
        memory=80e9,
        memory_rate=3.35e12,
        link=25e9,
        links=18,
        most=8,
        network=400e9 / 8,
        host=128e9 / 2,
        price=10.8,
        sources={"*": "NVIDIA H100 datasheet, SXM", "network": DGX, "price": PRICE},
    ),
    Chip(
        name="h200",
        kinds=("NVIDIA H200",),
        flops={"bf16": 989e12, "tf32": 494.5e12, "fp8": 1979e12, "int8": 1979e12},
        sparse={"bf16": 1979e12, "tf32": 989e12, "fp8": 3958e12, "int8": 3958e12},
        memory=141e9,
        memory_rate=4.8e12,
        link=25e9,
        links=18,
        most=8,
        network=400e9 / 8,
        host=128e9 / 2,
        sources={"*": "NVIDIA H200 datasheet, SXM", "network": DGX},
    ),
    Chip(
        name="b200",
        kinds=("NVIDIA B200",),
        flops={"bf16": 2.25e15, "fp8": 4.5e15},
        sparse={"bf16": 4.5e15, "fp8": 9e15},
        memory=192e9,
        memory_rate=8e12,
        link=50e9,
        links=18,
        most=8,
        network=400e9 / 8,
        sources={"*": BOOK + "part 12", "sparse": "NVIDIA HGX B200 datasheet", "network": DGX},
    ),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip whose name `device_kind` of jax begins with, the longest name first; None for any other."""
    known = [(kind, chip) for chip in CHIPS for kind in chip.kinds if device_kind.startswith(kind)]
    return max(known, key=lambda one: len(one[0]))[1] if known else None


def named(name: str) -> Chip | None:
    """The chip that users call so."""
    return next((chip for chip in CHIPS if chip.name == name), None)


def peak(device_kind: str) -> float | None:
    """Dense bfloat16 flops per second of one device as jax counts them; None for a chip that is not in the table."""
    chip = chip_of(device_kind)
    return chip.flops["bf16"] / chip.cores if chip else None
