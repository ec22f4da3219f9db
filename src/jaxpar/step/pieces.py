"""What one stage does with one microbatch: forward, gradient of its input, gradient of its weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpar.core import compat
from jaxpar.core.backward import halves, merged
from jaxpar.core.types import Tree
from jaxpar.plan import offload, zero
from jaxpar.plan.context import Settings, context
from jaxpar.step import stages
from jaxpar.step.cut import Value, cut, trace
from jaxpar.step.messages import Boundary
from jaxpar.step.stages import Stage

GATHERS = ("all_gather", "all_gather_invariant", "all_gather_reduced")
VIEWS = (
    "reshape",
    "transpose",
    "broadcast_in_dim",
    "squeeze",
    "expand_dims",
    "pcast",
    "pvary",
    "copy",
    "name",
)  # cheap
SLICES = ("slice", "dynamic_slice")


class Given(NamedTuple):
    """What a piece of work reads.

    Attributes:
        own: parameters, by the name of the part.
        forward, backward: the two halves of the state without gradient, by the name of the part.
        x: the message of the stage before; () on the first stage.
        data: (inputs, labels) of the microbatch.
        place: (number of the microbatch, number of the first block of each piece).
        seed: gradient of the loss by what the stage gives.
    """

    own: Tree
    forward: Tree
    backward: Tree
    x: Any
    data: tuple
    place: tuple
    seed: Any


class Made(NamedTuple):
    """What a piece of work makes, as far as it does; None where it does not.

    Attributes:
        y: the message to the next stage.
        loss: the device's part of the mean loss, on the last stage.
        forward: new state without gradient.
        x: gradient of the message of the stage before.
        backward: new state of the backward pass.
        own: gradients of parameters, by the name of the part.
    """

    y: Any = None
    loss: Any = None
    forward: Tree = None
    x: Any = None
    backward: Tree = None
    own: Tree = None


class Work(NamedTuple):
    """One kind of work of one stage.

    Attributes:
        run: `run(given, kept, between) -> (made, keeps)`: `kept` is what F kept, `between` what B did.
        makes: which fields of `Made`.
        keeps: what it keeps: arrays, or what is known of them.
    """

    run: Callable[[Given, list, list], tuple[Made, list]]
    makes: frozenset[str]
    keeps: tuple = ()


class Role(NamedTuple):
    """What stages that run the same code have in common.

    Attributes:
        stage: one of them.
        takes: what it receives, a tree of shapes; None on the first stage.
        last: whether it ends with the loss.
    """

    stage: Stage
    takes: Tree
    last: bool


Forward = Callable[[Given], tuple[Any, Tree]]  # (message, or the device's part of the loss; new forward state)


def forward_of(role: Role, settings: Settings, boundary: Boundary, examples: int, loss: Callable) -> Forward:
    """The forward pass of a stage.

    Args:
        role: the stage.
        settings: with the key of the step.
        boundary: of all stages.
        examples: of one microbatch, over all devices.
        loss: `loss(ctx, logits, labels)`: the device's part of the mean.
    """

    def forward(given: Given):
        number, firsts = given.place
        here = settings._replace(first_example=number * examples)
        x = given.data[0] if role.takes is None else boundary.receive(given.x, role.takes)
        extra = merged(given.forward, given.backward)
        y, new = stages.apply(role.stage, given.own, extra, x, here, firsts)
        out = loss(context(here), y, given.data[1]) if role.last else boundary.send(y)
        return out, halves(new)[0]

    return forward


def back_and_forth(settings: Settings, forward: Forward) -> Callable[[Given], Made]:
    """A forward pass and all that its gradients are; `settings` say how parameters rest.

    The new state of the backward pass is the cotangent of the old one: layers whose backward pass has a state say by
    their own rule of differentiation what becomes of it.
    """

    def whole(given: Given) -> Made:
        trained, other = zero.apart(settings, given.own)
        trained, arrays = offload.apart(trained)

        def run(own, backward, x):
            own = zero.together(offload.together(own, arrays), other)
            return forward(given._replace(own=own, backward=backward, x=x))

        out, pull, new = jax.vjp(run, trained, given.backward, given.x, has_aux=True)
        own, backward, x = pull(given.seed)
        return Made(out, out, new, x, backward, own)

    return whole


def forward_work(role: Role, forward: Forward) -> dict[str, Work]:
    """The one kind of work where nothing is learned."""

    def run(given, kept, between):
        out, new = forward(given)
        return (Made(loss=out) if role.last else Made(y=out, forward=new)), []

    return {"F": Work(run, frozenset(["loss"] if role.last else ["y", "forward"]))}


def recomputing(role: Role, forward: Forward, both: Callable[[Given], Made], like: Given) -> dict[str, Work]:
    """F keeps nothing but the state it saw, B begins anew with `both` passes; on the last stage F has nothing to do."""

    def ahead(given, kept, between):
        out, new = forward(given)
        return Made(y=out, forward=new), jax.tree.leaves(given.forward)

    def back(given, kept, between):
        if not role.last:
            seen = jax.tree.unflatten(jax.tree.structure(given.forward), kept)
            return both(given._replace(forward=seen))._replace(y=None, loss=None, forward=None), []
        return both(given)._replace(y=None), []

    after = {"x", "backward", "own"} | ({"loss", "forward"} if role.last else set())
    first = Work(ahead, frozenset(["y", "forward"]), tuple(jax.tree.leaves(like.forward)))
    return {"B": Work(back, frozenset(after))} | ({} if role.last else {"F": first})


def cutting(
    role: Role, both: Callable[[Given], Made], like: Given, *, residual: bool, split: bool, regather: bool
) -> dict[str, Work]:
    """The forward pass and its gradients, cut by what each finds.

    Args:
        role: the stage.
        both: its forward and backward pass.
        like: arrays like those of the work.
        residual: whether F keeps what B needs; else B begins anew.
        split: whether gradients of the weights are left to W.
        regather: whether what was gathered is gathered again rather than kept.
    """
    traced = trace(both, like)
    arguments = list(range(len(jax.tree.leaves(like))))
    numbers, over = jax.tree.unflatten(jax.tree.structure(like), arguments), set(compat.varying_axes(like.place[0]))
    results = jax.tree.unflatten(traced.structure, list(range(len(traced.outputs))))
    wanted = _wanted(role, results, residual=residual, split=split)
    live = frozenset(arguments) - frozenset(jax.tree.leaves(numbers.own))
    after = live if residual else frozenset(jax.tree.leaves(numbers.seed))
    states = frozenset(jax.tree.leaves(numbers.backward))

    def keep(value: Value) -> bool:
        name, made = value.line.equation.primitive.name, value.aval
        kept = made.ndim and not jnp.issubdtype(made.dtype, jax.dtypes.extended)  # random keys are cheap
        kept = kept and over <= set(compat.varying_axes(made))  # all that comes out of a branch varies so
        kept = kept and not (name in SLICES and value.depends <= states)  # B reads what the B before it has left
        return bool(kept and value.depends & after) and name not in VIEWS and not (regather and name in GATHERS)

    made = [jax.tree.flatten(one) for one in wanted.values()]
    fleeting = dict.fromkeys(jax.tree.leaves(numbers.forward), 0)
    fleeting |= dict.fromkeys(jax.tree.leaves(numbers.backward), list(wanted).index("B"))
    pieces = cut(traced, [flat for flat, _ in made], keep, fleeting)

    def work(kind, piece, structure):
        def run(given, kept, between):
            earlier = [value for before in pieces[: pieces.index(piece)] for value in before.keeps]
            known = dict(zip(earlier, [*kept, *between], strict=True))
            found, keeps = piece.run([known.get(n, leaf) for n, leaf in enumerate(jax.tree.leaves(given))], known)
            return jax.tree.unflatten(structure, found), keeps

        makes = frozenset(field for field, value in wanted[kind]._asdict().items() if value is not None)
        return Work(run, makes, tuple(traced.values[value].aval for value in piece.keeps))

    return {kind: work(kind, piece, shape) for kind, piece, (_, shape) in zip(wanted, pieces, made, strict=True)}


def _wanted(role: Role, results: Made, *, residual: bool, split: bool) -> dict[str, Made]:
    """Which results each kind of work finds.

    Where F keeps what B needs, it also goes through the head and back at once, so that no logits are kept. What stands
    before the blocks of the first stage has its gradients found by B, which there sends nothing.
    """
    names = [piece.part.name for piece in role.stage]
    trained = [n for n, piece in enumerate(role.stage) if jax.tree.leaves(results.own[piece.part.name])]
    stack = [n for n, piece in enumerate(role.stage) if piece.count]
    tail = (names[stack[-1] + 1 :] if stack else names[trained[-1] :]) if role.last and trained else []
    lead = (names[: stack[0]] if stack else names[: trained[0] + 1]) if role.takes is None and trained else []

    def own(chosen):
        return {name: results.own[name] for name in names if name in chosen}

    early = residual or not role.last
    if early and jax.tree.leaves([results.backward[name] for name in tail]):
        tail = []  # state of the backward pass waits for B, since F may run before the B of an earlier microbatch
    ends = Made(loss=results.loss, forward=results.forward, own=own(tail))
    ahead = ends if role.last else Made(y=results.y, forward=results.forward, own={})
    first = {"F": ahead} if early else {}
    after = Made(x=results.x, backward=results.backward)
    rest = [name for name in names if name not in tail and name not in lead]
    if role.last and not first:
        after = after._replace(loss=ends.loss, forward=ends.forward)
        lead = [*lead, *tail]
    lead = [name for name in lead if name not in tail or not first]
    back = {"B": after._replace(own=own(lead if split else [*lead, *rest]))}
    return first | back | ({"W": Made(own=own(rest))} if split else {})
