"""What a plan asks of the sizes of a model; every violation at once, before any array exists."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import jax

from jaxpar.core import family
from jaxpar.core.plan import Plan
from jaxpar.core.refuse import Problem, near_miss
from jaxpar.core.scheme import Scheme
from jaxpar.plan import layout, offload, remat
from jaxpar.plan.layout import Placement

FIELD = {"embed": "model.width", "heads": "model.width", "mlp": "model.hidden", "channels": "model.hidden"}
LANDED = (
    "data",
    "tensor",
    "pipe",
    "schedule",
    "chunks",
    "microbatches",
    "storage",
    "remat",
    "zero",
    "zero_group",
    "regather",
    "unroll",
    "offload",
    "precision",
    "partition",
    "reducer",
)
CHOICES = {
    "storage": ("recompute", "residual"),
    "unroll": ("auto", "true", "false"),
    "partition": ("manual", "auto"),
}


def of_plan(plan: Plan) -> Iterator[Problem]:
    """Fields whose part has not landed, sizes below 1 and unknown names (the scheme is `core.plan.scheme_of`'s)."""
    for field in dataclasses.fields(plan):
        value, name = getattr(plan, field.name), f"plan.{field.name}"
        least = 0 if field.name.startswith("zero") else 1
        if field.name not in LANDED and value != field.default:
            legal = str(field.default).lower()
            yield Problem(name, value, "this part of jaxpar has not landed yet.", f"{field.name}={legal}")
        elif field.name in CHOICES and value not in CHOICES[field.name]:
            yield Problem(name, value, "is not a choice.", near_miss(value, CHOICES[field.name]))
        elif isinstance(value, int) and not isinstance(value, bool) and value < least:
            yield Problem(name, value, f"must be at least {least}.", str(least))
    yield from _of_auto(plan)
    yield from remat.of_plan(plan)
    yield from offload.of_plan(plan)
    yield from _of_zero(plan)
    for field, folder in (("precision", "policies"), ("reducer", "reducers")):
        name = getattr(plan, field)
        if ".py:" not in name and name not in family.names(folder):
            yield Problem(
                f"plan.{field}", name, f"there is no such file in {folder}/.", near_miss(name, family.names(folder))
            )


def _of_auto(plan: Plan) -> Iterator[Problem]:
    """Fields about collectives, which a plan that leaves them to XLA cannot choose."""
    left = {
        "regather": "XLA decides what is gathered again",
        "reducer": "gradients arrive summed over data",
        "pipe": "there is no axis for it: jaxpar plays its timetables inside `jax.shard_map`",
    }
    for field, why in left.items() if plan.partition == "auto" else ():
        value, default = getattr(plan, field), getattr(Plan, field)
        if value != default:
            legal = f"{field}={str(default).lower()}; or partition=manual"
            yield Problem(f"plan.{field}", str(value).lower(), f"under partition=auto {why}.", legal)


def _of_zero(plan: Plan) -> Iterator[Problem]:
    """The fields of ZeRO, as far as they can be judged without the scheme."""
    if plan.zero > 3:
        yield Problem("plan.zero", plan.zero, "is not a stage.", "0, 1, 2 or 3")
    if plan.zero_group > 0 and not plan.zero:
        rule = "says how many devices share out one copy, and plan.zero = 0."
        yield Problem("plan.zero_group", plan.zero_group, rule, "zero_group=0; or zero=1, 2 or 3")
    elif plan.zero_group == 1 or (plan.zero_group > 1 and plan.data % plan.zero_group):
        legal = ", ".join(map(str, [0, *_divisors(plan.data)[1:]]))
        rule = f"must divide plan.data = {plan.data}, and one device alone shares nothing out."
        yield Problem("plan.zero_group", plan.zero_group, rule, legal)
    if plan.zero == 3 and plan.unroll == "true" and plan.regather:
        rule = "under plan.zero = 3: outside of a scan XLA merges gathers, and keeps what it gathered."
        yield Problem("plan.unroll", "true", rule, "unroll=auto; or regather=false, to gather once")


def group(plan: Plan) -> int:
    """Size of the minor part of the data axis over which ZeRO splits state, where it is a part at all; else 1."""
    part = plan.zero > 0 and 0 < plan.zero_group < plan.data and plan.data % plan.zero_group == 0
    return plan.zero_group if part else 1


def of_zero(placement: Placement, plan: Plan) -> Iterator[Problem]:
    """Whether there is a data axis to split state over."""
    if 0 < plan.zero <= 3 and not layout.replicas(placement):
        rule = "splits state over the devices of a data axis, and this plan has none."
        yield Problem("plan.zero", plan.zero, rule, "zero=0; or data=2 or more")


def of_rows(placement: Placement, plan: Plan, batch: int, context: int | None) -> Iterator[Problem]:
    """Whether the examples of a microbatch, and the context where rows lie on it, divide."""
    scheme, examples = placement.scheme, batch // plan.microbatches
    legal = multiples(batch, plan.microbatches * _batch_parts(scheme, context))
    if batch % plan.microbatches:
        yield Problem("batch", batch, f"must be a multiple of plan.microbatches = {plan.microbatches}.", legal)
        return
    outer = [axis for axis in scheme.outer[0] if axis not in placement.on_context]
    free = layout.context_choices(scheme)[-1]
    for name, axes in (("inner", scheme.inner[0]), ("outer", outer)):
        parts = layout.size(scheme, axes)
        if examples % parts:
            rule = (
                f"each microbatch of {examples} examples must split into {parts} parts, since {name} activations "
                f"split the batch over {shown(scheme, axes)}."
            )
            if name == "outer" and context and free:
                legal += f"; or model.context = {multiples(context, layout.size(scheme, free))}, to carry "
                legal += shown(scheme, free)
            yield Problem("batch", batch, rule, legal)
            break
    parts = layout.size(scheme, placement.on_context)
    if context and context % parts:
        rule = f"must split into {parts} parts, since {shown(scheme, placement.on_context)} lies on the context."
        yield Problem("model.context", context, rule, multiples(context, parts))


def _batch_parts(scheme: Scheme, context: int | None) -> int:
    """Into how many parts the examples of a microbatch must split, if the context carries all the axes that it can."""
    carried = [axes for axes in layout.context_choices(scheme) if not (context or 1) % layout.size(scheme, axes)]
    needed = [[axis for axis in scheme.outer[0] if axis not in axes] for axes in carried]
    inner = layout.size(scheme, scheme.inner[0])
    return min(math.lcm(inner, layout.size(scheme, outer)) for outer in needed)


def of_model(placement: Placement, dims, shapes, counts: Mapping[str, int], fields=None) -> Iterator[Problem]:
    """Whether every dim of every parameter divides, and the heads.

    Args:
        placement: where arrays lie.
        dims: tree of dim strings.
        shapes: tree like it, whose leaves have a shape (`jax.eval_shape` of the model's init).
        counts: entries of dims that are not those of a parameter, such as heads.
        fields: of the recipe's model, as far as they are known: a network whose sizes are all in proportion to its
            width has that field alone.
    """
    scheme, heads, found = placement.scheme, counts.get("heads"), {}
    for words, leaf in zip(jax.tree.leaves(dims), jax.tree.leaves(shapes), strict=True):
        for word, axes, count in zip(words.split(), layout.weight(placement, words), leaf.shape, strict=True):
            if word in FIELD and count % layout.size(scheme, axes):
                found.setdefault((FIELD[word], count), set()).add(axes)
    for (field, count), layouts in found.items():
        parts = math.lcm(*(layout.size(scheme, axes) for axes in layouts))
        over = " and ".join(sorted(shown(scheme, axes) for axes in layouts))
        field, value = _made_by(field, count, fields)
        if value != count:
            rule = f"makes a layer of {count} features, which must split into {parts} parts, over {over}."
            yield Problem(field, value, rule, f"one that makes a multiple of {parts} of it")
            continue
        whole_heads = heads if heads and field == "model.width" else 1
        legal = multiples(count, math.lcm(parts, whole_heads))
        yield Problem(field, count, f"must split into {parts} parts, over {over}.", legal)
    parts = layout.size(scheme, scheme.inner[1])
    if heads and heads % parts:
        rule = f"must split into {parts} parts, over {shown(scheme, scheme.inner[1])}."
        divisors = ", ".join(map(str, _divisors(heads)))
        yield Problem(
            "model.heads", heads, rule, f"{multiples(heads, parts)}; or a scheme that splits heads {divisors} ways"
        )


def _made_by(field: str, count: int, fields: Mapping | None) -> tuple[str, int]:
    """The field that makes a layer of `count` features, and its value: `field`, or what all are in proportion to."""
    name = field.removeprefix("model.")
    if fields is None or (name in fields and fields[name] in (None, count)):
        return field, count
    return "model.width", fields.get("width") or count


def of_blocks(placement: Placement, dims, shapes, block: int) -> Iterator[Problem]:
    """Whether devices hold whole blocks of the features of products that share a scale, or all one block.

    Args:
        placement: where parameters lie.
        dims: tree of dim strings of the parameters.
        shapes: tree like it, whose leaves have a shape.
        block: `Policy.block`: features in a row; the head, whose columns are the vocabulary, has none.
    """
    found = {}
    for words, leaf in zip(jax.tree.leaves(dims), jax.tree.leaves(shapes), strict=True):
        named = words.split()[-2:]
        if len(named) < 2 or "vocab" in named or set(named) & {"layers", *layout.ROWS}:
            continue
        for word, own, count in zip(named, layout.weight(placement, words)[-2:], leaf.shape[-2:], strict=True):
            for axes in (own, layout.features(placement, word)):
                parts = layout.size(placement.scheme, axes)
                if parts > 1 and count > block and count % (parts * block):
                    key = (FIELD.get(word, "model.width"), count)
                    found[key] = max(found.get(key, (1, (), "")), (parts, axes, word))
    for (field, count), (parts, axes, word) in found.items():
        rule = (
            f"makes {count} entries of `{word}`, of which each block of {block} shares a scale: {parts} devices, over "
            f"{shown(placement.scheme, axes)}, must each hold whole blocks."
        )
        yield Problem(field, count, rule, f"{multiples(count, parts * block)}; or at most {block}, one block for all")


def of_heads(width: int | None, heads: int | None, kv_heads: int | None) -> Iterator[Problem]:
    """Whether heads divide the width and key-value heads the heads; None is not checked."""
    if width and heads and width % heads:
        yield Problem("model.width", width, f"must be a multiple of model.heads = {heads}.", multiples(width, heads))
    if heads and kv_heads and heads % kv_heads:
        divisors = ", ".join(map(str, _divisors(heads)))
        yield Problem("model.kv_heads", kv_heads, f"must divide model.heads = {heads}.", divisors)


def _divisors(count: int) -> list[int]:
    """All of them, the least first; none of what is below 1."""
    small = [n for n in range(1, math.isqrt(max(count, 0)) + 1) if count % n == 0]
    return sorted({*small, *(count // n for n in small)})


def multiples(value: int, of: int) -> str:
    """The nearest multiples of `of` around `value`, at least one of them: "12 or 16"."""
    below, above = value // of * of, -(-value // of) * of
    return " or ".join(str(n) for n in sorted({below, above}) if n)


def shown(scheme, axes) -> str:
    """Axes with their sizes, as in "row=2, column=4"."""
    return ", ".join(f"{axis}={scheme.axes[axis]}" for axis in axes) or "no axis"
