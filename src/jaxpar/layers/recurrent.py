"""Recurrent layers: a loop over positions in the inner layout."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpar.core.parts import broadened, normal
from jaxpar.core.types import Layer

GATES = ("reset", "update", "new")


def gru(width: int, hidden: int, *, bias: bool = True) -> Layer:
    """A gated recurrent unit from a zero state, whose reset gate acts after the hidden product.

        r = sigmoid(W_r x + b_r + U_r h + c_r),   z = sigmoid(W_z x + b_z + U_z h + c_z)
        n = tanh(W_n x + b_n + r (U_n h + c_n)),  h' = (1 - z) n + z h

    Args:
        width: features of x, dim `embed`.
        hidden: features of h, dim `mlp`.
        bias: whether to have b and c.

    Returns:
        A layer from `x[batch, context, width]` to all states, `h[batch, context, hidden]`, in inner rows.

    Source: Cho et al. 2014, arXiv:1406.1078, in the variant of cuDNN; section 5 of the CUDNN API reference.
    """
    dims = {f"{gate}_in": {"weight": "embed mlp"} for gate in GATES}
    dims |= {f"{gate}_hidden": {"weight": "mlp mlp"} for gate in GATES}
    if bias:
        dims = {name: leaves | {"bias": "mlp"} for name, leaves in dims.items()}

    def init(key):
        params = {}
        for name, part in zip(dims, jax.random.split(key, len(dims)), strict=True):
            into = width if name.endswith("_in") else hidden
            params[name] = {"weight": normal(part, (into, hidden), hidden**-0.5)}
            if bias:
                params[name]["bias"] = jnp.zeros(hidden)
        return params, {}

    def apply(params, extra, x, ctx):
        inputs = ctx.dot(x, tuple(params[f"{gate}_in"]["weight"] for gate in GATES), ("embed mlp",) * 3)
        if bias:
            inputs = [broadened(y, params[f"{gate}_in"]["bias"]) for gate, y in zip(GATES, inputs, strict=True)]
        inputs = [checkpoint_name(y, "inputs") for y in inputs]
        held = [ctx.hold(params[f"{gate}_hidden"]["weight"], "mlp mlp") for gate in GATES]
        biases = [ctx.hold(params[f"{gate}_hidden"]["bias"], "mlp") if bias else 0.0 for gate in GATES]

        def step(h, inputs):
            products = ctx.dot(h, held, ("mlp mlp",) * 3)
            recurrent = [
                checkpoint_name(y.astype(h.dtype) + c, "recurrent") for y, c in zip(products, biases, strict=True)
            ]
            gates = (jax.nn.sigmoid(inputs[n] + recurrent[n]) for n in (0, 1))
            reset, update = (checkpoint_name(gate, "gates") for gate in gates)
            new = checkpoint_name(jnp.tanh(inputs[2] + reset * recurrent[2]), "gates")
            h = (1 - update) * new + update * h
            return h, h

        xs = [jnp.moveaxis(y, 1, 0).astype(jnp.float32) for y in inputs]
        _, states = ctx.loop(step, jnp.zeros_like(xs[0][0]), xs)
        return jnp.moveaxis(states, 0, 1).astype(x.dtype), extra

    return Layer(init, apply, dims=(dims, {}))
