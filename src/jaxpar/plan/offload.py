"""What rests in the memory of the host between uses, and how it is brought to the device.

jax types every array with the memory that it lies in, so nothing here is told what is offloaded: an array of the host
is seen to be one. It takes part in nothing but slices along its first dim and moves, which XLA makes transfers; the
host's cores would do arithmetic on it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpar.core import compat
from jaxpar.core.cells import Order
from jaxpar.core.plan import Plan
from jaxpar.core.refuse import Collector, Problem, Refused, near_miss
from jaxpar.core.types import Tree

KINDS = ("parameters", "optimizer", "activations")
NONE = "none"
HOST = "pinned_host"  # jax's name of memory that the device reads and writes by itself
JOINED = "+"
CUT = ("sqrt", "nested", "binomial", "budget")  # remat that runs a stack in pieces
KEEPING = ("block", "names")  # remat that keeps few activations, which it knows by name


def parse(text: str) -> frozenset[str]:
    """What `plan.offload` names, in any order; the empty set for `none`.

    Raises:
        Refused: for each name that is none (with the likeliest), and for one that is given twice.
    """
    if text == NONE:
        return frozenset()
    names = [name.strip() for name in text.split(JOINED)]
    legal = KINDS if NONE in names else (*KINDS, NONE)
    wrong = [
        Problem("plan.offload", text, f"there is no `{name}` to offload.", near_miss(name, legal))
        for name in dict.fromkeys(names)
        if name not in KINDS
    ]
    if not wrong and len(set(names)) < len(names):
        wrong = [Problem("plan.offload", text, "names something twice.", JOINED.join(dict.fromkeys(names)))]
    if wrong:
        raise Refused(wrong)
    return frozenset(names)


def of_plan(plan: Plan) -> Iterator[Problem]:
    """What is wrong with `plan.offload`, or cannot go with it."""
    found = Collector([])
    chosen = found.attempt(parse, plan.offload) or frozenset()
    yield from found.problems
    if "parameters" in chosen:
        yield from _of_parameters(plan)
    if "activations" in chosen:
        yield from _of_activations(plan)


def _of_parameters(plan: Plan) -> Iterator[Problem]:
    """Parameters come to the device block by block, forward and back, so blocks must be run by one scan over them."""
    without = f"; or offload={_without('parameters', plan)}"
    if plan.partition == "auto":
        rule = "XLA would decide when parameters are brought to the device."
        yield Problem("plan.offload", plan.offload, rule, f"partition=manual{without}")
    if plan.unroll == "true":
        rule = "outside of a scan XLA brings parameters once, and keeps them until their gradients are found."
        yield Problem("plan.unroll", "true", f"plan.offload = {plan.offload}: {rule}", f"unroll=auto{without}")
    if not plan.regather:
        rule = "what was brought for the forward pass is not kept for the backward pass."
        yield Problem("plan.regather", "false", f"plan.offload = {plan.offload}: {rule}", f"regather=true{without}")
    if plan.zero in (1, 2):
        rule = f"under plan.zero = {plan.zero} every device holds all parameters, and updates a part of them."
        yield Problem("plan.offload", plan.offload, rule, f"zero=3 or zero=0{without}")
    if (kind := plan.remat.partition(":")[0]) in CUT:
        rule = f"remat={kind} cuts stacks of parameters into pieces, which would be copied in the memory of the host."
        yield Problem("plan.remat", plan.remat, f"plan.offload = {plan.offload}: {rule}", f"remat=block{without}")


def _of_activations(plan: Plan) -> Iterator[Problem]:
    """What goes to the host is what remat keeps, so it must say what that is."""
    without = f"; or offload={_without('activations', plan)}"
    if plan.remat.partition(":")[0] not in KEEPING:
        rule = f"plan.remat = {plan.remat} does not say which few activations are kept, to rest on the host."
        yield Problem(
            "plan.offload", plan.offload, rule, f"remat=block, or remat=names:query+key and the like{without}"
        )
    if plan.partition == "auto":
        rule = "XLA would decide where activations rest."
        yield Problem("plan.offload", plan.offload, rule, f"partition=manual{without}")
    if plan.storage == "residual":
        rule = "what a stage keeps between its forward and its backward work lies in pools on the device."
        yield Problem(
            "plan.storage", plan.storage, f"plan.offload = {plan.offload}: {rule}", f"storage=recompute{without}"
        )


def of_order(plan: Plan, order: Order) -> Iterator[Problem]:
    """Whether a schedule leaves blocks in one scan."""
    found = Collector([])
    chosen = found.attempt(parse, plan.offload) or frozenset()
    if chosen - {"optimizer"} and any(cell.kind == "W" for row in order.work for cell in row):
        rule = f"plan.schedule = {plan.schedule} takes the two gradients of a block apart, which a scan finds at once."
        legal = f"schedule=one_f_one_b; or offload={'optimizer' if 'optimizer' in chosen else NONE}"
        yield Problem("plan.offload", plan.offload, rule, legal)


def _without(name: str, plan: Plan) -> str:
    """The rest of what is offloaded."""
    return JOINED.join(kind for kind in KINDS if kind in parse(plan.offload) - {name}) or NONE


def on_host(leaf) -> bool:
    """Whether an array, inside `jax.jit`, lies in the memory of the host."""
    return jax.typeof(leaf).memory_space == jax.memory.Space.Host


def to_device(leaf):
    """An array of the host brought to the device; any other as it is."""
    return jax.device_put(leaf, jax.memory.Space.Device) if on_host(leaf) else leaf


def to_where(leaf, like):
    """An array of the device put where `like` lies."""
    return jax.device_put(leaf, jax.memory.Space.Host) if on_host(like) else leaf


def resting(shardings: Tree, shapes: Tree) -> Tree:
    """Shardings of a tree that rests on the host; single numbers, such as counts, stay on the device."""
    return jax.tree.map(lambda one, leaf: one.with_memory_kind(HOST) if leaf.ndim else one, shardings, shapes)


class Hosted(NamedTuple):
    """A parameter of a stack of blocks that rests on the host, as it goes through a model until it is `brought`.

    A gradient has the type of what it is of, so one of `array` would lie on the host as well, and be added up there.
    It is taken by `shadow` instead.

    Attributes:
        array: the parameter; it has no gradient.
        shadow: zeros in its shape on the device, which nobody reads, so that they are never there.
    """

    array: Any
    shadow: Any


def entered(dims: Tree, params: Tree) -> Tree:
    """Parameters as a step takes them: of those on the host, stacks of blocks as `Hosted`, and the rest brought here.

    What is no stack is read at both ends of a step, or kept from its forward to its backward pass, so that to bring it
    anew would save nothing.

    Args:
        dims: tree of dim strings.
        params: local parts.
    """

    def one(words, leaf):
        if not (on_host(leaf) and words.startswith("layers ")):
            return to_device(leaf)
        return Hosted(leaf, compat.vary(jnp.zeros(leaf.shape, leaf.dtype), compat.varying_axes(leaf)))

    return jax.tree.map(one, dims, params)


def brought(tree: Tree) -> Tree:
    """A tree whose `Hosted` parameters are on the device, ready for use."""
    return jax.tree.map(lambda leaf: _bring(*leaf) if _is_hosted(leaf) else leaf, tree, is_leaf=_is_hosted)


def any_hosted(tree: Tree) -> bool:
    """Whether `brought` would have something to bring."""
    return any(map(_is_hosted, jax.tree.leaves(tree, is_leaf=_is_hosted)))


def apart(tree: Tree) -> tuple[Tree, list]:
    """A tree of parameters with shadows in place of `Hosted`, which is what is differentiated; and the arrays."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_hosted)
    trained = [leaf.shadow if _is_hosted(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, trained), [leaf.array if _is_hosted(leaf) else None for leaf in leaves]


def together(trained: Tree, arrays: list) -> Tree:
    """The inverse of `apart`."""
    leaves, structure = jax.tree.flatten(trained)
    pairs = zip(leaves, arrays, strict=True)
    return jax.tree.unflatten(structure, [leaf if array is None else Hosted(array, leaf) for leaf, array in pairs])


@jax.custom_jvp
def _bring(array, shadow):
    return to_device(array)


@_bring.defjvp
def _bring_jvp(primals, tangents):
    return to_device(primals[0]), tangents[1]


def _is_hosted(node) -> bool:
    return isinstance(node, Hosted)
