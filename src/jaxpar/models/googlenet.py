"""GoogLeNet: modules of four branches that are joined along the channels."""

from collections.abc import Callable
from functools import partial

from jaxpar.core.parts import chain, join
from jaxpar.core.refuse import Problem, Refused
from jaxpar.core.space import sides
from jaxpar.core.types import Layer
from jaxpar.layers.conv import conv
from jaxpar.layers.dense import activation as function_named
from jaxpar.layers.dropout import dropout as dropout_layer
from jaxpar.layers.embedding import head
from jaxpar.layers.normalized import normalized
from jaxpar.layers.pool import global_average, max_pool

# channels of 1 x 1; of 3 x 3 and what comes before it; of 5 x 5 and what comes before it; behind the pooling
MODULES = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
WIDTH = 64  # of the table
POOLED = ("3b", "4e")  # a largest of 3 x 3 with strides of 2 follows


def googlenet(
    *,
    example: tuple[int, ...],
    vocab: int,
    width: int = WIDTH,
    dropout: float = 0.4,
    norm: str = "none",
    activation: str = "relu",
) -> Layer:
    """From images `x[batch, height, width, channels]` to `logits[batch, vocab]`; without the two side classifiers.

    6,998,552 parameters for three channels and 1000 classes; with batch norm 7,005,832. What modules pass on is
    `embed`, what is inside a branch `channels`: reductions are up projections, the kernels behind them down
    projections, and the branches of 1 x 1 go across. Joining branches gathers channels where a plan splits them.

    Args:
        example: shape of one image, (height, width, channels), 32 pixels a side or more.
        vocab: number of classes.
        width: kernels of the first convolution, a multiple of 8; all others are in proportion.
        dropout: rate before the head.
        norm: a member of norms/, behind each convolution.
        activation: elementwise function after each norm.

    Raises:
        Refused: for a width that does not divide, and images that are too small.

    Source: Szegedy et al. 2014, arXiv:1409.4842, table 1, without its normalization over neighbours.
    """
    sides("googlenet", example, halvings=5, legal="images of 32 pixels a side or more; or lenet, resnet")
    if width % 8:
        rule = "must be a multiple of 8: all sizes of the table are multiples of an eighth of the first."
        raise Refused([Problem("model.width", width, rule, f"{width // 8 * 8 or 8} or {width // 8 * 8 + 8}")])
    part = partial(_conv, norm, function_named(activation))
    parts = {
        "conv_1": part(example[-1], width, "- embed", 7, strides=2, padding=3),
        "pool_1": max_pool(3, 2, "SAME"),
        "conv_2": part(width, width, "embed channels", 1),
        "conv_3": part(width, 3 * width, "channels embed", 3),
        "pool_2": max_pool(3, 2, "SAME"),
    }
    into = 3 * width
    for name, table in MODULES.items():
        sizes = [size * width // WIDTH for size in table]
        parts[f"module_{name}"] = _module(part, into, sizes)
        parts |= {f"pool_{name}": max_pool(3, 2, "SAME")} if name in POOLED else {}
        into = sizes[0] + sizes[2] + sizes[4] + sizes[5]
    parts |= {"pool": global_average(), "dropout": dropout_layer(dropout, "head"), "head": head(into, vocab, bias=True)}
    return chain(parts)


def _conv(norm: str, act: Callable, into: int, out: int, dims: str, window: int, *, outside=False, **how) -> Layer:
    """A convolution, its norm and the activation; `outside`: it is given the product itself, made with others."""
    made = conv(into, out, dims, window=window, **how)
    made = made._replace(apply=lambda params, extra, y, ctx: (y, extra)) if outside else made
    return normalized(made, norm, out, dims.split()[1], act)


def _module(part: Callable, into: int, sizes: list[int]) -> Layer:
    """Four branches, joined; `sizes` as in `MODULES`. The three products that read x itself fetch it together."""
    one, before_three, three, before_five, five, pooled = sizes
    first = {"one": (one, "embed embed"), "three": (before_three, "embed channels")}
    first |= {"five": (before_five, "embed channels")}
    starts = {name: part(into, out, dims, 1, outside=True) for name, (out, dims) in first.items()}
    branches = {
        "one": chain({"first": starts["one"]}),
        "three": chain({"first": starts["three"], "conv": part(before_three, three, "channels embed", 3)}),
        "five": chain({"first": starts["five"], "conv": part(before_five, five, "channels embed", 5)}),
        "pooled": chain({"pool": max_pool(3, 1, "SAME"), "conv": part(into, pooled, "embed embed", 1)}),
    }
    init, names = join(branches)

    def apply(params, extra, x, ctx):
        kernels = tuple(params[name]["first"]["product"]["kernel"] for name in first)
        products = ctx.conv(x, kernels, tuple(dims for _, dims in first.values()))
        given = dict(zip(first, products, strict=True)) | {"pooled": x}
        made = {name: branches[name].apply(params[name], extra[name], given[name], ctx) for name in branches}
        ys, new = ({name: pair[which] for name, pair in made.items()} for which in (0, 1))
        return ctx.concat([*ys.values()], "embed"), extra | new

    return Layer(init, apply, names)
