"""Token and position tables, the head, and what all models of sequences share."""

import math

import jax.numpy as jnp
from jax import lax

from jaxpar.core.parts import broadened, chain, function, normal
from jaxpar.core.types import Layer

MASKED = -1e30  # the logit of a class that does not exist: its probability is exactly 0 in float32


def tokens(vocab: int, width: int, deviation: float = 0.02) -> Layer:
    """From `ids[batch, context]` to their rows of a table, `y[batch, context, width]`."""

    def init(key):
        return {"table": normal(key, (vocab, width), deviation)}, {}

    def apply(params, extra, ids, ctx):
        return ctx.lookup(params["table"], ids), extra

    return Layer(init, apply, dims=({"table": "vocab embed"}, {}))


def positions(context: int, width: int, deviation: float = 0.02) -> Layer:
    """Add a learned row to each position.

    Raises:
        ValueError: at trace time, if x has more positions than the table.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """

    def init(key):
        return {"table": normal(key, (context, width), deviation)}, {}

    def apply(params, extra, x, ctx):
        count = x.shape[1]
        if count > context:
            raise ValueError(
                f"x has {count} positions, but model.context = {context}; shorten x or raise model.context."
            )
        first = ctx.start("context", count, beside="embed")
        return broadened(x, lax.dynamic_slice_in_dim(params["table"], first, count, 0)), extra

    return Layer(init, apply, dims=({"table": "context embed"}, {}))


def head(width: int, classes: int, deviation: float = 0.02, bias: bool = False) -> Layer:
    """Logits from the features, `y[..., classes]`; entries added by padding get the logit `MASKED`."""

    def init(key):
        params = {"weight": normal(key, (width, classes), deviation)}
        return (params | {"bias": jnp.zeros(classes)} if bias else params), {}

    def apply(params, extra, x, ctx):
        return logits(ctx, x, params["weight"], classes, params.get("bias")), extra

    return Layer(init, apply, dims=({"weight": "embed vocab"} | ({"bias": "vocab"} if bias else {}), {}))


def tied_head(classes: int) -> Layer:
    """Logits from the features by the token table, transposed: a chain lets it read the parameters of `tokens`."""

    def apply(params, extra, x, ctx):
        return logits(ctx, x, params["table"].T, classes), extra

    return Layer(lambda key: ({}, {}), apply, ({}, {}))


def logits(ctx, x, weight, classes: int, bias=None):
    """x times `weight["embed vocab"]`, plus a bias, with padding masked; a tied head passes its table transposed."""
    y = ctx.dot(x, weight, "embed vocab").astype(jnp.float32)
    y = y if bias is None else y + bias
    count = y.shape[-1]
    return jnp.where(ctx.start("vocab", count) + jnp.arange(count) < classes, y, MASKED)


def language(vocab: int, width: int, body: dict[str, Layer], *, tied: bool, deviation: float = 0.02) -> Layer:
    """From `ids[batch, context]` to `logits[batch, context, vocab]`, in inner rows.

    Args:
        vocab: number of tokens.
        width: features of the residual stream.
        body: what stands between the token table and the head.
        tied: whether the head is the token table transposed.
        deviation: standard deviation of the initial token table.

    Source: Press and Wolf 2017 (tied head), arXiv:1608.05859.
    """
    last = tied_head(vocab) if tied else head(width, vocab)
    return chain(
        {"tokens": tokens(vocab, width, deviation), **body, "head": last}, reads={"head": "tokens"} if tied else {}
    )


def features(count: int, width: int) -> Layer:
    """From `x[batch, context, ...]` with `count` numbers at each position to `y[batch, context, width]`."""

    def init(key):
        return {"weight": normal(key, (count, width), count**-0.5)}, {}

    def apply(params, extra, x, ctx):
        return ctx.dot(x.reshape(*x.shape[:2], count), params["weight"], "- embed"), extra

    return Layer(init, apply, dims=({"weight": "- embed"}, {}))


def sequences(
    vocab: int,
    width: int,
    body: dict[str, Layer],
    *,
    example: tuple[int, ...] | None,
    tied: bool = True,
    deviation: float = 0.02,
) -> Layer:
    """A language model of tokens; or of other sequences a classifier, by what is at their last position.

    Args:
        vocab: number of tokens, or of classes.
        width: features of the residual stream.
        body: what stands between, which must go along the sequence.
        example: shape of one input: (context,) or None for tokens; else (context, features) or, of images that are read
            row by row, (height, width, channels).
        tied: whether the head of a language model is the token table transposed.
        deviation: standard deviation of its initial token table.
    """
    if example is None or len(example) == 1:
        return language(vocab, width, body, tied=tied, deviation=deviation)
    last = {"last": function(lambda x, ctx: x[:, -1]), "head": head(width, vocab)}
    return chain({"features": features(math.prod(example[1:]), width), **body, **last})
