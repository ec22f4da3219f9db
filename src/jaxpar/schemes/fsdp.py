"""Fully sharded data parallelism: rows are split, weights are stored in parts and gathered before use."""

from jaxpar.core.scheme import Scheme


def fsdp(shards: int) -> Scheme:
    """Equals `three_d:Fx1x1`, and ZeRO stage 3 over one axis.

    Bytes per block of a transformer, forward, in elements per device: 12 h^2 (f-1)/f.

    Source: Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, section 5.3.
    """
    return Scheme(
        axes={"shard": shards},
        outer=(("shard",), ()),
        inner=(("shard",), ()),
        up=(("shard",), ()),
        down=(("shard",), ()),
    )
