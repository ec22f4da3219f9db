"""Floating-point operations of matrix products and convolutions, read from the instructions of a compiled program."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from jaxpar.report.hlo_text import Instruction, Program, called, dims

_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_SUMMED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([\d,"]*)[\]}]')
_LIBRARY = re.compile(r'custom_call_target="[^"]*(blas|gemm|matmul|conv)', re.IGNORECASE)
_WINDOW = re.compile(r"window=\{([^}]*)\}")


class Work(NamedTuple):
    """What is computed.

    Attributes:
        flops: a multiplication and an addition count two.
        unknown: one sentence for each product whose size could not be read.
    """

    flops: float
    unknown: tuple[str, ...] = ()


def inside(program: Program) -> dict[str, Work]:
    """Of each computation: what it computes when it runs once, fusions and calls within it too, loops and branches not.

    Loops and branches are left to who knows how often they run.
    """
    found: dict[str, Work] = {}

    def of(name: str) -> Work:
        if name not in found:
            parts = [work(program, name, each, of) for each in program.computations[name].values()]
            unknown = tuple(doubt for part in parts for doubt in part.unknown)
            found[name] = Work(sum(part.flops for part in parts), unknown)
        return found[name]

    for name in program.computations:
        of(name)
    return found


def work(program: Program, computation: str, each: Instruction, of: Callable[[str], Work]) -> Work:
    """What one instruction computes; `of(name)` is asked for the computations that a fusion or call runs."""
    library = each.op == "custom-call" and _LIBRARY.search(each.attributes)
    if each.op in ("dot", "convolution") or library:
        shapes = [_shape(program, computation, name) for name in each.operands[:2]]
        count = (_convolution if each.op == "convolution" else _dot)(each, dims(each.result), *shapes)
        if count is None:
            return Work(0.0, (f"{each.op} {each.name}: its size could not be read; not counted.",))
        return Work(float(count))
    if each.op in ("fusion", "call", "async-start"):
        parts = [of(name) for name in called(each, "calls", "to_apply")]
        return Work(sum(part.flops for part in parts), tuple(doubt for part in parts for doubt in part.unknown))
    return Work(0.0)


def _shape(program: Program, computation: str, name: str) -> tuple[int, ...] | None:
    known = program.computations[computation].get(name)
    return dims(known.result) if known else None


def _dot(each: Instruction, out, left, right) -> int | None:
    summed = _SUMMED.search(each.attributes)
    if None in (out, left) or not summed:
        return None
    return 2 * math.prod(out) * math.prod(left[int(dim)] for dim in re.findall(r"\d+", summed[1]))


def _convolution(each: Instruction, out, left, right) -> int | None:
    """Products with padding are not computed: TPUs write matrix products as windows that lie mostly outside.

    Source: the definition of convolution in XLA's operation semantics.
    """
    labels = _LABELS.search(each.attributes)
    if None in (out, left, right) or not labels:
        return None
    inputs, kernel, outputs = labels.groups()
    spatial = sorted(letter for letter in inputs if letter.isdigit())
    settings = _window(each, len(spatial))
    places = 1
    for number, letter in enumerate(spatial):
        sizes = left[inputs.index(letter)], right[kernel.index(letter)], out[outputs.index(letter)]
        places *= _places(*sizes, *(setting[number] for setting in settings))
    groups = re.search(r"batch_group_count=(\d+)", each.attributes)
    batch = left[inputs.index("b")] // (int(groups[1]) if groups else 1)
    return 2 * batch * right[kernel.index("i")] * right[kernel.index("o")] * places


def _window(each: Instruction, count: int) -> tuple[list[int], ...]:
    """Stride, padding before, dilation of the input and of the kernel, by spatial dim."""
    written = _WINDOW.search(each.attributes)
    text = written[1] if written else ""

    def read(key: str, default: int) -> list[int]:
        found = re.search(rf"\b{key}=([\d_x\-]+)", text)
        return [int(one.split("_")[0]) for one in found[1].split("x")] if found else [default] * count

    return read("stride", 1), read("pad", 0), read("lhs_dilate", 1), read("rhs_dilate", 1)


def _places(size: int, kernel: int, out: int, stride: int, pad: int, dilation: int, spread: int) -> int:
    """How often an entry of the kernel meets an entry of the input, and neither padding nor the gaps of a dilation."""
    met, period = 0, dilation // math.gcd(stride, dilation)
    for entry in range(kernel):
        first = entry * spread - pad  # where it lies in the dilated input, at place 0 of the output
        low, high = max(0, -(first // stride)), min(out - 1, ((size - 1) * dilation - first) // stride)
        start = next((one for one in range(low, low + period) if (first + stride * one) % dilation == 0), high + 1)
        met += max(0, (high - start) // period + 1)
    return met
