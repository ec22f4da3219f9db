"""The update of parameters and optimizer state that rest on the host: layer by layer, so that few are on the device.

An optimizer that treats each entry by itself, but for single numbers such as a rate, treats a layer as it treats a
stack of layers. Whether it does is seen in its trace.

Source: Ren et al. 2021 (ZeRO-Offload), arXiv:2101.06840, for what rests where; here the device computes the update.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from jaxpar.core.types import State, Tree
from jaxpar.core.walk import jaxprs
from jaxpar.plan.offload import to_device, to_where

# Primitives of which an entry of the result follows from the same entries of the operands.
ELEMENTWISE = frozenset(
    [
        "abs",
        "add",
        "add_any",
        "and",
        "cbrt",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "copy_p",
        "cos",
        "div",
        "eq",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "is_finite",
        "le",
        "log",
        "log1p",
        "logistic",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "nextafter",
        "not",
        "or",
        "pow",
        "pvary",
        "pcast",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "sign",
        "sin",
        "sqrt",
        "square",
        "stop_gradient",
        "sub",
        "tan",
        "tanh",
        "xor",
    ]
)
LINKS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")

Descent = Callable[[Tree, Tree, Tree, object], tuple[Tree, Tree]]


def is_elementwise(optimizer: optax.GradientTransformation, params: Tree) -> bool:
    """Whether an optimizer updates each entry from the same entry of gradients, state and parameters alone.

    Args:
        optimizer: looked at through the trace of its `update`.
        params: what has shape and dtype.
    """
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    traced = jax.make_jaxpr(optimizer.update)(like, jax.eval_shape(optimizer.init, like), like)
    return _each_by_itself(traced.jaxpr)


def _each_by_itself(jaxpr) -> bool:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        read, written = (
            [var.aval.shape for var in side if var.aval.shape] for side in (equation.invars, equation.outvars)
        )
        if name in LINKS:
            fine = all(_each_by_itself(getattr(inner, "jaxpr", inner)) for inner in jaxprs(equation))
        elif not read:  # single numbers, or copies of one
            fine = not written or name == "broadcast_in_dim"
        else:
            fine = name in ELEMENTWISE and len({*read, *written}) == 1
        if not fine:
            return False
    return True


def descent(links: Sequence[optax.GradientTransformation], mesh: Mesh, words: State, specs: State) -> Descent:
    """`descend(gradients, params, opt, fine) -> (params, opt)`: an update after which each leaf lies where it did.

    Args:
        links: of the chain that the optimizer is; all but the last work on gradients alone, all of them at once.
        mesh: all devices.
        words: dims of each leaf of the State.
        specs: where each leaf lies while it is updated.
    """
    *before, last = links

    def own(tree: State):
        return tree.params, tree.opt[-1] if before else tree.opt

    def descend(gradients, params, opt, fine):
        *earlier, state = opt if before else (opt,)
        done = []
        for link, was in zip(before, earlier, strict=True):
            gradients, now = link.update(gradients, was)
            done.append(jax.tree.map(partial(jnp.where, fine), now, was))
        if is_elementwise(last, params):
            places = own(specs)
            update = jax.shard_map(
                partial(_by_layer, last, own(words)),
                mesh=mesh,
                in_specs=(places[0], *places, specs.step),
                out_specs=places,
            )
        else:
            update = partial(_at_once, last)
        params, state = update(gradients, params, state, fine)
        return params, ((*done, state) if before else state)

    return descend


def _at_once(link: optax.GradientTransformation, gradients, params, state, fine) -> tuple[Tree, Tree]:
    """The update with all of params and state on the device."""
    old = jax.tree.map(to_device, (params, state))
    updates, state_now = link.update(gradients, old[1], old[0])
    new = optax.apply_updates(old[0], updates), state_now
    return jax.tree.map(lambda now, was, there: to_where(jnp.where(fine, now, was), there), new, old, (params, state))


def _by_layer(link: optax.GradientTransformation, words, gradients, params, state, fine) -> tuple[Tree, Tree]:
    """The same for local parts, of which those of one layer are on the device at a time; of what is no stack, all.

    Args:
        link: an optimizer that is elementwise.
        words: dims of (params, state).
        gradients, params, state: local parts.
        fine: whether to update.
    """
    leaves, structure = jax.tree.flatten((params, state))
    named = jax.tree.leaves(words)
    update = partial(_updated, link, gradients, fine)
    for layers in sorted({leaf.shape[0] for one, leaf in zip(named, leaves, strict=True) if _is_stacked(one)}):
        turn = [_is_stacked(one) and leaf.shape[0] == layers for one, leaf in zip(named, leaves, strict=True)]

        def body(layer, held, layers=layers, turn=turn):
            def slice_of(own, leaf):
                mine = _is_stacked(own) and leaf.shape[0] == layers
                return to_device(lax.dynamic_slice_in_dim(leaf, layer, 1)) if mine else _nothing(own, leaf)

            new = jax.tree.leaves(update(named, slice_of, jax.tree.unflatten(structure, held)))
            return [
                lax.dynamic_update_slice_in_dim(leaf, to_where(now, leaf), layer, 0) if mine else leaf
                for mine, leaf, now in zip(turn, held, new, strict=True)
            ]

        leaves = lax.fori_loop(0, layers, body, leaves)

    def pick(own, leaf):
        return _nothing(own, leaf) if _is_stacked(own) else to_device(leaf)

    rest = jax.tree.leaves(update(named, pick, jax.tree.unflatten(structure, leaves)))
    found = list(zip(named, leaves, rest, strict=True))
    return jax.tree.unflatten(
        structure, [leaf if _is_stacked(one) else to_where(new, leaf) for one, leaf, new in found]
    )


def _updated(link: optax.GradientTransformation, gradients, fine, named: list[str], pick: Callable, old: tuple):
    """New (params, state) for the parts of leaves that `pick(words, leaf)` gives.

    They are in a tree like the whole, since masks and labels of optimizers have its form; what is not wanted has no
    entries in it.

    Args:
        named: dims of each leaf of `old`.
        old: all of (params, state).
    """
    leaves, structure = jax.tree.flatten(old)
    slopes, form = jax.tree.flatten(gradients)
    params, state = jax.tree.unflatten(structure, list(map(pick, named, leaves)))
    moves, now = link.update(jax.tree.unflatten(form, list(map(pick, named, slopes))), state, params)
    return jax.tree.map(partial(jnp.where, fine), (optax.apply_updates(params, moves), now), (params, state))


def _is_stacked(words: str) -> bool:
    return words.startswith("layers ")


def _nothing(words: str, leaf):
    """No entries, in as many dims; what follows no parameter as it is."""
    return jnp.zeros((0, *leaf.shape[1:]), leaf.dtype) if words and leaf.ndim else leaf
