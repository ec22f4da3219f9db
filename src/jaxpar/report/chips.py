"""What makers state of their chips. A new chip is one row.

Columns: how jax names it; peak of dense bfloat16 matrix products, in 1e12 flops per second; where it is stated.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One device as jax counts them: `kind` is how `device_kind` begins, `bf16` in 1e12 flops per second, dense."""

    kind: str
    bf16: float
    source: str


CHIPS = (
    Chip("TPU v4", 275, "Google Cloud documentation, TPU v4"),
    Chip("TPU v5 lite", 197, "Google Cloud documentation, TPU v5e"),
    Chip("TPU v5e", 197, "Google Cloud documentation, TPU v5e"),
    Chip("TPU v5", 459, "Google Cloud documentation, TPU v5p"),
    Chip("TPU v6 lite", 918, "Google Cloud documentation, TPU v6e"),
    Chip("TPU v6e", 918, "Google Cloud documentation, TPU v6e"),
    Chip("NVIDIA A100", 312, "NVIDIA A100 datasheet"),
    Chip("NVIDIA H100 PCIe", 756, "NVIDIA H100 datasheet, without sparsity"),
    Chip("NVIDIA H100 NVL", 835, "NVIDIA H100 datasheet, without sparsity"),
    Chip("NVIDIA H100", 989, "NVIDIA H100 datasheet, SXM, without sparsity"),
    Chip("NVIDIA H200", 989, "NVIDIA H200 datasheet, SXM, without sparsity"),
)


def peak(device_kind: str) -> float | None:
    """Dense bfloat16 flops per second of the first chip whose name `device_kind` begins with; None for any other."""
    return next((chip.bf16 * 1e12 for chip in CHIPS if device_kind.startswith(chip.kind)), None)
