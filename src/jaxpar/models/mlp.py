"""A classifier made of residual MLPs, on flattened inputs."""

import math

from jaxpar.core.parts import chain, function, residual
from jaxpar.core.types import Layer
from jaxpar.layers import dense
from jaxpar.layers.dropout import dropout as dropout_layer
from jaxpar.layers.embedding import head
from jaxpar.layers.stack import stack


def mlp(
    *,
    example: tuple[int, ...],
    vocab: int,
    layers: int = 2,
    width: int = 64,
    hidden: int | None = None,
    dropout: float = 0.0,
    activation: str = "relu",
    bias: bool = True,
) -> Layer:
    """From `x[batch, *example]` to `logits[batch, vocab]`.

    Args:
        example: shape of one input.
        vocab: number of classes.
        layers: residual blocks, each an up and a down projection.
        width: features of the residual stream.
        hidden: features inside a block; by default 4 width.
        dropout: rate at the end of each block.
        activation: `gelu`, `gelu_tanh` or `relu`.
        bias: whether projections have one.
    """
    pixels = math.prod(example)
    branch = dense.mlp(width, hidden or 4 * width, activation, bias=bias)
    return chain(
        {
            "flatten": function(lambda x, ctx: x.reshape(x.shape[0], -1)),
            "stem": dense.dense(pixels, width, "- embed", bias=bias),
            "blocks": stack(residual({"mlp": branch, "dropout": dropout_layer(dropout, "mlp")}), layers),
            "head": head(width, vocab),
        }
    )
