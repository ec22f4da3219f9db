"""AlexNet in its form of one column."""

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

# window, strides, padding, kernels as multiples of the width, whether a largest of 3 x 3 follows, with strides of 2
CONVOLUTIONS = ((11, 4, 2, 1, True), (5, 1, 2, 3, True), (3, 1, 1, 6, False), (3, 1, 1, 4, False), (3, 1, 1, 4, True))
LEAST = 63  # pixels a side, or the last pooling has no window


def alexnet(
    *,
    example: tuple[int, ...],
    vocab: int,
    width: int = 64,
    hidden: int = 4096,
    dropout: float = 0.5,
    norm: str = "none",
    activation: str = "relu",
) -> Layer:
    """From images `x[batch, height, width, channels]` to `logits[batch, vocab]`.

    | layer | map of 224 x 224 | kernels of width 64 |
    | --- | --- | --- |
    | 1 | 55, then 27 | 64 of 11 x 11, strides 4, largest of 3 x 3 with strides 2 |
    | 2 | 27, then 13 | 192 of 5 x 5, largest of 3 x 3 with strides 2 |
    | 3, 4 | 13 | 384 and 256 of 3 x 3 |
    | 5 | 13, then 6 | 256 of 3 x 3, largest of 3 x 3 with strides 2 |
    | 6, 7, 8 | | 4096 of the whole map, 4096, classes |

    61,100,840 parameters for 224 x 224 x 3 and 1000 classes, as torchvision's. Products are up and down projections in
    turn. The two columns of the first paper were its tensor parallelism, and its normalization over neighbours is left
    out, as the second does.

    Args:
        example: shape of one image, (height, width, channels), 63 pixels a side or more.
        vocab: number of classes.
        width: kernels of the first convolution.
        hidden: features of the two fully connected layers.
        dropout: rate before each of these.
        norm: a member of norms/, behind each convolution.
        activation: elementwise function after each norm.

    Raises:
        Refused: for images that are too small.

    Source: Krizhevsky 2014, arXiv:1404.5997, section 5; Krizhevsky et al. 2012, section 3.5.
    """
    found = sides("alexnet", example)
    if min(found) < LEAST:
        rule = f"takes images of {LEAST} pixels a side or more, and these have {found[0]} x {found[1]}."
        raise Refused([Problem("model.name", "alexnet", rule, "larger images; or lenet, resnet")])
    act, into, words, parts = function_named(activation), example[-1], iter(turns(7)), {}
    for n, (window, strides, padding, times, pooled) in enumerate(CONVOLUTIONS, 1):
        dims, out = next(words), times * width
        made = conv(into, out, dims, window=window, strides=strides, padding=padding)
        parts[f"conv_{n}"] = normalized(made, norm, out, dims.split()[1], act)
        found = [(side + 2 * padding - window) // strides + 1 for side in found]
        if pooled:
            parts[f"pool_{n}"] = max_pool(3, 2)
            found = [(side - 3) // 2 + 1 for side in found]
        into = out
    for n, window in enumerate((tuple(found), 1), 6):
        dims = next(words)
        parts[f"dropout_{n}"] = dropout_layer(dropout, f"full_{n}", dims.split()[0])
        made = conv(into, hidden, dims, window=window, padding="VALID")
        parts[f"full_{n}"] = normalized(made, "none", hidden, dims.split()[1], act)
        into = hidden
    parts["flatten"] = function(lambda x, ctx: x[:, 0, 0])
    return chain(parts | {"head": head(hidden, vocab, bias=True)})
