"""Streaming normalization: statistics of all examples so far, and their gradients by those of all so far.

A stream of numbers has a short-term mean, over the microbatches since the weights changed, and a long-term one: `keep`
of itself and 1 - `keep` of the short-term one, whenever the weights change. There is one stream for each of

    m = long-term m' * long + short-term m' * (1 - long), m' the mean of a microbatch
    v likewise of the mean square of x - m
    y = (x - m) / sqrt(v + eps)

and, on the way back, for the gradients of the loss by m and by v, of which the microbatch gets long-term * `back` + its
own * `current` + short-term * the rest.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpar.core import compat
from jaxpar.core.moments import affine, affined, moved, ranges, rows, wide
from jaxpar.core.types import Layer

ONCE = True  # per microbatch: its state has no order within one, as a loop over positions would ask for


def streaming(
    width: int,
    dims: str = "embed",
    long: float = 0.7,
    back: float = 0.7,
    current: float = 0.3,
    keep: float = 0.7,
    eps: float = 1e-5,
    bias: bool = True,
) -> Layer:
    """Shift and scale each feature by the streamed statistics of all examples so far.

    A microbatch may be a single example. With long = back = 0 and current = 1 it is batch normalization.

    Args:
        width: size of the last dim of x, over all devices.
        dims: name of that dim.
        long: weight of the long-term statistics.
        back: weight of the long-term gradients of statistics.
        current: weight of the microbatch's own.
        keep: share of long-term numbers that remains at an update of the weights.
        eps: added to the variance, so in units of x squared.
        bias: whether to have a bias.

    Returns:
        A layer from `x[batch, .., width]` to the same shape and dtype; its state has a half for each pass. Cells
        of recurrent layers refuse it.

    Source: Liao, Kawaguchi and Poggio 2016, arXiv:1610.06160, "streaming normalization" with p = 2, as the authors
        restate it in github.com/liaoq/StreamingNorm (README, streaming.py); the weights are those that it gives for
        online and recurrent learning. There v is of x less the mean of its own microbatch, which is 0 for one example.
    """
    ranges("streaming", eps=(eps, 0, math.inf), keep=(keep, 0, 1), long=(long, 0, 1), back=(back, 0, 1))
    ranges("streaming", current=(current, 0, 1 - back))
    init, names = affine(width, dims, bias=bias)
    behind, ahead = (long, 1 - long, 0.0), (back, 1 - back - current, current)

    def apply(params, extra, x, ctx):
        held = extra["forward"]
        if not ctx.train:
            mean, variance = (_combined(held, name, None, behind) for name in ("mean", "variance"))
            return moved(params, (wide(x) - mean) * jax.lax.rsqrt(variance + eps), x.dtype), extra

        def mean(a):
            return jax.lax.stop_gradient(ctx.mean(a, dims, rows(x))).reshape(-1)

        return _trained(mean, (keep, behind, ahead, eps), params, extra, x, (jnp.asarray(ctx.fresh), ctx.scale))

    def start(key):
        zeros = _empty("mean", jnp.zeros(width))
        forward, backward = (zeros | _empty("variance", jnp.full(width, first)) for first in (1.0, 0.0))
        return init(), {"forward": forward, "backward": backward}

    return Layer(start, apply, dims=(names, dict.fromkeys(("forward", "backward"), _words(dims))))


def _trained(mean, how, params, extra, x, now):
    """What `streaming` gives in training, for `mean(a) -> [width]` over the microbatch; now: fresh and loss scale."""
    fresh, loss_scale = now
    keep, behind, ahead, eps = how
    held, own = extra["forward"], mean(wide(x))
    new = _pushed(held, "mean", own, fresh, keep)
    middle = _combined(new, "mean", own, behind)
    new |= _pushed(held, "variance", mean((wide(x) - middle) ** 2), fresh, keep)
    scale = jax.lax.rsqrt(_combined(new, "variance", None, behind) + eps)
    used = jax.lax.stop_gradient((own, middle, scale, fresh.astype(scale.dtype), jnp.asarray(loss_scale, scale.dtype)))
    y = _streamed(mean, (keep, ahead), *compat.varying_together((x, params)), used, extra["backward"])
    return checkpoint_name(y, "norm"), extra | {"forward": jax.lax.stop_gradient(new)}


def _empty(name: str, like) -> dict:
    """A stream to which nothing was pushed."""
    none = jnp.zeros(())
    return {f"{name}_long": like, f"{name}_short": like, f"{name}_microbatches": none, f"{name}_updates": none}


def _words(dims: str) -> dict[str, str]:
    """Dims of the streams of one pass."""
    leaves = {"long": dims, "short": dims, "microbatches": "", "updates": ""}
    return {f"{name}_{leaf}": words for name in ("mean", "variance") for leaf, words in leaves.items()}


def _pushed(held, name: str, now, fresh, keep: float) -> dict:
    """The stream `name` with `now` in it; if the weights have changed, the short term goes into the long one first."""
    long, short, seen, updates = (held[f"{name}_{leaf}"] for leaf in ("long", "short", "microbatches", "updates"))
    over = (fresh > 0) & (seen > 0)
    long = jnp.where(over, jnp.where(updates > 0, keep * long + (1 - keep) * short, short), long)
    seen = jnp.where(over, 0, seen)
    new = long, (short * seen + now) / (seen + 1), seen + 1, updates + over
    return dict(zip((f"{name}_{leaf}" for leaf in ("long", "short", "microbatches", "updates")), new, strict=True))


def _combined(held, name: str, now, weights):
    """What is made of the stream called `name` and the microbatch's own; before an update there is no long term."""
    short = held[f"{name}_short"]
    long = jnp.where(held[f"{name}_updates"] > 0, held[f"{name}_long"], short)
    return weights[0] * long + weights[1] * short + (weights[2] * now if weights[2] else 0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _streamed(mean, how, x, params, used, state):
    """y; the cotangent of `state` is its next value."""
    _, middle, scale, *_ = used
    return affined(params, (wide(x) - middle) * scale).astype(x.dtype)


def _forth(mean, how, x, params, used, state):
    return _streamed(mean, how, x, params, used, state), (x, params, used, state)


def _back(mean, how, kept, dy):
    x, params, used, state = kept
    own, middle, scale, fresh, loss_scale = used
    keep, weights = how
    dy, by_row, centred = wide(dy), tuple(range(x.ndim - 1)), wide(x) - middle
    found = {"gain": dy * centred * scale, "bias": dy}
    found = {name: found[name].sum(by_row).astype(leaf.dtype) for name, leaf in params.items()}
    inner = dy * params["gain"] * scale
    # gradients by variance and mean, as means over examples rather than sums
    by_variance = -mean(inner * centred) * scale**2 / 2
    new = _pushed(state, "variance", by_variance / loss_scale, fresh, keep)
    by_variance = _combined(new, "variance", by_variance / loss_scale, weights) * loss_scale
    by_mean = -mean(inner) - 2 * by_variance * (own - middle)
    new |= _pushed(state, "mean", by_mean / loss_scale, fresh, keep)
    by_mean = _combined(new, "mean", by_mean / loss_scale, weights) * loss_scale
    new = {name: compat.vary(new[name], compat.varying_axes(leaf)) for name, leaf in state.items()}
    dx = inner + by_mean + 2 * by_variance * centred
    return dx.astype(x.dtype), found, jax.tree.map(jnp.zeros_like, used), new


_streamed.defvjp(_forth, _back)
