"""GPT-2: a decoder-only transformer with learned positions and norms before each part."""

from jaxpar.core import family
from jaxpar.core.types import Layer
from jaxpar.layers.attention import attention
from jaxpar.layers.dense import mlp
from jaxpar.layers.embedding import positions
from jaxpar.layers.language import language
from jaxpar.layers.parts import chain, dropout as dropout_layer, residual
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
    make_norm = family.pick("norms", norm, "model.norm")
    body = block(
        make_norm,
        width=width,
        heads=heads,
        kv_heads=kv_heads or heads,
        hidden=hidden or 4 * width,
        activation=activation,
        bias=bias,
        rate=dropout,
        out_deviation=0.02 / (2 * layers) ** 0.5,
    )
    between = {
        "positions": positions(context, width),
        "dropout": dropout_layer(dropout, "embedding"),
        "blocks": stack(body, layers),
        "norm": make_norm(width, bias=bias),
    }
    return language(vocab, width, between, tied=tied)


def block(norm, *, width, heads, kv_heads, hidden, activation, bias, rate, out_deviation) -> Layer:
    """x plus attention, then plus an MLP, each after a norm: one block, as a chain of two residual parts."""
    attend = attention(
        width, heads, kv_heads, bias=bias, dropout=rate, out_deviation=out_deviation
    )
    think = mlp(width, hidden, activation, bias=bias, out_deviation=out_deviation)
    parts = {"attention": attend, "mlp": think}
    return chain(
        {
            name: residual({"norm": norm(width, bias=bias), name: part, "dropout": dropout_layer(rate, name)})
            for name, part in parts.items()
        }
    )
