"""Causal self-attention, with as many key-value heads as query heads or fewer."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpar.core.parts import broadened, normal
from jaxpar.core.types import Layer

PROJECTIONS = {"query": "embed heads", "key": "embed kv_heads", "value": "embed kv_heads", "out": "heads embed"}


def attention(
    width: int, heads: int, kv_heads: int, *, bias: bool = True, dropout: float = 0.0, out_deviation: float = 0.02
) -> Layer:
    """Scaled dot-product attention to this and earlier positions.

    Args:
        width: features of x and y; a head has width / heads of them.
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`; each serves heads / kv_heads query heads in a row.
        bias: whether the four projections have one.
        dropout: rate on the attention weights.
        out_deviation: standard deviation of the initial out projection; the others 0.02.

    Returns:
        A layer from `x[batch, context, width]` to the same shape.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Ainslie et al. 2023 (GQA), arXiv:2305.13245.
    """
    size = width // heads
    columns = {"query": width, "key": kv_heads * size, "value": kv_heads * size, "out": width}

    def init(key):
        params = {}
        for name, part in zip(PROJECTIONS, jax.random.split(key, 4), strict=True):
            params[name] = {"weight": normal(part, (width, columns[name]), out_deviation if name == "out" else 0.02)}
            if bias:
                params[name]["bias"] = jnp.zeros(columns[name])
        return params, {}

    def apply(params, extra, x, ctx):
        names = ("query", "key", "value")
        projected = ctx.dot(x, tuple(params[n]["weight"] for n in names), tuple(PROJECTIONS[n] for n in names))
        biased = [broadened(y, params[n]["bias"]) if bias else y for n, y in zip(names, projected, strict=True)]
        kept = [checkpoint_name(y, name) for name, y in zip(names, biased, strict=True)]
        q_bshd, k_bshd, v_bshd = (y.reshape(*y.shape[:2], -1, size) for y in kept)
        serving = _serving(ctx, q_bshd.shape[2], k_bshd.shape[2], heads // kv_heads)
        if serving is not None:
            k_bshd, v_bshd = (jnp.take(y, serving, axis=2) for y in (k_bshd, v_bshd))
        y = _attend(ctx, q_bshd, k_bshd, v_bshd, lambda a: ctx.dropout(a, dropout, "attention", "batch heads - -"))
        y = checkpoint_name(y.reshape(*y.shape[:2], -1), "attention")
        y = ctx.dot(y, params["out"]["weight"], PROJECTIONS["out"])
        return checkpoint_name(broadened(y, params["out"]["bias"]) if bias else y, "out"), extra

    dims = {n: {"weight": d} | ({"bias": d.split()[1]} if bias else {}) for n, d in PROJECTIONS.items()}
    return Layer(init, apply, dims=(dims, {}))


def _serving(ctx, q_heads: int, kv_heads: int, group: int):
    """Which local key-value head serves each local query head; None if the n-th serves the n-th."""
    if group == 1:
        return None
    q = ctx.start("heads", q_heads) + jnp.arange(q_heads)
    return q // group - ctx.start("kv_heads", kv_heads)


def _attend(ctx, q_bqhd, k_bkhd, v_bkhd, drop):
    """Softmax in float32 over the positions up to each query's own."""
    scores = ctx.einsum("bqhd,bkhd->bhqk", q_bqhd, k_bkhd) * q_bqhd.shape[-1] ** -0.5
    visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    scores = jnp.where(visible, checkpoint_name(scores, "scores"), -jnp.inf)
    weights = drop(checkpoint_name(jax.nn.softmax(scores, axis=-1), "weights"))
    return ctx.einsum("bhqk,bkhd->bqhd", weights.astype(v_bkhd.dtype), v_bkhd).astype(v_bkhd.dtype)
