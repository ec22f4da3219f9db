"""What is known of the compilers whose memory is predicted: one table, a rule per field.

Each rule was found in what a compiler writes of itself: `--xla_dump_to` on CPUs, and for TPUs the buffer assignment of
steps compiled ahead of time (libtpu 0.0.42.1).
"""

from typing import NamedTuple

MIB = 2**20


class Rules(NamedTuple):
    """What a compiler does with a trace.

    Attributes:
        breadth: kernels are run breadth first, so that threads have work; else in the order of the trace.
        copies: an argument is copied if a result is written over it that does not come after all that reads it; else
            the compiler finds an order in which it does.
        filled: stacks that a loop fills are made first of all; else where the loop begins.
        summed: a sum over devices is written where its operand lies.
        rounded: products read bfloat16, whatever they are given: what only products read is kept in it, and an argument
            that a loop's products read is rounded before the loop.
        widened: what loops give in bfloat16 is kept in float32, as the processor computes in nothing less.
        products: what one product alone reads is computed in it, and what alone reads a product is computed with it.
        again: what is costly is computed again in each kernel that reads it, as what is cheap is.
        near: bytes of the memory beside the core, where short-lived blocks lie; they count as none. Of a v5e.
    """

    breadth: bool
    copies: bool
    filled: bool
    summed: bool
    rounded: bool
    widened: bool
    products: bool
    again: bool
    near: int


CPU = Rules(
    breadth=True,
    copies=True,
    filled=True,
    summed=True,
    rounded=False,
    widened=True,
    products=False,
    again=False,
    near=0,
)
TPU = Rules(
    breadth=False,
    copies=False,
    filled=False,
    summed=False,
    rounded=True,
    widened=False,
    products=True,
    again=True,
    near=112 * MIB,
)
RULES = {"cpu": CPU, "tpu": TPU}
