"""3-D tensor parallelism: rows, contraction and output of every product lie on an axis of their own."""

from jaxpar.core.scheme import Scheme


def three_d(i: int, j: int, k: int) -> Scheme:
    """Up and down projections swap the parts of `j` and `k`, so that a pair ends in the layout where it began.

    Any i x j x k mesh will do: 1xTx1 is `sequence` with its rows on the batch, Fx1x1 is `fsdp`, and 1xBxC is the 2-D
    weight-stationary layout of Pope et al. 2022.
    Bytes per block of a transformer, forward, in elements per device:
    [4 T h (j-1) + 12 h^2 (i-1) + 12 T h (k-1)] / (i j k).

    Source: Bian et al. 2021, arXiv:2105.14450, section 3; Agarwal et al. 1995.
    """
    return Scheme(
        axes={"i": i, "j": j, "k": k},
        outer=(("i", "j"), ("k",)),
        inner=(("i", "k"), ("j",)),
        up=(("k", "i"), ("j",)),
        down=(("j", "i"), ("k",)),
    )
