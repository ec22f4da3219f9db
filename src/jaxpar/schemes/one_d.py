"""1-D tensor parallelism: up projections split by column, down projections by row."""

from jaxpar.core.scheme import Scheme


def one_d(tensor: int) -> Scheme:
    """Outer activations are copies on every device; one all-reduce ends each pair of projections.

    Bytes per block of a transformer, forward, in elements per device: 4 (t-1)/t T h, for T rows of width h.

    Source: Shoeybi et al. 2019 (Megatron-LM), arXiv:1909.08053, section 3.
    """
    return Scheme(
        axes={"tensor": tensor},
        outer=((), ()),
        inner=((), ("tensor",)),
        up=((), ("tensor",)),
        down=(("tensor",), ()),
    )
