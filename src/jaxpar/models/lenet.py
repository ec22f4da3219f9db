"""LeNet-5: three convolutions with averages between them, for small pictures."""

import jax.numpy as jnp

from jaxpar.core.parts import chain, function
from jaxpar.core.refuse import Problem, Refused
from jaxpar.core.space import sides
from jaxpar.core.types import Layer
from jaxpar.layers.conv import conv, turns
from jaxpar.layers.dense import activation as function_named
from jaxpar.layers.dense import dense
from jaxpar.layers.embedding import head
from jaxpar.layers.normalized import normalized
from jaxpar.layers.pool import average_pool

SIDE = 32  # of the images that the network was drawn for; smaller ones get a margin of zeros, as the digits there have


def lenet(
    *, example: tuple[int, ...], vocab: int, width: int = 6, norm: str = "none", activation: str = "tanh"
) -> Layer:
    """From images `x[batch, height, width, channels]` to `logits[batch, vocab]`.

    Images of less than 32 pixels a side get zeros around them. 61,706 parameters for 32 x 32 x 1 and 10 classes.

    | layer | map | kernels of width 6 |
    | --- | --- | --- |
    | C1 | 28 x 28 | 6 of 5 x 5 |
    | S2 | 14 x 14 | means of 2 x 2 |
    | C3 | 10 x 10 | 16 of 5 x 5, all over all maps of S2 |
    | S4 | 5 x 5 | means of 2 x 2 |
    | C5 | 1 x 1 | 120 of the whole map |
    | F6, output | | 84, classes |

    Args:
        example: shape of one image, (height, width, channels).
        vocab: number of classes.
        width: kernels of the first layer, a multiple of 3; those of the others are in proportion.
        norm: a member of norms/, behind each convolution.
        activation: elementwise function after each norm.

    Raises:
        Refused: for examples that are no images, and a width that does not divide.

    Source: LeCun et al. 1998, Gradient-based learning applied to document recognition, section II.B. There the means of
        S2 and S4 have a trained factor, C3 reads some maps only, and the output is a distance.
    """
    found = sides("lenet", example)
    if width % 3:
        raise Refused([Problem("model.width", width, "must be a multiple of 3, or 8/3 of it are no kernels.", "6")])
    sizes = [example[-1], width, 8 * width // 3, 20 * width]
    margins = [(max(0, SIDE - side) // 2, (max(0, SIDE - side) + 1) // 2) for side in found]
    last = [((max(side, SIDE) - 4) // 2 - 4) // 2 for side in found]
    act, words = function_named(activation), turns(4)

    def behind(n: int, window) -> Layer:
        made = conv(sizes[n], sizes[n + 1], words[n], window=window, padding="VALID")
        return normalized(made, norm, sizes[n + 1], words[n].split()[1], act)

    return chain(
        {
            "margin": function(lambda x, ctx: jnp.pad(x, [(0, 0), *margins, (0, 0)])),
            "c1": behind(0, 5),
            "s2": average_pool(2),
            "c3": behind(1, 5),
            "s4": average_pool(2),
            "c5": behind(2, tuple(last)),
            "flatten": function(lambda x, ctx: x[:, 0, 0]),
            "f6": dense(20 * width, 14 * width, words[3]),
            "act": function(lambda x, ctx: act(x)),
            "head": head(14 * width, vocab, bias=True),
        }
    )
