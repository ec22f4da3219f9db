"""Projections and the MLP."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpar.core import compat
from jaxpar.core.parts import broadened, normal
from jaxpar.core.refuse import Problem, Refused, near_miss
from jaxpar.core.types import Layer

ACTIVATIONS = {
    "gelu": compat.gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}


def activation(name: str):
    """The elementwise function called `name`: exact `gelu`, `gelu_tanh`, `relu` or `tanh`.

    Raises:
        Refused: if there is none; the message has the likeliest name.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    if name not in ACTIVATIONS:
        raise Refused([Problem("model.activation", name, "there is no such function.", near_miss(name, ACTIVATIONS))])
    return ACTIVATIONS[name]


def add_bias(y, params):
    """y plus the bias, if there is one, in the dtype of y."""
    return broadened(y, params["bias"]) if "bias" in params else y


def dense(into: int, out: int, dims: str, *, bias: bool = True, deviation: float | None = None) -> Layer:
    """An affine map of the last dim.

    Args:
        into: size of the last dim of x, over all devices.
        out: size of the last dim of y, over all devices.
        dims: names of the two, such as `"embed mlp"`.
        bias: whether to add a bias, zero at first.
        deviation: standard deviation of the initial weights; by default into^-1/2.

    Returns:
        A layer from `x[..., into]` to `y[..., out]`.
    """
    deviation = into**-0.5 if deviation is None else deviation

    def init(key):
        params = {"weight": normal(key, (into, out), deviation)}
        return (params | {"bias": jnp.zeros(out)} if bias else params), {}

    def apply(params, extra, x, ctx):
        return add_bias(ctx.dot(x, params["weight"], dims), params), extra

    names = {"weight": dims} | ({"bias": dims.split()[1]} if bias else {})
    return Layer(init, apply, dims=(names, {}))


def mlp(width: int, hidden: int, function: str, *, bias: bool = True, out_deviation: float | None = None) -> Layer:
    """An up projection, an elementwise function, a down projection.

    Args:
        width: features of x and y, dim `embed`.
        hidden: features in between, dim `mlp`.
        function: name of the elementwise function.
        bias: whether both projections have one.
        out_deviation: standard deviation of the initial down weights; all others 0.02.
    """
    up = dense(width, hidden, "embed mlp", bias=bias, deviation=0.02)
    down = dense(hidden, width, "mlp embed", bias=bias, deviation=out_deviation or 0.02)
    between = activation(function)

    def init(key):
        first, second = jax.random.split(key)
        return {"up": up.init(first)[0], "down": down.init(second)[0]}, {}

    def apply(params, extra, x, ctx):
        hidden, _ = up.apply(params["up"], {}, x, ctx)
        hidden = checkpoint_name(between(checkpoint_name(hidden, "up")), "activation")
        y, _ = down.apply(params["down"], {}, hidden, ctx)
        return checkpoint_name(y, "down"), extra

    return Layer(init, apply, dims=({"up": up.dims[0], "down": down.dims[0]}, {}))
