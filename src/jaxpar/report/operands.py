"""In which dtype a compiled program multiplies: its products by the dtypes of their operands."""

import re
from collections import Counter
from typing import NamedTuple

from jaxpar.report.hlo_text import Instruction, arrays, parse

PRODUCTS = ("dot", "convolution")  # a TPU's compiler makes convolutions of products
LIBRARY = re.compile(r'custom_call_target="(__cublas[^"]*|__cudnn\$conv[^"]*)"')
SCOPE = re.compile(r'op_name="([^"]*)"')


class Product(NamedTuple):
    """One kind of product.

    Attributes:
        back: whether it is one of the backward pass.
        left, right: dtypes of the operands, as the program's text has them, such as `"f8e4m3fn"`.
        by: `"cublas"` or another library, `"triton"`, or `"compiler"`.
    """

    back: bool
    left: str
    right: str
    by: str


def products(text: str) -> Counter[Product]:
    """How many products of each kind stand in a compiled program, each counted once however often a loop runs it.

    Args:
        text: what `compiled.as_text()` returns, for CPUs, GPUs or TPUs.

    Raises:
        ValueError: if it is no compiled program.
    """
    found: Counter = Counter()
    for name, instructions in parse(text).computations.items():
        for one in instructions.values():
            library = LIBRARY.search(one.attributes) if one.op == "custom-call" else None
            if one.op in PRODUCTS or library:
                left, right = (arrays(instructions[operand].result)[0].dtype for operand in one.operands[:2])
                by = library[1] if library else "triton" if name.startswith("gemm_fusion") else "compiler"
                found[Product(_back(one), left, right, by)] += 1
    return found


def _back(one: Instruction) -> bool:
    scope = SCOPE.search(one.attributes)
    return bool(scope) and "transpose(" in scope[1]


def shown(found: Counter[Product]) -> list[str]:
    """One line for each kind, forward first."""
    return [
        f"{'backward' if one.back else 'forward':<10}{one.left + ' x ' + one.right:<24}{count:>4}  {one.by}"
        for one, count in sorted(found.items())
    ]
