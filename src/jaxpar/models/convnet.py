"""A small residual convolutional classifier with batch norm."""

from jaxpar.core.parts import chain, function, residual
from jaxpar.core.types import Layer
from jaxpar.layers.conv import conv
from jaxpar.layers.dense import activation as function_named
from jaxpar.layers.embedding import head
from jaxpar.layers.normalized import free
from jaxpar.layers.stack import stack


def convnet(
    *,
    example: tuple[int, ...],
    vocab: int,
    layers: int = 2,
    width: int = 16,
    hidden: int | None = None,
    norm: str = "batch",
    activation: str = "relu",
) -> Layer:
    """From images `x[batch, height, width, channels]` to `logits[batch, vocab]`.

    Args:
        example: shape of one image, (height, width, channels).
        vocab: number of classes.
        layers: residual blocks of two 3x3 convolutions.
        width: channels between blocks, dim `embed`.
        hidden: channels inside a block, dim `channels`; by default as many.
        norm: a member of norms/.
        activation: elementwise function after each norm.

    Source: He et al. 2016, arXiv:1512.03385, section 3, without its changes of size.
    """
    hidden = hidden or width
    make_norm, between = free(norm), function_named(activation)
    act = function(lambda x, ctx: between(x))
    branch = {
        "conv_1": conv(width, hidden, "embed channels"),
        "norm_1": make_norm(hidden, "channels"),
        "act": act,
        "conv_2": conv(hidden, width, "channels embed"),
        "norm_2": make_norm(width),
    }
    return chain(
        {
            "stem": conv(example[-1], width, "- embed"),
            "norm": make_norm(width),
            "act": act,
            "blocks": stack(chain({"branch": residual(branch), "act": act}), layers),
            "pool": function(lambda x, ctx: ctx.mean(x, "embed", "height width")[:, 0, 0]),
            "head": head(width, vocab),
        }
    )
