"""From a recipe to its parts: everything is picked, built and checked here, before any array exists."""

import dataclasses
from typing import NamedTuple

import jax
import optax

from jaxpar.core import family, order
from jaxpar.core.plan import scheme_of
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Collector, Problem, near_miss, refuse
from jaxpar.core.types import Dataset, Layer, Reducer
from jaxpar.plan import check, layout
from jaxpar.plan.context import Settings
from jaxpar.plan.layout import Placement
from jaxpar.plan.wire import device_wire

CONTEXT = 128  # tokens per sequence where neither the recipe nor the model says
MODEL_SIZES = ("layers", "width", "hidden", "heads", "kv_heads", "context", "vocab")


class Parts(NamedTuple):
    """The parts of one run, as the recipe names them.

    Attributes:
        model: from inputs to logits.
        optimizer: clipping and the optimizer, chained, on global arrays.
        reducer: how gradients are summed over data.
        settings: what the Context is made of.
        norms: how often a step takes the norm of all gradients: to report it, and to clip.
        microbatches: parts of a batch.
        partition: who decides the collectives: `manual` or `auto`.
        seed: of the run.
        inputs: shape and dtype of the inputs of one batch.
        labels: the same of its labels.
    """

    model: Layer
    optimizer: optax.GradientTransformation
    reducer: Reducer
    settings: Settings
    norms: int
    microbatches: int
    partition: str
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
        found.attempt(_checked, recipe, None, None, 1)
        refuse(found.problems)
    batch = dataset.batch(0)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in batch]
    return assemble(recipe, *shapes, dataset.classes), dataset


def assemble(recipe: Recipe, inputs, labels, classes: int) -> Parts:
    """Everything but the data, for batches of the given shapes.

    Args:
        recipe: every choice.
        inputs: `jax.ShapeDtypeStruct` of the inputs of one batch.
        labels: the same of its labels.
        classes: number of classes or tokens of the data.

    Raises:
        Refused: naming every problem.
    """
    model, placement = _checked(recipe, inputs, labels, classes)
    plan = recipe.plan
    settings = Settings(
        placement=placement,
        policy=family.pick("policies", plan.precision)(),
        wire=device_wire(),
        unroll={"true": True, "false": False, "auto": None}[plan.unroll],
        regather=plan.regather,
    )
    reducer = family.pick("reducers", plan.reducer)()
    update, norms = optimizer(recipe, model), 1 + bool(recipe.clip)
    return Parts(
        model, update, reducer, settings, norms, plan.microbatches, plan.partition, recipe.seed, inputs, labels
    )


def _checked(recipe: Recipe, inputs, labels, classes: int) -> tuple[Layer, Placement]:
    """The model and where it lies, once no problem is left that could be found; arguments as for `assemble`.

    Without inputs and labels it checks what does not need them; the model may then be None.
    """
    found = Collector([*of_numbers(recipe), *check.of_plan(recipe.plan)])
    scheme = found.attempt(scheme_of, recipe.plan.tensor)
    builder = found.attempt(family.pick, "models", recipe.model.name, "model.name")
    found.attempt(family.pick, "optimizers", recipe.optimizer, "optimizer")
    fields, model = {}, None
    if builder:
        given = model_fields(recipe, classes) | ({"example": inputs.shape[1:]} if inputs else {})
        fields = family.defaults(builder) | family.accepted(builder, given)
        found.problems.extend([*_unknown_fields(recipe, builder), *_too_few_classes(recipe, builder, classes)])
    if min(_sizes(recipe)) < 1:  # the rest divides by them
        refuse(found.problems)
    if builder:
        found.problems.extend(check.of_heads(*(fields.get(name) for name in ("width", "heads", "kv_heads"))))
        if inputs or "example" not in family.parameters(builder):
            model = found.attempt(builder, **fields)
    if scheme:
        sizes = _dims(recipe, fields, labels)
        placement = layout.place(scheme, recipe.plan.data, sizes)
        found.problems.extend(check.of_rows(placement, recipe.plan, recipe.batch, sizes.get("context")))
    if scheme and model:
        shapes = jax.eval_shape(lambda seed: model.init(jax.random.key(seed)), 0)
        found.problems.extend(check.of_model(placement, model.dims, shapes, sizes))
    refuse(found.problems)
    return model, placement


def _sizes(recipe: Recipe) -> list[int]:
    """All sizes that the recipe gives."""
    given = [getattr(recipe.model, field) for field in MODEL_SIZES]
    return [recipe.batch, recipe.plan.data, recipe.plan.microbatches, *(size for size in given if size is not None)]


