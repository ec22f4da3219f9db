"""2.5-D tensor parallelism (Tesseract): layers of 2-D meshes, each with other rows and a copy of the weights."""

from jaxpar.core.scheme import Scheme


def two_half_d(depth: int, rows: int, columns: int) -> Scheme:
    """The depth axis splits rows only, so it acts as data parallelism around `two_d`.

    Bytes per block of a transformer, forward, in elements per device: [7 T h (c-1) / d + 12 h^2 (r-1)] / (r c); the
    gradients of a step are summed over `depth` besides.

    Source: Wang et al. 2021 (Tesseract), arXiv:2105.14500, section 3.
    """
    activation, weight = (("depth", "row"), ("column",)), (("row",), ("column",))
    axes = {"depth": depth, "row": rows, "column": columns}
    return Scheme(axes=axes, outer=activation, inner=activation, up=weight, down=weight)
