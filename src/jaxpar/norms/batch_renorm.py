"""Batch renormalization."""

import math

import jax.numpy as jnp

from jaxpar.core.moments import affine, moved, ranges, rows, standardized, wide
from jaxpar.core.types import Layer

ONCE = True  # per microbatch, or it would count positions of a loop as updates


def batch_renorm(
    width: int,
    dims: str = "embed",
    rmax: float = 3.0,
    dmax: float = 5.0,
    begin: int = 5000,
    eps: float = 1e-5,
    keep: float = 0.99,
    bias: bool = True,
) -> Layer:
    """Batch normalization corrected towards what evaluation will do, so that small or skewed batches do less harm.

        y = r (x - m) / s + d,  r = s / S within [1 / rmax, rmax],  d = (m - M) / S within [-dmax, dmax]

    for mean m and deviation s of the microbatch over all devices, and running ones M and S as they were before it. No
    gradient goes through r and d.

    Args:
        width: size of the last dim of x, over all devices.
        dims: name of that dim.
        rmax, dmax: the bounds in the end.
        begin: updates of the weights with r = 1 and d = 0, plain batch normalization; from then on dmax grows evenly
            until 5 times as many, rmax until 8 times, which are the 5,000, 25,000 and 40,000 of the paper. 0: at once.
        eps: added to the variance, so in units of x squared.
        keep: share of the running statistics that a microbatch keeps.
        bias: whether to have a bias.

    Returns:
        A layer from `x[batch, .., width]` to the same shape and dtype. Its state holds the running mean, the running
        deviation and how many updates it has seen; evaluation is y = (x - M) / S.

    Source: Ioffe 2017, arXiv:1702.03275, algorithm 1; for the bounds section 4.
    """
    most = math.inf
    ranges("batch_renorm", eps=(eps, 0, most), keep=(keep, 0, 1), begin=(begin, 0, most))
    ranges("batch_renorm", rmax=(rmax, 1, most), dmax=(dmax, 0, most))
    init, names = affine(width, dims, bias=bias)

    def start(key):
        return init(), {"forward": {"mean": jnp.zeros(width), "deviation": jnp.ones(width), "updates": jnp.zeros(())}}

    def apply(params, extra, x, ctx):
        held = extra["forward"]
        if not ctx.train:
            return moved(params, (wide(x) - held["mean"]) / held["deviation"], x.dtype), extra
        y, moments = standardized(lambda a: ctx.mean(a, dims, rows(x)), wide(x), {}, eps)
        mean, deviation = moments[0].reshape(-1), jnp.sqrt(moments[1].reshape(-1) + eps)
        updates = held["updates"] + ctx.fresh
        top, far = _bounds(updates - 1, begin, rmax, dmax)
        r = jnp.clip(deviation / held["deviation"], 1 / top, top)
        d = jnp.clip((mean - held["mean"]) / held["deviation"], -far, far)
        shift = d * params["gain"] + params.get("bias", 0)
        y = moved({"gain": r * params["gain"], "bias": shift}, y, x.dtype)
        now = {"mean": mean, "deviation": deviation}
        new = {name: keep * held[name] + (1 - keep) * one for name, one in now.items()}
        return y, {"forward": new | {"updates": updates}}

    return Layer(start, apply, dims=(names, {"forward": {"mean": dims, "deviation": dims, "updates": ""}}))


def _bounds(done, begin: int, rmax: float, dmax: float):
    """Of r and of d, after `done` updates."""

    def share(until):
        return jnp.clip((done - begin) / (until - begin), 0, 1) if begin else 1.0

    return 1 + (rmax - 1) * share(8 * begin), dmax * share(5 * begin)
