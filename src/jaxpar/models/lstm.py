"""A language model, or a classifier of sequences, of long short-term memory."""

from jaxpar.core.parts import residual
from jaxpar.core.types import Layer
from jaxpar.layers.dense import dense
from jaxpar.layers.dropout import dropout as dropout_layer
from jaxpar.layers.embedding import sequences
from jaxpar.layers.normalized import free
from jaxpar.layers.recurrent import lstm as recurrence
from jaxpar.layers.stack import stack


def lstm(
    *,
    vocab: int,
    example: tuple[int, ...] | None = None,
    layers: int = 1,
    width: int = 64,
    hidden: int | None = None,
    dropout: float = 0.0,
    norm: str = "none",
    bias: bool = True,
    tied: bool = False,
) -> Layer:
    """From `ids[batch, context]` to `logits[batch, context, vocab]`; each sequence starts from zero states.

    Of `x[batch, context, features]`, or of images row by row, the last state gives `logits[batch, vocab]`.

    Args:
        vocab: number of tokens, or of classes.
        example: shape of one input; more than one dim makes a classifier.
        layers: residual blocks of a recurrence and a projection back.
        width: features of the residual stream.
        hidden: features of the recurrent state; by default as many.
        dropout: rate at the end of each block.
        norm: a member of norms/, inside the cells: on the sum of both products of each gate, and on
            the cell before its tanh.
        bias: whether projections, gates and norms have one.
        tied: whether the head of a language model is the token table.

    Source: Chiley et al. 2019, arXiv:1905.05894, section 5, where one layer stands between table and head.
    """
    inside, hidden = None if norm == "none" else free(norm, causal=True, cell=True), hidden or width
    block = {
        "recurrence": recurrence(width, hidden, norm=inside, bias=bias),
        "down": dense(hidden, width, "mlp embed", bias=bias),
        "dropout": dropout_layer(dropout, "recurrence"),
    }
    body = {"blocks": stack(residual(block), layers)}
    return sequences(vocab, width, body, example=example, tied=tied, deviation=0.02 if tied else 1.0)
