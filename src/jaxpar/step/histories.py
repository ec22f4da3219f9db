"""State for delayed scaling around any model: each operand of each product has a history, and no layer knows of it.

Which leaves are weights of products is found in the trace of each part of the model. Such a leaf enters the layers as
`Recorded`, with the histories of the operands of its product; what becomes of these is their cotangent, as for any
state of the backward pass.
"""

from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpar.core.parts import chain
from jaxpar.core.policy import Policy
from jaxpar.core.refuse import Problem, Refused
from jaxpar.core.types import Context, Layer, Tree
from jaxpar.layers.stack import stack
from jaxpar.plan.context import context
from jaxpar.plan.contraction import Recorded
from jaxpar.plan.layout import SINGLE
from jaxpar.plan.product import Settings
from jaxpar.plan.wire import ledger
from jaxpar.step.cut import Traced, trace

ROLES = ("activation", "weight", "gradient")


def remembering(model: Layer, policy: Policy, inputs) -> Layer:
    """The model with a history for each operand of its products; the model itself under a policy without histories.

    The state of a part becomes `{"own": ..., "precision": {"backward": {leaf: {role: history}}}}`. Weights that share
    an x in one call share its history, which is that of the first. Without a history, and so scaled as they are, stay
    weights that are used more than once in a part, in a loop over time or after arithmetic, and those of stacks within
    parts: where a weight is used several times cotangents add up, and histories must not.

    Args:
        model: from inputs to logits.
        policy: precision.
        inputs: `jax.ShapeDtypeStruct` of the inputs of a batch.

    Raises:
        Refused: for a policy that has a history and no `remember`.
    """
    if policy.history is None:
        return model
    if policy.remember is None:
        rule = "has a `history` and nothing that makes the next one."
        raise Refused([Problem("plan.precision", "its policy", rule, "Policy(..., history=..., remember=...)")])
    settings = Settings(SINGLE, policy, ledger({}).wire, train=False)
    params, extra = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    x = jax.ShapeDtypeStruct(inputs.shape, jax.dtypes.canonicalize_dtype(inputs.dtype))
    return _remembering(model, settings, params, extra, x)[0]


def _remembering(layer: Layer, settings: Settings, params: Tree, extra: Tree, x) -> tuple[Layer, object]:
    """The layer with histories, and what is known of its result; other arguments as of its `apply`."""
    if layer.blocks:
        one = [jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), a) for a in (params, extra)]
        body, y = _unit(layer.parts[0].layer, settings, *one, x)
        return stack(body, layer.blocks), y
    if not layer.parts:
        return _unit(layer, settings, params, extra, x)
    parts = {}
    for name, part, reads in layer.parts:
        parts[name], x = _remembering(part, settings, params[reads], extra.get(name, {}), x)
    return chain(parts, {name: reads for name, _, reads in layer.parts if reads != name}), x


def _unit(layer: Layer, settings: Settings, params: Tree, extra: Tree, x) -> tuple[Layer, object]:
    """The same for a layer that is not looked into."""
    roles, y = _recorded(layer, settings, params, extra, x)
    return (_with_state(layer, settings.policy.history, roles) if roles else layer), y


def _with_state(layer: Layer, begin: Callable, roles: dict[str, tuple[str, ...]]) -> Layer:
    """The layer with histories.

    Args:
        layer: the layer.
        begin: `Policy.history`.
        roles: by the name of a leaf, which operands of its product have a history.
    """

    def init(key):
        params, extra = layer.init(key)
        backward = {name: {role: begin() for role in own} for name, own in roles.items()}
        return params, {"own": extra, "precision": {"backward": backward}}

    def apply(params, extra, x, ctx):
        histories = extra["precision"]["backward"]

        def recorded(path, leaf):
            return Recorded(leaf, histories[_name(path)]) if _name(path) in histories else leaf

        y, own = layer.apply(jax.tree_util.tree_map_with_path(recorded, params), extra["own"], x, ctx)
        return y, extra | {"own": own}

    words = jax.tree.map(lambda leaf: " ".join("-" * leaf.ndim), jax.eval_shape(begin))
    backward = {name: dict.fromkeys(own, words) for name, own in roles.items()}
    dims = layer.dims[0], {"own": layer.dims[1], "precision": {"backward": backward}}
    return layer._replace(init=init, apply=apply, dims=dims, parts=())


def _name(path) -> str:
    """Of a leaf of the parameters of a layer, such as `"mlp.up.weight"`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _recorded(layer: Layer, settings: Settings, params: Tree, extra: Tree, x) -> tuple[dict, object]:
    """By the name of each leaf that is the weight of one product and nothing else: which operands have a history there.

    With it goes what is known of the layer's result.
    """

    def run(params, extra, x):
        calls: list[tuple] = []
        y, _ = layer.apply(params, extra, x, _recording(context(settings), calls))
        return calls, y

    traced = trace(run, params, extra, x)
    calls, y = jax.tree.unflatten(traced.structure, traced.outputs)
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    reads = [*traced.outputs, *(one for line in traced.lines for one in line.reads)]
    uses, found = Counter(one for one in reads if isinstance(one, int)), {}
    for weights in calls:
        for number, weight in enumerate(weights):
            leaf = _leaf(traced, uses, weight)
            if leaf is not None and leaf < len(names):
                found[names[leaf]] = ROLES[1:] if number else ROLES
    return found, jax.tree.map(lambda one: traced.values[one].aval if isinstance(one, int) else one.aval, y)


def _leaf(traced: Traced, uses: Counter, value) -> int | None:
    """The argument that a value is, as it is or transposed, if nobody else reads it."""
    while isinstance(value, int) and uses[value] == 1:
        line = traced.values[value].line
        if line is None:
            return value if value not in traced.fixed else None
        if line.equation.primitive.name != "transpose":
            return None
        value = line.reads[0]
    return None


def _recording(ctx: Context, calls: list[tuple]) -> Context:
    """A Context that adds the weights of each product outside of loops to `calls`, and reads zeros instead of them."""
    inside = []

    def noted(weights: tuple) -> tuple:
        if inside or not all(isinstance(w, jax.Array) for w in weights):
            return weights
        calls.append(weights)
        return tuple(jnp.zeros(w.shape, w.dtype) for w in weights)

    def dot(x, w, dims):
        if isinstance(dims, str):
            return ctx.dot(x, *noted((w,)), dims)
        return ctx.dot(x, noted(tuple(w)), dims)

    def loop(body, carry, xs):
        inside.append(True)
        found = ctx.loop(body, carry, xs)
        inside.pop()
        return found

    def conv(x, w, dims, *rest, **window):
        if isinstance(dims, str):
            return ctx.conv(x, *noted((w,)), dims, *rest, **window)
        return ctx.conv(x, noted(tuple(w)), dims, *rest, **window)

    return ctx._replace(dot=dot, conv=conv, loop=loop)
