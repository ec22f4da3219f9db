"""What all language models share: a token table in front, a norm and a head behind."""

from jaxpar.core.types import Layer
from jaxpar.layers.embedding import head, logits, tokens
from jaxpar.layers.parts import chain, join, runner


def language(vocab: int, width: int, body: dict[str, Layer], *, tied: bool) -> Layer:
    """From `ids[batch, context]` to `logits[batch, context, vocab]`, in inner rows.

    Args:
        vocab: number of tokens.
        width: features of the residual stream.
        body: what stands between the token table and the head.
        tied: whether the head is the token table transposed.

    Source: Press and Wolf 2017 (tied head), arXiv:1608.05859.
    """
    parts = {"tokens": tokens(vocab, width), **body} | ({} if tied else {"head": head(width, vocab)})
    if not tied:
        return chain(parts)
    init, dims = join(parts)

    def apply(params, extra, ids, ctx):
        run, new = runner(parts, params, extra, ctx)
        x = ids
        for name in parts:
            x = run(name, x)
        return logits(ctx, x, params["tokens"]["table"].T, vocab), new

    return Layer(init, apply, dims, parts=tuple(parts.values()))
