"""VGG: convolutions of 3 x 3 alone, five times halved."""

from jaxpar.core.parts import chain, function
from jaxpar.core.refuse import Problem, Refused
from jaxpar.core.space import sides
from jaxpar.core.types import Layer
from jaxpar.layers.conv import conv, turns
from jaxpar.layers.dense import activation as function_named
from jaxpar.layers.dropout import dropout as dropout_layer
from jaxpar.layers.embedding import head
from jaxpar.layers.normalized import normalized
from jaxpar.layers.pool import max_pool

# convolutions at each size of the map, by the number of layers that have weights
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(
    *,
    example: tuple[int, ...],
    vocab: int,
    layers: int = 16,
    width: int = 64,
    hidden: int = 4096,
    dropout: float = 0.5,
    norm: str = "none",
    activation: str = "relu",
) -> Layer:
    """From images `x[batch, height, width, channels]` to `logits[batch, vocab]`.

    Convolutions have 1, 2, 4, 8 and 8 times `width` kernels at the five sizes of the map, each of which ends with a
    largest of 2 x 2. The first fully connected layer is a convolution with a window of the whole last map, 7 x 7 for
    images of 224 x 224. Parameters there with 1000 classes: 132,863,336, 133,047,848, 138,357,544 and 143,667,240 for
    11, 13, 16 and 19 layers. Products are up and down projections in turn.

    Args:
        example: shape of one image, (height, width, channels), 32 pixels a side or more.
        vocab: number of classes.
        layers: 11, 13, 16 or 19: configurations A, B, D and E.
        width: kernels of the first convolution.
        hidden: features of the two fully connected layers.
        dropout: rate behind each of these.
        norm: a member of norms/, behind each convolution.
        activation: elementwise function after each norm.

    Raises:
        Refused: for another number of layers, and images that are too small.

    Source: Simonyan and Zisserman 2014, arXiv:1409.1556, table 1.
    """
    if layers not in CONVOLUTIONS:
        raise Refused([Problem("model.layers", layers, "is none of the networks of the paper.", "11, 13, 16 or 19")])
    found = sides("vgg", example, halvings=5, legal="images of 32 pixels a side or more; or lenet, resnet")
    act, into, parts = function_named(activation), example[-1], {}
    words = iter(turns(layers - 1))
    for level, count in enumerate(CONVOLUTIONS[layers]):
        out = width * min(2**level, 8)
        for n in range(count):
            dims = next(words)
            parts[f"conv_{level + 1}_{n + 1}"] = normalized(conv(into, out, dims), norm, out, dims.split()[1], act)
            into = out
        parts[f"pool_{level + 1}"] = max_pool(2)
    for n, window in enumerate((tuple(side // 32 for side in found), 1)):
        dims = next(words)
        out_dims = dims.split()[1]
        made = conv(into, hidden, dims, window=window, padding="VALID")
        parts[f"full_{n + 1}"] = normalized(made, "none", hidden, out_dims, act)
        parts[f"dropout_{n + 1}"] = dropout_layer(dropout, f"full_{n + 1}", out_dims)
        into = hidden
    parts["flatten"] = function(lambda x, ctx: x[:, 0, 0])
    return chain(parts | {"head": head(hidden, vocab, bias=True)})
