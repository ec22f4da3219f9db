"""From a recipe to its parts: everything is picked, built and checked here, before any array exists."""

import dataclasses
from typing import NamedTuple

import jax
import optax

from jaxpar.core import family
from jaxpar.core.plan import scheme_of
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Collector, Problem, refuse
from jaxpar.core.types import Dataset, Layer, Reducer
from jaxpar.plan import check, layout
from jaxpar.plan.context import Settings
from jaxpar.plan.wire import device_wire

CONTEXT = 128  # tokens per sequence where neither the recipe nor the model says


class Parts(NamedTuple):
    """The parts of one run, as the recipe names them.

    Attributes:
        model: from inputs to logits.
        optimizer: clipping and the optimizer, chained, on global arrays.
        reducer: how gradients are summed over data.
        settings: what the Context is made of.
        microbatches: parts of a batch.
        seed: of the run.
        inputs: shape and dtype of the inputs of one batch.
        labels: the same of its labels.
    """

    model: Layer
    optimizer: optax.GradientTransformation
    reducer: Reducer
    settings: Settings
    microbatches: int
    seed: int
    inputs: jax.ShapeDtypeStruct
    labels: jax.ShapeDtypeStruct


def prepare(recipe: Recipe, data_dir: str | None = None) -> tuple[Parts, Dataset]:
    """Build the dataset and everything else that `recipe` names.

    Raises:
        Refused: naming every problem that could be found: plan, numbers, names, data, sizes.
    """
    found = Collector([])
    dataset = found.attempt(_dataset, recipe, data_dir)
    if dataset is None:
        found.attempt(assemble, recipe, None, None, 1)
        refuse(found.problems)
    batch = dataset.batch(0)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in batch]
    return assemble(recipe, *shapes, dataset.classes), dataset


def assemble(recipe: Recipe, inputs, labels, classes: int) -> Parts:
    """Everything but the data, for batches of the given shapes.

    Args:
        recipe: every choice.
        inputs: `jax.ShapeDtypeStruct` of the inputs of one batch; None to check only what does not need it.
        labels: the same of its labels.
        classes: number of classes or tokens of the data.

    Raises:
        Refused: naming every problem.
    """
    found = Collector(list(of_numbers(recipe)))
    found.problems.extend(check.of_plan(recipe.plan))
    scheme = found.attempt(scheme_of, recipe.plan.tensor)
    builder = found.attempt(family.pick, "models", recipe.model.name, "model.name")
    fields = model_fields(recipe, classes) | ({"example": inputs.shape[1:]} if inputs else {})
    if builder:
        found.problems.extend(_unknown_fields(recipe, builder))
        fields = family.defaults(builder) | family.accepted(builder, fields)
        found.problems.extend(check.of_heads(*(fields.get(name) for name in ("width", "heads", "kv_heads"))))
    refuse(found.problems)
    sizes = {"batch": recipe.batch // recipe.plan.microbatches}
    sizes |= {name: fields[name] for name in ("kv_heads", "context", "heads") if fields.get(name)}
    if labels and len(labels.shape) > 1:
        sizes["context"] = labels.shape[1]
    placement = layout.place(scheme, recipe.plan.data, sizes)
    found.problems.extend(check.of_rows(placement, recipe.plan, recipe.batch, sizes.get("context")))
    buildable = inputs or "example" not in family.parameters(builder)
    model = found.attempt(builder, **family.accepted(builder, fields)) if buildable else None
    if model:
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        found.problems.extend(check.of_model(placement, model.dims, shapes, sizes))
    refuse(found.problems)
    plan = recipe.plan
    settings = Settings(
        placement=placement,
        policy=family.pick("policies", plan.precision)(),
        wire=device_wire(),
        scan_blocks=plan.unroll != "true",
        regather=plan.regather,
    )
    reducer = family.pick("reducers", plan.reducer)()
    return Parts(model, optimizer(recipe, model), reducer, settings, plan.microbatches, recipe.seed, inputs, labels)


def model_fields(recipe: Recipe, classes: int | None) -> dict:
    """What the recipe says of the model, with the vocabulary that the data has unless it says otherwise."""
    fields = {field.name: getattr(recipe.model, field.name) for field in dataclasses.fields(recipe.model)}
    fields.pop("name")
    return fields | {"vocab": fields["vocab"] or classes, "context": fields["context"] or CONTEXT}


def optimizer(recipe: Recipe, model: Layer) -> optax.GradientTransformation:
    """Clipping, then the optimizer under warm-up and a cosine down to a tenth; only matrices decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if recipe.warmup else recipe.learning_rate,
        peak_value=recipe.learning_rate,
        warmup_steps=recipe.warmup,
        decay_steps=max(recipe.steps, recipe.warmup + 1),
        end_value=recipe.learning_rate / 10,
    )
    decayed = jax.tree.map(lambda words: len(words.replace("layers ", "").split()) > 1, model.dims[0])
    make = family.pick("optimizers", recipe.optimizer, "optimizer")
    update = make(schedule, recipe.weight_decay, decayed)
    return optax.chain(optax.clip_by_global_norm(recipe.clip), update) if recipe.clip else update


def of_numbers(recipe: Recipe):
    """Numbers out of range and unknown optimizers."""
    least = {"batch": 1, "steps": 1, "warmup": 0, "weight_decay": 0, "clip": 0, "seed": 0, "evaluate_every": 0}
    for field, bound in (least | {"evaluate_batches": 1, "checkpoint_every": 0}).items():
        value = getattr(recipe, field)
        if not value >= bound or value == float("inf"):
            yield Problem(field, value, f"must be a finite number of at least {bound}.", str(bound))
    if not 0 < recipe.learning_rate <= 100:
        yield Problem("learning_rate", recipe.learning_rate, "must lie above 0 and not above 100.", "0.003")
    if recipe.warmup > recipe.steps:
        rule = f"must not be more than steps = {recipe.steps}."
        yield Problem("warmup", recipe.warmup, rule, f"0 to {recipe.steps}")
    if recipe.seed >= 2**32:
        yield Problem("seed", recipe.seed, "must fit in 32 bits.", f"0 to {2**32 - 1}")
    for field in ("layers", "width", "hidden", "heads", "kv_heads", "context", "vocab"):
        value = getattr(recipe.model, field)
        if value is not None and value < 1:
            yield Problem(f"model.{field}", value, "must be at least 1.", "1")
    if recipe.model.dropout is not None and not 0 <= recipe.model.dropout < 1:
        yield Problem("model.dropout", recipe.model.dropout, "must lie in [0, 1).", "0.1")


def _unknown_fields(recipe: Recipe, builder):
    """Fields that are set although neither the model nor the data has them."""
    known = [*family.parameters(builder)]
    if ".py:" in recipe.data.name or recipe.data.name in family.names("datasets"):
        known += family.parameters(family.pick("datasets", recipe.data.name))
    for field in dataclasses.fields(recipe.model):
        value = getattr(recipe.model, field.name)
        if field.name != "name" and value is not None and field.name not in known:
            legal = ", ".join(sorted(family.parameters(builder)))
            yield Problem(f"model.{field.name}", value, f"the model {recipe.model.name} has no such field.", legal)


def _dataset(recipe: Recipe, data_dir: str | None) -> Dataset:
    builder = family.pick("datasets", recipe.data.name, "data.name")
    fields = model_fields(recipe, None) | {"batch": recipe.batch, "seed": recipe.seed, "data_dir": data_dir}
    return builder(**family.accepted(builder, fields))
