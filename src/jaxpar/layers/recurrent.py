"""Recurrent layers: a loop over positions in the inner layout, with a norm inside each gate or none."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpar.core.backward import begun, ended, halves, merged
from jaxpar.core.moments import wide
from jaxpar.core.parts import broadened, join, normal
from jaxpar.core.types import Layer

GATES = ("reset", "update", "new")  # of a gru
LSTM_GATES = ("input", "forget", "out", "new")
MakeNorm = Callable[..., Layer]  # a member of norms/, called as `make(width, dims, bias=bias)`


class Cell(NamedTuple):
    """One kind of recurrence.

    Attributes:
        gates: what there is a weight of the input and one of the state for.
        norms: what is normalized, if there are norms; state, and running statistics, are shared by all positions.
        states: how many states it has; the first is its output.
        step: `step(inputs, recurrent, states, normed) -> states`: from the products of each gate, biases added, with
            `normed(name, a)`.
    """

    gates: tuple[str, ...]
    norms: tuple[str, ...]
    states: int
    step: Callable


def rnn(
    width: int, hidden: int, function: Callable = jnp.tanh, *, norm: MakeNorm | None = None, bias: bool = True
) -> Layer:
    """A recurrence with one gate: h' = function(norm(W x + b + U h + c)).

    Args: as of `gru`, and the elementwise function.

    Source: Elman 1990, doi:10.1016/0364-0213(90)90002-E; with norms Chiley et al. 2019, arXiv:1905.05894, section 5.
    """

    def step(inputs, recurrent, states, normed):
        return (_named(function(normed("new", inputs[0] + recurrent[0]))),)

    return unrolled(Cell(("new",), ("new",), 1, step), width, hidden, norm=norm, bias=bias)


def lstm(width: int, hidden: int, *, norm: MakeNorm | None = None, bias: bool = True) -> Layer:
    """Long short-term memory from zero states.

        i, f, o = sigmoid(norm_(W_ x + b_ + U_ h + c_)) of each,   g = tanh(norm_g(W_g x + b_g + U_g h + c_g))
        c' = f c + i g,   h' = o tanh(norm_c(c'))

    Args: as of `gru`; norms are called after the gates, and `cell`.

    Source: Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735, with the forget gate of Gers et al. 2000.
    """

    def step(inputs, recurrent, states, normed):
        sums = [normed(gate, a + b) for gate, a, b in zip(LSTM_GATES, inputs, recurrent, strict=True)]
        take, keep, show = (_named(jax.nn.sigmoid(a)) for a in sums[:3])
        cell = keep * states[1] + take * _named(jnp.tanh(sums[3]))
        return show * jnp.tanh(normed("cell", cell)), cell

    return unrolled(Cell(LSTM_GATES, (*LSTM_GATES, "cell"), 2, step), width, hidden, norm=norm, bias=bias)


def gru(width: int, hidden: int, *, norm: MakeNorm | None = None, bias: bool = True) -> Layer:
    """A gated recurrent unit from a zero state, whose reset gate acts after the hidden product.

        r = sigmoid(W_r x + b_r + U_r h + c_r),   z = sigmoid(W_z x + b_z + U_z h + c_z)
        n = tanh(W_n x + b_n + r (U_n h + c_n)),  h' = (1 - z) n + z h

    Args:
        width: features of x, dim `embed`.
        hidden: features of h, dim `mlp`.
        norm: makes the norm of each gate, which is applied to the sum of both its products and biases; None for none.
        bias: whether to have b and c, and norms a bias.

    Returns:
        A layer from `x[batch, context, width]` to all states, `h[batch, context, hidden]`, in inner rows.

    Source: Cho et al. 2014, arXiv:1406.1078, in the variant of cuDNN; section 5 of the CUDNN API reference.
    """

    def step(inputs, recurrent, states, normed):
        reset, update = (_named(jax.nn.sigmoid(normed(GATES[n], inputs[n] + recurrent[n]))) for n in (0, 1))
        new = _named(jnp.tanh(normed("new", inputs[2] + reset * recurrent[2])))
        return ((1 - update) * new + update * states[0],)

    return unrolled(Cell(GATES, GATES, 1, step), width, hidden, norm=norm, bias=bias)


def _named(gate):
    return checkpoint_name(gate, "gates")


def unrolled(cell: Cell, width: int, hidden: int, *, norm: MakeNorm | None = None, bias: bool = True) -> Layer:
    """The layer of a cell, with params `{gate}_in`, `{gate}_hidden` and, with norms, `norm`; from zero states.

    Args: as of `gru`.

    Returns:
        A layer of `x[batch, context, width]`; of `(x, states)` too, to begin with others, each `[batch, hidden]`.
    """
    dims = {f"{gate}_in": {"weight": "embed mlp"} for gate in cell.gates}
    dims |= {f"{gate}_hidden": {"weight": "mlp mlp"} for gate in cell.gates}
    if bias:
        dims = {name: leaves | {"bias": "mlp"} for name, leaves in dims.items()}
    norms = {name: norm(hidden, "mlp", bias=bias) for name in cell.norms} if norm else {}
    init_norms, norm_dims = join(norms)

    def init(key):
        params = {}
        for name, part in zip(dims, jax.random.split(key, len(dims)), strict=True):
            into = width if name.endswith("_in") else hidden
            params[name] = {"weight": normal(part, (into, hidden), hidden**-0.5)}
            if bias:
                params[name]["bias"] = jnp.zeros(hidden)
        trained, state = init_norms(jax.random.fold_in(key, len(dims)))
        return (params | {"norm": trained}, {"norm": state}) if norm else (params, {})

    def apply(params, extra, x, ctx):
        x, states = x if isinstance(x, tuple) else (x, None)
        xs, step = _products(cell, params, x, ctx)
        held = jax.tree.map(ctx.hold, params["norm"], norm_dims[0]) if norm else {}

        def body(carry, inputs):
            states, new = carry[0], dict(carry[1])

            def normed(name, a):
                if name in norms:
                    a, new[name] = norms[name].apply(held[name], new[name], a, ctx)
                return a

            states = step(inputs, states, normed)
            return (states, new), states[0]

        states = states or (jnp.zeros_like(xs[0][0]),) * cell.states
        running, control = halves(extra.get("norm", {}))
        (_, after), h = ctx.loop(body, (states, merged(running, begun(control))), xs)
        running, carried = halves(after)
        h, control = ended(h, carried, control)
        return jnp.moveaxis(h, 0, 1).astype(x.dtype), extra | ({"norm": merged(running, control)} if norm else {})

    return Layer(init, apply, dims=(dims | {"norm": norm_dims[0]}, {"norm": norm_dims[1]}) if norm else (dims, {}))


def _products(cell: Cell, params, x, ctx) -> tuple[list, Callable]:
    """The products of the input of all positions, positions first, and `step(inputs, states, normed)` with the others.

    Weights are fetched once, ahead of the loop.
    """
    ins, states = ([params[f"{gate}_{side}"] for gate in cell.gates] for side in ("in", "hidden"))
    xs = ctx.dot(x, tuple(part["weight"] for part in ins), ("embed mlp",) * len(ins))
    xs = [broadened(y, part["bias"]) if "bias" in part else y for y, part in zip(xs, ins, strict=True)]
    xs = [wide(jnp.moveaxis(checkpoint_name(y, "inputs"), 1, 0)) for y in xs]
    held = [ctx.hold(part["weight"], "mlp mlp") for part in states]
    biases = [ctx.hold(part["bias"], "mlp") if "bias" in part else 0.0 for part in states]

    def step(inputs, states, normed):
        products = ctx.dot(states[0], held, ("mlp mlp",) * len(held))
        pairs = zip(products, biases, strict=True)
        recurrent = [checkpoint_name(y.astype(states[0].dtype) + c, "recurrent") for y, c in pairs]
        return cell.step(inputs, recurrent, states, normed)

    return xs, step
