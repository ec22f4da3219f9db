"""Online normalization: statistics of the stream of examples, and gradients controlled by errors that were left.

    y_t = (x_t - mu_{t-1}) / sqrt(var_{t-1} + eps)        z_t = control(gain y_t + bias)
    var_t = f var_{t-1} + (1 - f) s_t + f (1 - f) (m_t - mu_{t-1})^2,    mu_t = f mu_{t-1} + (1 - f) m_t

with m_t, s_t the mean and variance of example t over its space (or context; of x[batch, width]: x_t and 0). Back, with
d_t the gradient of y_t and <.> means over space, in the same order of examples:

    d'_t = d_t - (1 - b) v_{t-1} y_t,                         v_t = v_{t-1} + <d'_t y_t>
    dx_t = d'_t / sqrt(var_{t-1} + eps) - (1 - b) u_{t-1},    u_t = u_{t-1} + <dx_t>

This is no derivative of the forward pass: u and v are what past gradients had of the directions 1 and y, which a
normalization takes away. v is stable while (1 - b) <y^2> < 2, which the control of errors sees to. Both are kept
as they are without a loss scale.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpar.core import compat
from jaxpar.core.moments import SPACE, affine, affined, refuse_cut, wide
from jaxpar.core.refuse import Problem, near_miss, refuse
from jaxpar.core.types import Layer

CONTROLS = ("layer_scaling", "clamp", "none")
SCALING_EPS = 1e-5  # of layer scaling, added to the mean square


class Ask(NamedTuple):
    """What one norm asks of other devices, for the x at hand.

    Attributes:
        space: `space(q)`: means over the space of each example, or over its context; dims of size 1 are kept.
        stream: `stream(decay, inputs, start) -> (before, last)`: as `ctx.recurrence`, for as many states as there are.
        together: `together(q)`: the mean of what layer scaling scales as one, for each entry.
    """

    space: Callable
    stream: Callable
    together: Callable


class Seen(NamedTuple):
    """Statistics of x, each like x with a space of one place: none has a gradient.

    Attributes:
        mean, deviation: of the stream before each example; the deviation with eps.
        own_mean, own_variance: of the example itself.
    """

    mean: jax.Array
    deviation: jax.Array
    own_mean: jax.Array
    own_variance: jax.Array


class Form(NamedTuple):
    """The numbers of a norm: decays forward and back, eps, which error compensation, and where it clamps."""

    forward: float
    backward: float
    eps: float
    control: str
    clamp: float


def online(
    width: int,
    dims: str = "embed",
    *,
    forward: float = 0.999,
    backward: float = 0.99,
    control: str = "layer_scaling",
    clamp: float = 5.0,
    groups: int = 1,
    eps: float = 1e-5,
    replicas: int = 1,
    average: bool = False,
    bias: bool = True,
) -> Layer:
    """Normalize each example by the statistics of all before it, and keep gradients orthogonal to 1 and y over time.

    The examples of a microbatch are one stream, in order, on however many devices; microbatches and steps follow each
    other. `replicas=N` cuts a microbatch into N streams that know nothing of each other: with N devices along `data`
    nothing is sent but the new states. Each keeps its own, and evaluation takes their mean; `average=true` makes one of
    them after each microbatch. In evaluation mu and var are frozen and derivatives are ordinary; the control stays.

    Args:
        width: size of the last dim of x, over all devices.
        dims: name of that dim.
        forward, backward: decays f and b per example, in (0, 1).
        control: `layer_scaling` divides an example by its root mean square, and a position of a sequence by its own, so
            that none sees later ones; `clamp` cuts at +-clamp; `none`.
        clamp: largest entry under `clamp`.
        groups: into how many equal runs layer scaling cuts the features.
        eps: added to the variance, so in units of x squared.
        replicas: streams of a microbatch, a divisor of its examples.
        average: whether streams share one state.
        bias: whether to have a bias.

    Returns:
        A layer from `x[batch, .., width]` to the same shape and dtype; statistics and state in float32.
        `extra["backward"]` has u, v and how many `passes` went back.

    Source: Chiley et al. 2019, arXiv:1905.05894, sections 3 and 4; the controller as in its reference code.
    """
    form = Form(forward, backward, eps, control, clamp)
    _check(form, width, groups, replicas)
    trained, names = affine(width, dims, bias=bias)
    states, words = ((), dims) if replicas == 1 or average else ((replicas,), f"replicas {dims}")

    def init(key):
        mean, u, v = (jnp.zeros((*states, width)) for _ in range(3))
        seen = {"mean": mean, "variance": jnp.ones((*states, width))}
        return trained(), {"forward": seen, "backward": {"u": u, "v": v, "passes": jnp.zeros(())}}

    def apply(params, extra, x, ctx):
        ask = _ask(ctx, dims, x, groups, replicas)
        if not ctx.train:
            return checkpoint_name(_still(form, ask, params, extra["forward"], x), "norm"), extra
        seen, after = _statistics(form, ask, extra["forward"], x)
        z, backward = _controlled(form, ask)(*compat.varying_together((x, params, seen)), extra["backward"], ctx.scale)
        return checkpoint_name(z, "norm"), {"forward": after, "backward": backward}

    state = {"forward": {"mean": words, "variance": words}, "backward": {"u": words, "v": words, "passes": ""}}
    return Layer(init, apply, dims=(names, state))


def _check(form: Form, width: int, groups: int, replicas: int) -> None:
    """Refuse numbers outside of their ranges."""
    found = []

    def must(fine: bool, name: str, value, rule: str, legal: str) -> None:
        if not fine:
            found.append(Problem("model.norm", f"online:{name}={value}", rule, legal))

    for name in ("forward", "backward"):
        must(0 < getattr(form, name) < 1, name, getattr(form, name), "a decay is between 0 and 1.", f"{name}=0.99")
    for name in ("clamp", "eps"):
        must(0 < getattr(form, name) < math.inf, name, getattr(form, name), "must be positive.", f"{name}=1e-5")
    for name, value in (("groups", groups), ("replicas", replicas)):
        must(value >= 1, name, value, "must be at least 1.", f"{name}=1")
    if groups >= 1:
        rule = f"{width} features, which a layer of the model has, are no {groups} equal groups."
        must(width % groups == 0, "groups", groups, rule, f"groups={math.gcd(width, groups)}")
    must(form.control in CONTROLS, "control", form.control, "there is no such one.", near_miss(form.control, CONTROLS))
    refuse(found)


def _ask(ctx, dims: str, x, groups: int, replicas: int) -> Ask:
    over = SPACE[x.ndim]
    scaled = dims if x.ndim == 3 else f"{over} {dims}".strip()

    def space(q):
        return ctx.mean(q, dims, over) if over else q

    def stream(decay, inputs, start):
        refuse_cut("online", ctx.extent("batch", len(x), beside=dims), replicas)
        given = start.reshape(*start.shape[:-1], *[1] * (x.ndim - 2), start.shape[-1]).astype(inputs.dtype)
        shared = replicas > 1 and start.ndim == 1
        given = jnp.broadcast_to(given, (replicas, *given.shape)) if shared else given
        before, last = ctx.recurrence(decay, inputs, given, f"batch {over} {dims}")
        return before, (last.mean(0) if shared else last).reshape(start.shape).astype(start.dtype)

    def together(q):
        return ctx.mean(q, dims, scaled, {dims: groups} if groups > 1 else None)

    return Ask(space, stream, together)


def _statistics(form: Form, ask: Ask, before: dict, x) -> tuple[Seen, dict]:
    """What the stream before each example was like, and the state after all of them."""
    x, keep = wide(jax.lax.stop_gradient(x)), form.forward
    own_mean = ask.space(x)
    own_variance = ask.space((x - own_mean) ** 2)
    mean, last_mean = ask.stream(keep, (1 - keep) * own_mean, before["mean"])
    inputs = (1 - keep) * (own_variance + keep * (own_mean - mean) ** 2)
    variance, last_variance = ask.stream(keep, inputs, before["variance"])
    seen = Seen(mean, jnp.sqrt(variance + form.eps), own_mean, own_variance)
    return seen, {"mean": last_mean, "variance": last_variance}


def _controlled(form: Form, ask: Ask) -> Callable:
    """`(x, params, seen, control, loss_scale) -> (z, control)` with the gradients of the controller.

    The control goes through unchanged, and its cotangent is the state: that of the result as later uses left it, if
    there were any; that of the argument as this one leaves it. So it runs against time through loops, and once for each
    microbatch through all else.
    """
    share = 1 - form.backward

    @jax.custom_vjp
    def normalized(x, params, seen, control, loss_scale):
        return forth(x, params, seen, control, loss_scale)[0]

    def forth(x, params, seen, control, loss_scale):
        z, scale = _compensated(form, ask, affined(params, (wide(x) - seen.mean) / seen.deviation))
        return (z.astype(x.dtype), control), (x, params, seen, control, scale, loss_scale)

    def back(kept, cotangents):
        x, params, seen, control, scale, loss_scale = kept
        dz, later = wide(cotangents[0]), cotangents[1]
        control = jax.tree.map(lambda new, old: jnp.where(later["passes"] > 0, new, old), later, control)
        y = (wide(x) - seen.mean) / seen.deviation
        da = _pulled(form, ask, affined(params, y), scale, dz)
        where = tuple(range(1, x.ndim - 1))
        sums, along = (q.sum(where, keepdims=True) for q in (da, da * y))
        trained = {"gain": along, "bias": sums}
        trained = {
            name: trained[name].sum(tuple(range(x.ndim - 1))).astype(leaf.dtype) for name, leaf in params.items()
        }
        places = math.prod(x.shape[1:-1])
        mean, along = (params["gain"] * ask.space(q / places) for q in (sums, along))  # of d, and of d y
        own = (seen.own_mean - seen.mean) / seen.deviation  # the mean of y
        square = seen.own_variance / seen.deviation**2 + own**2
        v_before, v = ask.stream(1 - share * square, along, control["v"] * loss_scale)
        u_before, u = ask.stream(
            form.backward, (mean - share * v_before * own) / seen.deviation, control["u"] * loss_scale
        )
        dx = (da * params["gain"] - share * v_before * y) / seen.deviation - share * u_before
        new = {"u": u / loss_scale, "v": v / loss_scale, "passes": control["passes"] + 1}
        return dx.astype(x.dtype), trained, None, new, None

    normalized.defvjp(forth, back)
    return normalized


def _still(form: Form, ask: Ask, params, state: dict, x):
    """Evaluation: frozen statistics, those of several streams averaged."""
    mean, variance = (leaf.mean(0) if leaf.ndim > 1 else leaf for leaf in (state["mean"], state["variance"]))
    z, _ = _compensated(form, ask, affined(params, (wide(x) - mean) * jax.lax.rsqrt(variance + form.eps)))
    return z.astype(x.dtype)


def _compensated(form: Form, ask: Ask, a):
    """(the control of a, what layer scaling multiplied by)."""
    if form.control == "layer_scaling":
        scale = jax.lax.rsqrt(ask.together(a**2) + SCALING_EPS)
        return a * scale, scale
    return (jnp.clip(a, -form.clamp, form.clamp) if form.control == "clamp" else a), ()


def _pulled(form: Form, ask: Ask, a, scale, dz):
    """The gradient of a by that of its control."""
    if form.control == "layer_scaling":
        z = a * scale
        return scale * (dz - z * ask.together(z * dz))
    return jnp.where(jnp.abs(a) <= form.clamp, dz, 0) if form.control == "clamp" else dz