def _dims(recipe: Recipe, fields: dict, labels) -> dict[str, int]:
    """Entries of the dims that the plan may split and that are none of a parameter."""
    sizes = {"batch": recipe.batch // recipe.plan.microbatches}
    sizes |= {name: fields[name] for name in ("kv_heads", "context", "heads") if fields.get(name)}
    return sizes | ({"context": labels.shape[1]} if labels and len(labels.shape) > 1 else {})


def model_fields(recipe: Recipe, classes: int | None) -> dict:
    """What the recipe says of the model, with the vocabulary that the data has unless it says otherwise."""
    fields = {field.name: getattr(recipe.model, field.name) for field in dataclasses.fields(recipe.model)}
    fields.pop("name")
    return fields | {"vocab": fields["vocab"] or classes, "context": fields["context"] or CONTEXT}


def learning_rate(recipe: Recipe) -> optax.Schedule:
    """From the number of updates done to the rate: warm-up, then a cosine down to a tenth."""
    warmup = min(recipe.steps // 10, 100) if recipe.warmup is None else recipe.warmup
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else recipe.learning_rate,
        peak_value=recipe.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(recipe.steps, warmup + 1),
        end_value=recipe.learning_rate / 10,
    )


def optimizer(recipe: Recipe, model: Layer) -> optax.GradientTransformation:
    """Clipping, then the optimizer; only matrices decay."""
    decayed = jax.tree.map(lambda words: len(words.replace("layers ", "").split()) > 1, model.dims[0])
    make = family.pick("optimizers", recipe.optimizer, "optimizer")
    update = make(learning_rate(recipe), recipe.weight_decay, decayed)
    return optax.chain(optax.clip_by_global_norm(recipe.clip), update) if recipe.clip else update


def of_numbers(recipe: Recipe):
    """Numbers out of range."""
    yield from order.wrong(recipe.seed, batch=recipe.batch)
    least = {"steps": 1, "weight_decay": 0, "clip": 0, "evaluate_every": 0}
    for field, bound in (least | {"evaluate_batches": 1, "checkpoint_every": 0}).items():
        value = getattr(recipe, field)
        if not value >= bound or value == float("inf"):
            yield Problem(field, value, f"must be a finite number of at least {bound}.", str(bound))
    if not 0 < recipe.learning_rate <= 100:
        yield Problem("learning_rate", recipe.learning_rate, "must lie above 0 and not above 100.", "0.003")
    if recipe.warmup is not None and not 0 <= recipe.warmup <= max(recipe.steps, 1):
        rule = f"must be at least 0 and not more than steps = {recipe.steps}."
        yield Problem("warmup", recipe.warmup, rule, f"0 to {recipe.steps}")
    if recipe.seed >= 2**32:
        yield Problem("seed", recipe.seed, "must fit in 32 bits.", f"0 to {2**32 - 1}")
    for field in MODEL_SIZES:
        value = getattr(recipe.model, field)
        if value is not None and value < 1:
            yield Problem(f"model.{field}", value, "must be at least 1.", "1")
    if recipe.model.dropout is not None and not 0 <= recipe.model.dropout < 1:
        yield Problem("model.dropout", recipe.model.dropout, "must lie in [0, 1).", "0.1")


def _unknown_fields(recipe: Recipe, builder):
    """Fields that are set although neither the model nor the data has them."""
    data = Collector([]).attempt(family.pick, "datasets", recipe.data.name)
    if data is None:  # it may have any field; `_dataset` says what is wrong
        return
    own, known = (sorted(family.parameters(member)) for member in (builder, data))
    for field in dataclasses.fields(recipe.model):
        value = getattr(recipe.model, field.name)
        if field.name != "name" and value is not None and field.name not in (*own, *known):
            rule = f"the model {recipe.model.name} has no such field."
            yield Problem(f"model.{field.name}", value, rule, near_miss(field.name, own))


def _too_few_classes(recipe: Recipe, builder, classes: int):
    """A vocabulary without some of the labels: their loss would be silently wrong."""
    vocab = recipe.model.vocab
    if vocab is not None and 1 <= vocab < classes and "vocab" in family.parameters(builder):
        yield Problem("model.vocab", vocab, f"must hold the {classes} classes of the data.", f"{classes} or more")


def _dataset(recipe: Recipe, data_dir: str | None) -> Dataset:
    builder = family.pick("datasets", recipe.data.name, "data.name")
    fields = model_fields(recipe, None) | {"batch": recipe.batch, "seed": recipe.seed, "data_dir": data_dir}
    return builder(**family.accepted(builder, fields))
