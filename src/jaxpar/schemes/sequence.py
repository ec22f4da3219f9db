"""1-D tensor parallelism whose outer activations are split along the sequence."""

from jaxpar.core.scheme import Scheme


def sequence(tensor: int) -> Scheme:
    """The all-reduce of `one_d` becomes a reduce-scatter and, before the next pair, an all-gather.

    The bytes are those of `one_d`; outer activations take 1/t of its memory.

    Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.
    """
    return Scheme(
        axes={"tensor": tensor},
        outer=(("tensor",), ()),
        inner=((), ("tensor",)),
        up=((), ("tensor",)),
        down=(("tensor",), ()),
        context=("tensor",),
    )
