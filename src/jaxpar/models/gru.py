"""A language model, or a classifier of sequences, of gated recurrent units."""

from jaxpar.core.parts import residual
from jaxpar.core.types import Layer
from jaxpar.layers.dense import dense
from jaxpar.layers.dropout import dropout as dropout_layer
from jaxpar.layers.embedding import sequences
from jaxpar.layers.normalized import free
from jaxpar.layers.recurrent import gru as recurrence
from jaxpar.layers.stack import stack


def gru(
    *,
    vocab: int,
    example: tuple[int, ...] | None = None,
    layers: int = 1,
    width: int = 64,
    hidden: int | None = None,
    dropout: float = 0.0,
    norm: str = "none",
    bias: bool = True,
    tied: bool = True,
) -> Layer:
    """From `ids[batch, context]` to `logits[batch, context, vocab]`; each sequence starts from a zero state.

    Of `x[batch, context, features]`, or of images row by row, the last state gives `logits[batch, vocab]`.

    Args:
        vocab: number of tokens, or of classes.
        example: shape of one input; more than one dim makes a classifier.
        layers: residual blocks of a norm, a recurrence and a projection back.
        width: features of the residual stream.
        hidden: features of the recurrent state; by default as many.
        dropout: rate at the end of each block.
        norm: a member of norms/, inside each gate, on the sum of both its products; the residual stream has layer norm.
        bias: whether projections, gates and norms have one.
        tied: whether the head of a language model is the token table.
    """
    inside, hidden = None if norm == "none" else free(norm, causal=True, cell=True), hidden or width
    make_norm = free("layer")
    block = {
        "norm": make_norm(width, bias=bias),
        "recurrence": recurrence(width, hidden, norm=inside, bias=bias),
        "down": dense(hidden, width, "mlp embed", bias=bias),
        "dropout": dropout_layer(dropout, "recurrence"),
    }
    body = {"blocks": stack(residual(block), layers), "norm": make_norm(width, bias=bias)}
    return sequences(vocab, width, body, example=example, tied=tied)
