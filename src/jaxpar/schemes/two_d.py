"""2-D tensor parallelism (SUMMA): every activation and every weight is split both ways."""

from jaxpar.core.scheme import Scheme


def two_d(rows: int, columns: int) -> Scheme:
    """Each product gathers its activation along a mesh row and its weight along a mesh column.

    Any r x c mesh will do, since blocks are gathered rather than sent round in a ring. Bytes per block of a
    transformer, forward, in elements per device: [7 T h (c-1) + 12 h^2 (r-1)] / (r c).

    Source: Xu et al. 2021 (Optimus), arXiv:2104.05343, section 3; van de Geijn and Watts 1997 (SUMMA).
    """
    whole = (("row",), ("column",))
    return Scheme(axes={"row": rows, "column": columns}, outer=whole, inner=whole, up=whole, down=whole)
