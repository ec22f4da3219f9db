"""A small residual network of convolutions, each with a norm behind it: a user's model, for any norm there is.

Blocks end in a function: of what instance norm gives the mean over places is the bias alone.
"""

from jaxpar.core.parts import chain, function, residual
from jaxpar.core.types import Layer
from jaxpar.layers.conv import conv
from jaxpar.layers.dense import activation
from jaxpar.layers.embedding import head
from jaxpar.layers.normalized import normalized
from jaxpar.layers.stack import stack


def normed(*, example: tuple[int, ...], vocab: int, layers: int = 4, width: int = 8, norm: str = "batch") -> Layer:
    """From images `x[batch, height, width, channels]` to `logits[batch, vocab]`; smooth."""
    bend, hidden = activation("gelu_tanh"), 2 * width
    branch = {
        "up": normalized(conv(width, hidden, "embed channels"), norm, hidden, "channels", bend),
        "down": normalized(conv(hidden, width, "channels embed"), norm, width, "embed"),
    }
    return chain(
        {
            "stem": normalized(conv(example[-1], width, "- embed"), norm, width, "embed", bend),
            "blocks": stack(chain({"branch": residual(branch), "bend": function(lambda x, ctx: bend(x))}), layers),
            "pool": function(lambda x, ctx: ctx.mean(x, "embed", "height width")[:, 0, 0]),
            "head": head(width, vocab),
        }
    )
