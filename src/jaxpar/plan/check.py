"""What a plan asks of the sizes of a model; every violation at once, before any array exists."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax

from jaxpar.core import family
from jaxpar.core.plan import Plan
from jaxpar.core.refuse import Problem, near_miss
from jaxpar.plan import layout
from jaxpar.plan.layout import Placement

FIELD = {"embed": "model.width", "mlp": "model.hidden", "channels": "model.hidden", "context": "model.context"}
LANDED = ("data", "tensor", "microbatches", "regather", "unroll", "precision", "reducer")  # others keep their default
CHOICES = {"unroll": ("auto", "true", "false"), "partition": ("manual", "auto")}


def of_plan(plan: Plan) -> Iterator[Problem]:
    """Fields whose part has not landed, sizes below 1 and unknown names (the scheme is `core.plan.scheme_of`'s)."""
    for field in dataclasses.fields(plan):
        value, name = getattr(plan, field.name), f"plan.{field.name}"
        least = 0 if field.name.startswith("zero") else 1
        if field.name in CHOICES and value not in CHOICES[field.name]:
            yield Problem(name, value, "is not a choice.", near_miss(value, CHOICES[field.name]))
        elif isinstance(value, int) and not isinstance(value, bool) and value < least:
            yield Problem(name, value, f"must be at least {least}.", str(least))
        elif field.name not in LANDED and value != field.default:
            yield Problem(name, value, "this part of jaxpar has not landed yet.", f"{field.name}={field.default}")
    for field, folder in (("precision", "policies"), ("reducer", "reducers")):
        name = getattr(plan, field)
        if ".py:" not in name and name not in family.names(folder):
            yield Problem(
                f"plan.{field}", name, f"there is no such file in {folder}/.", near_miss(name, family.names(folder))
            )


def of_rows(placement: Placement, plan: Plan, batch: int, context: int | None) -> Iterator[Problem]:
    """Whether the examples of a microbatch, and the context where rows lie on it, divide."""
    if batch % plan.microbatches:
        rule = f"must be a multiple of plan.microbatches = {plan.microbatches}."
        yield Problem("batch", batch, rule, multiples(batch, plan.microbatches))
        return
    scheme, examples = placement.scheme, batch // plan.microbatches
    outer = [axis for axis in scheme.outer[0] if axis not in placement.on_context]
    for name, axes in (("inner", scheme.inner[0]), ("outer", outer)):
        parts = layout.size(scheme, axes)
        if examples % parts:
            choices = [axes for axes in layout.context_choices(scheme) if axes and context]
            rule = (
                f"each microbatch of {examples} examples must split into {parts} parts, since {name} activations "
                f"split the batch over {shown(scheme, axes)}."
            )
            other = (
                f"; or a batch that leaves {' or '.join(shown(scheme, c) for c in choices)} on the context"
                if choices
                else ""
            )
            yield Problem("batch", batch, rule, multiples(batch, parts * plan.microbatches) + other)
            break
    parts = layout.size(scheme, placement.on_context)
    if context and context % parts:
        rule = f"must split into {parts} parts, since {shown(scheme, placement.on_context)} lies on the context."
        yield Problem("model.context", context, rule, multiples(context, parts))


def of_model(placement: Placement, dims, shapes, counts: Mapping[str, int]) -> Iterator[Problem]:
    """Whether every dim of every parameter divides, and the heads.

    Args:
        placement: where arrays lie.
        dims: tree of dim strings.
        shapes: tree like it, whose leaves have a shape (`jax.eval_shape` of the model's init).
        counts: entries of dims that are not those of a parameter, such as heads.
    """
    scheme, found = placement.scheme, {}
    for words, leaf in zip(jax.tree.leaves(dims), jax.tree.leaves(shapes), strict=True):
        for word, axes, count in zip(words.split(), layout.weight(placement, words), leaf.shape, strict=True):
            if word in FIELD and count % layout.size(scheme, axes):
                found.setdefault((FIELD[word], count), set()).add(axes)
    for (field, count), layouts in found.items():
        axes = max(layouts, key=lambda axes: layout.size(scheme, axes))
        parts = layout.size(scheme, axes)
        rule = f"must split into {parts} parts, over {shown(scheme, axes)}."
        yield Problem(field, count, rule, multiples(count, parts))
    heads, parts = counts.get("heads"), layout.size(scheme, scheme.inner[1])
    if heads and heads % parts:
        rule = f"must split into {parts} parts, over {shown(scheme, scheme.inner[1])}."
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        yield Problem(
            "model.heads", heads, rule, f"{multiples(heads, parts)}; or a scheme that splits heads {divisors} ways"
        )


def of_heads(width: int | None, heads: int | None, kv_heads: int | None) -> Iterator[Problem]:
    """Whether heads divide the width and key-value heads the heads; None is not checked."""
    if width and heads and width % heads:
        yield Problem("model.width", width, f"must be a multiple of model.heads = {heads}.", multiples(width, heads))
    if heads and kv_heads and heads % kv_heads:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        yield Problem("model.kv_heads", kv_heads, f"must divide model.heads = {heads}.", divisors)


def multiples(value: int, of: int) -> str:
    """The nearest multiples of `of` around `value`, at least one of them: "12 or 16"."""
    below, above = value // of * of, -(-value // of) * of
    return " or ".join(str(n) for n in sorted({below, above}) if n)


def shown(scheme, axes) -> str:
    """Axes with their sizes, as in "row=2, column=4"."""
    return ", ".join(f"{axis}={scheme.axes[axis]}" for axis in axes) or "no axis"
