"""GPT-2: a decoder-only transformer with learned positions and norms before each part."""

from jaxpar.core.parts import chain, residual
from jaxpar.core.types import Layer
from jaxpar.layers.attention import attention
from jaxpar.layers.dense import mlp
from jaxpar.layers.dropout import dropout as dropout_layer
from jaxpar.layers.embedding import language, positions
from jaxpar.layers.normalized import free
from jaxpar.layers.stack import stack


def gpt(
    *,
    vocab: int,
    context: int,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    kv_heads: int | None = None,
    hidden: int | None = None,
    dropout: float = 0.0,
    norm: str = "layer",
    activation: str = "gelu",
    bias: bool = True,
    tied: bool = True,
) -> Layer:
    """From `ids[batch, context]` to `logits[batch, context, vocab]`.

    Args:
        vocab: number of tokens.
        context: most positions.
        layers: number of blocks.
        width: features of the residual stream, a multiple of `heads`.
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`; by default as many.
        hidden: features inside the MLP; by default 4 width.
        dropout: rate on embeddings, attention weights and both branches of a block.
        norm: a member of norms/.
        activation: `gelu` (exact), `gelu_tanh` or `relu`.
        bias: whether projections and norms have one.
        tied: whether the head is the token table.

    Source: Radford et al. 2019, section 2.3, with the initial values of its code: deviation 0.02, and 0.02 over
        sqrt(2 layers) for the projections that end a branch.
    """
    make_norm = free(norm, causal=True)
    rate, ending = dropout, 0.02 / (2 * layers) ** 0.5
    branches = {
        "attention": attention(width, heads, kv_heads or heads, bias=bias, dropout=rate, out_deviation=ending),
        "mlp": mlp(width, hidden or 4 * width, activation, bias=bias, out_deviation=ending),
    }

    def branch(name):
        inside = {"norm": make_norm(width, bias=bias), name: branches[name], "dropout": dropout_layer(rate, name)}
        return residual(inside)

    body = {
        "positions": positions(context, width),
        "dropout": dropout_layer(rate, "embedding"),
        "blocks": stack(chain({name: branch(name) for name in branches}), layers),
        "norm": make_norm(width, bias=bias),
    }
    return language(vocab, width, body, tied=tied)
