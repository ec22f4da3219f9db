"""What norms share: shifting and scaling by a mean and a variance, and the gain and bias behind it."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpar.core import compat
from jaxpar.core.refuse import Problem, Refused, refuse

SPACE = {2: "", 3: "context", 4: "height width", 5: "depth height width"}  # rows of one example, by the rank of x


def rows(x) -> str:
    """All row words of x: its examples, and what is within one."""
    return f"batch {SPACE[x.ndim]}".strip()


def wide(x):
    """x in float32, or in float64 if it is that."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def wrong(text: str, rule: str, legal: str) -> Refused:
    """That a norm, as `model.norm` says it, cannot be."""
    return Refused([Problem("model.norm", text, rule, legal)])


def ranges(norm: str, **given: tuple[float, float, float]) -> None:
    """Refuse arguments of a norm that are out of range.

    Args:
        norm: its name.
        given: of each argument its value, the least and the most.
    """
    problems = []
    for name, (value, least, most) in given.items():
        if not least <= value <= most:
            rule = f"`{name}` must be at least {least}" + (f" and at most {most}." if most < math.inf else ".")
            problems.append(Problem("model.norm", f"{norm}:{name}={value}", rule, f"{norm}:{name}={least}"))
    refuse(problems)


def refuse_cut(norm: str, examples: int, replicas: int) -> None:
    """Refuse to cut a microbatch into parts that are not equal."""
    if examples % replicas:
        rule = f"a microbatch of {examples} examples is not {replicas} equal parts."
        raise wrong(f"{norm}:replicas={replicas}", rule, f"replicas={math.gcd(examples, replicas)}")


def affine(width: int, dims: str, *, gain: bool = True, bias: bool = True) -> tuple[Callable, dict[str, str]]:
    """`init()` of a gain of ones and a bias of zeros, as far as they are wanted, and their dims."""
    wanted = {"gain": jnp.ones} if gain else {}
    wanted |= {"bias": jnp.zeros} if bias else {}
    return lambda: {name: make(width) for name, make in wanted.items()}, dict.fromkeys(wanted, dims)


def affined(params, y):
    """y times the gain plus the bias, as far as there are any."""
    y = y * params["gain"] if "gain" in params else y
    return y + params["bias"] if "bias" in params else y


def moved(params, y, dtype):
    """The same in `dtype`; an activation called norm."""
    return checkpoint_name(affined(params, y).astype(dtype), "norm")


def standardized(mean: Callable, x, params, eps: float, *, centre: bool = True):
    """x less its mean over the root of its variance, times a gain, plus a bias.

    Of the activations only x itself is kept for the way back, in its own dtype: jax on its own would keep two arrays
    of float32. Back and forth the same means are taken, so the bill of the way back is that of any mean.

    Args:
        mean: `mean(a)`: a mean of entries that go together, kept as dims of size 1 or given to each of them; applied
            twice it must give what it gives once.
        x: entries, of any dtype.
        params: `{"gain", "bias"}`, or none or one of them.
        eps: added to the variance, so in units of x squared.
        centre: whether to take away the mean; else the variance is the mean square.

    Returns:
        y in the dtype of x; mean and variance in float32 or wider, to look at: no gradient goes through them. In two
        passes, since a mean of squares less the square of the mean loses digits.
    """
    y, moments = _standardized(mean, (eps, centre), *compat.varying_together((x, params)))
    return checkpoint_name(y, "norm"), jax.lax.stop_gradient(moments)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _standardized(mean, how, x, params):
    return _forth(mean, how, x, params)[0]


def _forth(mean, how, x, params):
    eps, centre = how
    centred = wide(x)
    middle = mean(centred) if centre else None
    centred = centred - middle if centre else centred
    variance = mean(centred**2)
    scale = jax.lax.rsqrt(variance + eps)
    y = affined(params, centred * scale).astype(x.dtype)
    return (y, (middle, variance)), (x, middle, scale, params)


def _back(mean, how, kept, cotangents):
    x, middle, scale, params = kept
    dy, by_row = wide(cotangents[0]), tuple(range(x.ndim - 1))
    standard = (wide(x) - middle if how[1] else wide(x)) * scale
    found = {"gain": dy * standard, "bias": dy}
    found = {name: found[name].sum(by_row).astype(leaf.dtype) for name, leaf in params.items()}
    inner = dy * params["gain"] if "gain" in params else dy
    inner = inner - standard * mean(inner * standard) - (mean(inner) if how[1] else 0)
    return (inner * scale).astype(x.dtype), found


_standardized.defvjp(_forth, _back)
