"""A language model of gated recurrent units."""

from jaxpar.core.parts import residual
from jaxpar.core.types import Layer
from jaxpar.layers.dense import dense
from jaxpar.layers.dropout import dropout as dropout_layer
from jaxpar.layers.embedding import language
from jaxpar.layers.normalized import free
from jaxpar.layers.recurrent import gru as recurrence
from jaxpar.layers.stack import stack


def gru(
    *,
    vocab: int,
    layers: int = 1,
    width: int = 64,
    hidden: int | None = None,
    dropout: float = 0.0,
    norm: str = "layer",
    bias: bool = True,
    tied: bool = True,
) -> Layer:
    """From `ids[batch, context]` to `logits[batch, context, vocab]`; each sequence starts from a zero state.

    Args:
        vocab: number of tokens.
        layers: residual blocks of a norm, a recurrence and a projection back.
        width: features of the residual stream.
        hidden: features of the recurrent state; by default as many.
        dropout: rate at the end of each block.
        norm: a member of norms/.
        bias: whether projections, gates and norms have one.
        tied: whether the head is the token table.
    """
    make_norm, hidden = free(norm, causal=True), hidden or width
    block = {
        "norm": make_norm(width, bias=bias),
        "recurrence": recurrence(width, hidden, bias=bias),
        "down": dense(hidden, width, "mlp embed", bias=bias),
        "dropout": dropout_layer(dropout, "recurrence"),
    }
    body = {"blocks": stack(residual(block), layers), "norm": make_norm(width, bias=bias)}
    return language(vocab, width, body, tied=tied)
