"""Residual networks, for small images and for those of ImageNet."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp

from jaxpar.core.parts import chain, function, parallel, residual
from jaxpar.core.refuse import Problem, Refused
from jaxpar.core.space import sides
from jaxpar.core.types import Layer
from jaxpar.layers.conv import conv
from jaxpar.layers.dense import activation as function_named
from jaxpar.layers.embedding import head
from jaxpar.layers.normalized import normalized
from jaxpar.layers.pool import global_average, max_pool
from jaxpar.layers.stack import stack

# blocks at each size of the map, and whether they are bottlenecks, by the number of layers that have weights
IMAGENET = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
LARGE = 64  # pixels a side: from here on numbers of layers that both forms have mean that of ImageNet
LEGAL = "6 n + 2, such as 20, 32, 44, 56 and 110; or 18, 34, 50, 101, 152"


def resnet(
    *,
    example: tuple[int, ...],
    vocab: int,
    layers: int = 20,
    width: int | None = None,
    norm: str = "batch",
    activation: str = "relu",
) -> Layer:
    """From images `x[batch, height, width, channels]` to `logits[batch, vocab]`.

    The number of layers says which of the paper's two forms it is; 50 and 152 are of both, and then images of 64 pixels
    a side or more mean that of ImageNet.

    | | small images, 6 n + 2 layers | ImageNet |
    | --- | --- | --- |
    | stem | 3 x 3, 16 kernels | 7 x 7, 64 kernels, strides 2; largest of 3 x 3, strides 2 |
    | sizes of the map | 3, n blocks each | 4, by the table of the paper |
    | channels | 16, 32, 64 | 64, 128, 256, 512; behind bottlenecks 4 times as many |
    | shortcut where sizes change | every other pixel, zeros as further channels (A) | 1 x 1 kernels (B) |

    Parameters: 269,722 for 20 layers and 10 classes; for 18, 34 and 50 layers and 1000 classes 11,689,512, 21,797,672
    and 25,557,032, as torchvision's, whose bottlenecks have their strides at the 3 x 3 kernels, as these do.
    The residual stream is `embed`, what is inside a branch `channels`: blocks are up and down projections.

    Args:
        example: shape of one image, (height, width, channels).
        vocab: number of classes.
        layers: layers with weights: 20, 32, 44, 56, 110 ..; 18, 34, 50, 101, 152.
        width: channels of the first size; by default 16 or 64.
        norm: a member of norms/, behind each convolution.
        activation: elementwise function after each norm.

    Raises:
        Refused: for another number of layers, and images that are too small.

    Source: He et al. 2016, arXiv:1512.03385, sections 3.3, 3.4 (table 1) and 4.2.
    """
    large = layers in IMAGENET and (layers % 6 != 2 or min(example[:-1], default=0) >= LARGE)
    if not large and (layers < 8 or layers % 6 != 2):
        raise Refused([Problem("model.layers", layers, "is none of the networks of the paper.", LEGAL)])
    legal = "images of 32 pixels a side or more; or model.layers = 8, 14, 20 .." if large else ""
    sides("resnet", example, halvings=5 if large else 2, legal=legal)
    counts, bottleneck = IMAGENET[layers] if large else (((layers - 2) // 6,) * 3, False)
    width = width or (64 if large else 16)
    made, act = partial(_conv, norm), function_named(activation)
    stem = {"stem": made(example[-1], width, "- embed", 7 if large else 3, 2 if large else 1, act)}
    stem |= {"pool": max_pool(3, 2, 1)} if large else {}
    levels, out = _levels(made, act, width, counts, bottleneck=bottleneck, projected=large)
    return chain(stem | levels | {"mean": global_average(), "head": head(out, vocab, bias=True)})


def _levels(made: Callable, act: Callable, width: int, counts, *, bottleneck: bool, projected: bool) -> tuple:
    """The parts between stem and mean, and the channels that they give; `projected`: whether shortcuts are (B)."""
    parts, into = {}, width
    for level, count in enumerate(counts):
        inside = width * 2**level
        out, strides = inside * (4 if bottleneck else 1), 2 if level else 1
        block = partial(_bottleneck if bottleneck else _basic, made, act, inside=inside, out=out)
        if into != out:
            branch = block(into=into, strides=strides)
            around = made(into, out, "embed embed", 1, strides, None) if projected else function(_widened)
            parts[f"change_{level + 1}"] = _followed(parallel({"branch": branch, "shortcut": around}, _sum), act)
        rest = count - (into != out)
        if rest:
            same = _followed(residual({"branch": block(into=out, strides=1)}), act)
            parts[f"blocks_{level + 1}"] = stack(same, rest)
        into = out
    return parts, into


def _conv(norm: str, into: int, out: int, dims: str, window: int, strides: int, after: Callable | None) -> Layer:
    """A convolution padded as torch's, its norm and the function behind it."""
    linear = conv(into, out, dims, window=window, strides=strides, padding=window // 2)
    return normalized(linear, norm, out, dims.split()[1], after)


def _basic(made: Callable, act: Callable, *, into: int, inside: int, out: int, strides: int) -> Layer:
    """Two 3 x 3 convolutions."""
    up = made(into, inside, "embed channels", 3, strides, act)
    return chain({"conv_1": up, "conv_2": made(inside, out, "channels embed", 3, 1, None)})


def _bottleneck(made: Callable, act: Callable, *, into: int, inside: int, out: int, strides: int) -> Layer:
    """1 x 1 to fewer channels, 3 x 3, 1 x 1 to more."""
    return chain(
        {
            "conv_1": made(into, inside, "embed channels", 1, 1, act),
            "conv_2": made(inside, inside, "channels channels", 3, strides, act),
            "conv_3": made(inside, out, "channels embed", 1, 1, None),
        }
    )


def _followed(layer: Layer, act: Callable) -> Layer:
    return chain({"sum": layer, "act": function(lambda x, ctx: act(x))})


def _sum(ctx, y, x):
    return x + y.astype(x.dtype)


def _widened(x, ctx):
    """Every other pixel, and as many channels of zeros as there are channels: shortcut A."""
    x = x[:, ::2, ::2]
    return ctx.concat([x, jnp.zeros_like(x)], "embed")
