"""What the backward pass computes again: one word of the plan, for stacks of blocks and for loops over time alike.

A stack, or a loop, is a chain of equal steps. What is kept of each step is a policy; when steps are run again, and how
many of their states are stored, is how the chain is played.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpar.core.cells import Order
from jaxpar.core.plan import Plan
from jaxpar.core.refuse import Collector, Problem, Refused, near_miss
from jaxpar.plan import budget, offload, revolve
from jaxpar.plan.wire import GATHERED

INPUT = "input of a step"  # a name that no layer gives
NAMES = ("none", "block", "dots", "names", "sqrt", "nested", "binomial", "budget")
FORMS = {"names": "names:query+key", "nested": "nested:3", "binomial": "binomial:4", "budget": "budget:512MiB"}
UNITS = {"": 1, "B": 1} | {f"{letter}{kind}": base**power for power, letter in enumerate("KMGT", 1)
                          for kind, base in (("iB", 1024), ("B", 1000))}  # fmt: skip
PRODUCTS = ("dot_general", "conv_general_dilated")
SUMS = ("psum", "psum_invariant", "reduce_scatter", "unreduced_reduce_scatter")  # what makes a product whole


class Remat(NamedTuple):
    """`plan.remat`, read.

    Attributes:
        kind: one of NAMES.
        names: of `names:...`, the activations that are kept.
        count: of `nested` the levels, of `binomial` the snapshots, of `budget` the bytes that a device may keep.
        offload: whether what is kept lies on the host until it is needed again; of `block` and `names`.
    """

    kind: str = "none"
    names: tuple[str, ...] = ()
    count: int = 0
    offload: bool = False


NONE = Remat()


def parse(text: str) -> Remat:
    """`plan.remat` read, such as `"names:query+key"` or `"budget:512MiB"`.

    Raises:
        Refused: for an unknown name (with the likeliest), or something else after its name than it needs.
    """
    kind, colon, rest = text.partition(":")
    legal = FORMS.get(kind, kind)
    if kind not in NAMES:
        raise Refused([Problem("plan.remat", text, "there is no such policy.", near_miss(kind, NAMES))])
    if kind not in FORMS:
        if colon:
            raise Refused([Problem("plan.remat", text, f"{kind} takes nothing after its name.", legal)])
        return Remat("nested", count=2) if kind == "sqrt" else Remat(kind)
    if kind == "names":
        names = tuple(name.strip() for name in rest.split("+"))
        if not all(names) or len(set(names)) < len(names):
            raise Refused([Problem("plan.remat", text, "needs names of activations, each once, joined by +.", legal)])
        return Remat(kind, names)
    count = _bytes(rest) if kind == "budget" else int(rest) if rest.isdecimal() else 0
    if count < 1:
        what = {"nested": "levels", "binomial": "snapshots", "budget": "bytes"}[kind]
        raise Refused([Problem("plan.remat", text, f"needs a whole number of {what}, at least 1.", legal)])
    return Remat(kind, count=count)


def _bytes(text: str) -> int:
    """Bytes as in "512MiB", "2GB" or "1000"; 0 if it is none."""
    found = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): size for unit, size in UNITS.items()}
    return int(found[1]) * units.get(found[2].lower(), 0) if found else 0


def of_plan(plan: Plan) -> Iterator[Problem]:
    """What is wrong with `plan.remat`, or cannot go with it."""
    found = Collector([])
    how = found.attempt(parse, plan.remat)
    yield from found.problems
    if how is None or how.kind == "none":
        return
    if plan.unroll == "true":
        rule = f"plan.remat = {plan.remat} works in scans: elsewhere XLA merges what is run again with the first run."
        yield Problem("plan.unroll", "true", rule, "unroll=auto; or remat=none")
    if not plan.regather:
        rule = f"under plan.remat = {plan.remat} what was gathered is gathered again."
        yield Problem("plan.regather", "false", rule, "regather=true; or remat=none")
    if how.kind == "budget" and plan.partition == "auto":
        rule = "XLA decides what lies where, so what a device keeps is not known."
        yield Problem("plan.remat", plan.remat, rule, "partition=manual; or another policy, such as remat=dots")


def of_order(plan: Plan, order: Order) -> Iterator[Problem]:
    """Whether the order leaves gradients of weights for later, where a scan finds them with those of activations."""
    if plan.remat != "none" and any(cell.kind == "W" for row in order.work for cell in row):
        rule = f"plan.schedule = {plan.schedule} takes the two gradients of a block apart, which a scan finds at once."
        yield Problem("plan.remat", plan.remat, rule, "remat=none; or schedule=one_f_one_b")


Saveable = Callable[
    ..., bool
]  # `saveable(primitive, *avals, **params)`: whether the result of an operation may be kept


def nothing(primitive, *_, **__) -> bool:
    """Keep what a step is given, and nothing that it makes."""
    return False


def dots(primitive, *_, **__) -> bool:
    """Keep the results of products and, where these are partial sums, the sums."""
    return primitive.name in PRODUCTS + SUMS


def named(names: tuple[str, ...]) -> Saveable:
    """Keep the activations that layers call so."""
    return lambda primitive, *_, **params: primitive.name == "name" and params["name"] in names


def ungathered(primitive, *_, **__) -> bool:
    """Keep everything but what was gathered."""
    return primitive.name not in GATHERED


def chain(how: Remat, body: Callable, carry, xs, *, regather: bool):
    """As `jax.lax.scan(body, carry, xs)`, with as much kept for the backward pass as `how` says.

    Args:
        how: which policy.
        body, carry, xs: as of `jax.lax.scan`.
        regather: whether what the body gathers is gathered again where all else is kept.
    """
    if how.kind == "budget":
        return _within(how.count, body, carry, xs)
    if how.kind == "binomial" and _length(xs) > 1:
        return revolve.chain(body, carry, xs, how.count)
    if how.kind == "nested":
        return _nested(body, carry, xs, how.count)
    if how.offload:
        return _on_host(how.names, body, carry, xs)
    everything = ungathered if regather else None
    return scan({"block": nothing, "dots": dots, "names": named(how.names)}.get(how.kind, everything), body, carry, xs)


def scan(saveable: Saveable | None, body: Callable, carry, xs):
    """`jax.lax.scan` that keeps of each step what it is given and what is `saveable`; all, if that is None.

    A single step is run once: XLA takes a loop of one trip away, and then merges what is run again with the first run.
    """
    if _length(xs) == 1:
        carry, y = body(carry, jax.tree.map(lambda leaf: leaf[0], xs))
        return carry, jax.tree.map(lambda leaf: leaf[None], y)
    if saveable is None:
        return jax.lax.scan(body, carry, xs)
    return jax.lax.scan(jax.checkpoint(body, policy=saveable, prevent_cse=False), carry, xs)


def _on_host(names: tuple[str, ...], body: Callable, carry, xs):
    """As `scan` that keeps the inputs of steps and the activations called `names`, all of it on the host."""
    if _length(xs) == 1:
        return scan(None, body, carry, xs)
    saveable = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT, *names],
        offload_src="device",
        offload_dst=offload.HOST,
    )

    def step(carry, xs):
        return body(jax.tree.map(lambda leaf: checkpoint_name(leaf, INPUT) if leaf.ndim else leaf, carry), xs)

    return jax.lax.scan(jax.checkpoint(step, policy=saveable, prevent_cse=False), carry, xs)


def _nested(body: Callable, carry, xs, levels: int):
    """Scans within scans, each keeping the inputs of its segments only.

    What is left over when a chain is cut into equal segments comes last: it is reversed first, before the others need
    memory.

    Source: Chen et al. 2016, arXiv:1604.06174, sections 4.1 and 4.4.
    """
    count = _length(xs)
    size = segment(count, levels)
    if size == 1:
        return scan(nothing, body, carry, xs)
    whole = count // size * size
    cut = jax.tree.map(lambda leaf: leaf[:whole].reshape(whole // size, size, *leaf.shape[1:]), xs)
    carry, ys = scan(nothing, lambda carry, xs: _nested(body, carry, xs, levels - 1), carry, cut)
    ys = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), ys)
    if whole < count:
        carry, more = _nested(body, carry, jax.tree.map(lambda leaf: leaf[whole:], xs), levels - 1)
        ys = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), ys, more)
    return carry, ys


def _within(limit: int, body: Callable, carry, xs):
    """A scan for each run of blocks that keep alike, all of them together at most `limit` bytes on this device."""
    first, ends = 0, []
    for what, blocks in _runs(limit, body, carry, xs):
        own = jax.tree.map(lambda leaf, start=first, end=first + blocks: leaf[start:end], xs)
        carry, ys = scan(_policy(what), body, carry, own)
        first += blocks
        ends.append(ys)
    return carry, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *ends)


def _runs(limit: int, body: Callable, carry, xs) -> list[tuple[tuple[str, ...] | str, int]]:
    """What is kept (`budget.Choice.what`), and of how many blocks in a row.

    What is chosen is measured before it is relied upon, and chosen again if it keeps more than its trace promised.
    """
    count, one = _length(xs), jax.tree.map(lambda leaf: leaf[0], xs)
    known = _known(f"{limit} {count} {jax.make_jaxpr(body)(carry, one)}")
    if known:
        return known
    choices = budget.choices_of(body, carry, one, EVERYTHING if count == 1 else {"dots": dots} | EVERYTHING)
    if count == 1:  # as of `scan`
        choices = [choice._replace(what="everything") for choice in choices[-1:]]
    measured = {}
    while True:
        if count * choices[0].bytes > limit:
            raise budget.refused(limit, count, count * choices[0].bytes)
        chosen = budget.choose([[(choice.bytes, choice.work) for choice in choices]] * count, limit)
        whole = [number for number, choice in enumerate(choices) if choice.what == "everything"]
        runs = budget.runs(chosen, whole[0] if whole else -1)
        new = {choices[number].what for number, _ in runs} - measured.keys()
        if not new:
            known.extend((choices[number].what, blocks) for number, blocks in runs)
            return known
        for what in new:
            step = jax.checkpoint(body, policy=_policy(what), prevent_cse=False)
            measured[what] = budget.kept_bytes(step, carry, one)
        choices = [choice._replace(bytes=measured.get(choice.what, choice.bytes)) for choice in choices]
        choices.sort(key=lambda choice: choice.bytes)


@functools.lru_cache
def _known(text: str) -> list:
    """What was found for a chain of which this text tells all: it is traced many times while a run is made."""
    return []


EVERYTHING = {"everything": ungathered}


def _policy(what: tuple[str, ...] | str) -> Saveable:
    """The policy of a `budget.Choice`."""
    return ({"dots": dots} | EVERYTHING)[what] if isinstance(what, str) else named(what)


def segment(count: int, levels: int) -> int:
    """Steps of one of two or more segments of a chain, to be nested in `levels`: about count^(1 - 1/levels)."""
    return max(1, min(round(count ** (1 - 1 / levels)), count // 2))


def _length(xs) -> int:
    return jax.tree.leaves(xs)[0].shape[0]
