"""U-Net: a class for each pixel of an image, or each voxel of a volume."""

from jaxpar.core.parts import chain, join
from jaxpar.core.refuse import Problem, Refused
from jaxpar.core.space import sides
from jaxpar.core.types import Layer
from jaxpar.layers.conv import conv, up_conv
from jaxpar.layers.dense import activation as function_named
from jaxpar.layers.embedding import head
from jaxpar.layers.normalized import normalized
from jaxpar.layers.pool import largest


def unet(
    *,
    example: tuple[int, ...],
    vocab: int,
    layers: int = 4,
    width: int = 64,
    norm: str = "batch",
    activation: str = "relu",
) -> Layer:
    """From `x[batch, height, width, channels]` to `logits[batch, height, width, vocab]`; volumes have a depth as well.

    Going down, each level has two 3 x 3 convolutions and a largest of 2 x 2, and channels double; going up, each has an
    up-convolution of 2 x 2, to half the channels, which is joined to what its level had on the way down, and two
    convolutions. Unlike in the paper convolutions keep the size of the map, so that each pixel has a class, and a map
    of an odd size is halved to the larger half, and cut to that size on the way up. 31,037,633 parameters for images of
    three channels, one class and batch norm.

    A level passes on what is now (x) and what the way up joins (the skips) as one tuple: so it goes through pipelines.
    What levels pass on is `embed`, what is inside of them `channels`; up-convolutions go across.

    Args:
        example: shape of one image, (height, width, channels), or of one volume, (depth, height, width, channels).
        vocab: number of classes.
        layers: levels on the way down.
        width: channels of the first level.
        norm: a member of norms/, behind each convolution; up-convolutions have a bias.
        activation: elementwise function after each norm.

    Raises:
        Refused: for examples that are neither images nor volumes, and for more levels than their sides can be halved.

    Source: Ronneberger et al. 2015, arXiv:1505.04597, figure 1; volumes: Cicek et al. 2016, arXiv:1606.06650, whose
        channels double earlier.
    """
    space = 3 if len(example) == 4 else 2
    found = sides("unet", example, space=space)
    if min(found) < 2**layers:
        most = min(found).bit_length() - 1
        rule = f"halves each side of the examples, {' x '.join(map(str, found))}, so often that nothing is left."
        raise Refused([Problem("model.layers", layers, rule, f"1 to {most}" if most else "larger examples")])
    act, widths = function_named(activation), [width * 2**level for level in range(layers + 1)]

    def convolutions(into: int, out: int, word: str = "embed") -> Layer:
        dims = {"conv_1": f"{word} channels", "conv_2": "channels embed"}
        sizes = {"conv_1": into, "conv_2": out}
        made = {name: conv(sizes[name], out, dims[name], space=space) for name in dims}
        return chain({name: normalized(made[name], norm, out, dims[name].split()[1], act) for name in dims})

    parts = {"down_1": _down(convolutions(example[-1], width, "-"))}
    for n in range(1, layers):
        parts[f"down_{n + 1}"] = _down(convolutions(widths[n - 1], widths[n]))
    parts["bottom"] = _bottom(convolutions(widths[-2], widths[-1]))
    for n in reversed(range(layers)):
        up = up_conv(widths[n + 1], widths[n], "embed embed", space=space)
        parts[f"up_{n + 1}"] = _up(up, convolutions(widths[n + 1], widths[n]))
    return chain(parts | {"head": head(width, vocab, bias=True)})


def _down(body: Layer) -> Layer:
    """From x, or (x, *skips), to the largest of 2 x 2 of what `body` makes of x, the skips, and what it makes."""

    def apply(params, extra, given, ctx):
        x, *skips = given if isinstance(given, tuple) else (given,)
        y, extra = body.apply(params, extra, x, ctx)
        return (largest(y, 2, padding="SAME"), *skips, y), extra

    return body._replace(apply=apply, parts=())


def _bottom(body: Layer) -> Layer:
    """From (x, *skips) to what `body` makes of x, and the skips."""

    def apply(params, extra, given, ctx):
        x, *skips = given
        y, extra = body.apply(params, extra, x, ctx)
        return (y, *skips), extra

    return body._replace(apply=apply, parts=())


def _up(up: Layer, body: Layer) -> Layer:
    """From (x, *skips) to what `body` makes of the last skip joined to x made larger, and the other skips, if any."""
    init, dims = join({"up": up, "body": body})

    def apply(params, extra, given, ctx):
        x, *skips, skip = given
        larger, _ = up.apply(params["up"], {}, x, ctx)
        larger = larger[tuple(slice(side) for side in skip.shape[:-1])]
        y, new = body.apply(params["body"], extra["body"], ctx.concat([skip, larger.astype(skip.dtype)], "embed"), ctx)
        return ((y, *skips) if skips else y), extra | {"body": new}

    return Layer(init, apply, dims)
