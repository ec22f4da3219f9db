"""What a recipe asks of its own fields; every violation at once, before any array exists."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxpar.core import family, spec
from jaxpar.core import order as whole
from jaxpar.core.cells import Order
from jaxpar.core.recipe import Recipe
from jaxpar.core.refuse import Collector, Problem, near_miss
from jaxpar.core.timetable import timetable
from jaxpar.core.types import Layer
from jaxpar.core.walk import jaxprs
from jaxpar.plan.context import context
from jaxpar.plan.layout import SINGLE
from jaxpar.plan.product import Settings
from jaxpar.plan.remat import Remat
from jaxpar.step.objective import nats

MOST, MOST_LAYERS = 2**31 - 1, 10_000  # whole numbers on devices have 32 bits; a model is built layer by layer
MODEL_SIZES = ("layers", "width", "hidden", "heads", "kv_heads", "context", "vocab")


def of_numbers(recipe: Recipe):
    """Numbers out of range."""
    yield from whole.wrong(recipe.seed, batch=recipe.batch)
    least = {"steps": 1, "weight_decay": 0, "clip": 0, "evaluate_every": 0, "evaluate_batches": 1}
    for field, bound in (least | {"checkpoint_every": 0, "skip_limit": 1}).items():
        value = getattr(recipe, field)
        if not value >= bound or value == float("inf"):
            yield Problem(field, value, f"must be a finite number of at least {bound}.", str(bound))
    for field in ("batch", "steps"):
        if getattr(recipe, field) > MOST:
            yield Problem(field, getattr(recipe, field), f"must be at most {MOST}.", str(MOST))
    if recipe.peak_tflops is not None and not 0 < recipe.peak_tflops < float("inf"):
        yield Problem("peak_tflops", recipe.peak_tflops, "must be a finite number above 0.", "197, or leave it out")
    if not 0 < recipe.learning_rate <= 100:
        yield Problem("learning_rate", recipe.learning_rate, "must lie above 0 and not above 100.", "0.003")
    if recipe.warmup is not None and not 0 <= recipe.warmup <= max(recipe.steps, 1):
        rule = f"must be at least 0 and not more than steps = {recipe.steps}."
        yield Problem("warmup", recipe.warmup, rule, f"0 to {recipe.steps}")
    if recipe.seed >= 2**32:
        yield Problem("seed", recipe.seed, "must fit in 32 bits.", f"0 to {2**32 - 1}")
    for field in MODEL_SIZES:
        value = getattr(recipe.model, field)
        most = MOST_LAYERS if field == "layers" else MOST
        if value is not None and not 1 <= value <= most:
            yield Problem(f"model.{field}", value, f"must lie in 1 to {most}.", "1" if value < 1 else str(most))
    if recipe.model.dropout is not None and not 0 <= recipe.model.dropout < 1:
        yield Problem("model.dropout", recipe.model.dropout, "must lie in [0, 1).", "0.1")


def unknown_fields(recipe: Recipe, builder):
    """Fields that are set although neither the model nor the data has them."""
    data = Collector([]).attempt(spec.member, "datasets", recipe.data.name, "data.name")
    if data is None:  # it may have any field; `_dataset` says what is wrong
        return
    own, known = (sorted(family.parameters(member)) for member in (builder, data))
    for field in dataclasses.fields(recipe.model):
        value = getattr(recipe.model, field.name)
        if field.name != "name" and value is not None and field.name not in (*own, *known):
            rule = f"the model {recipe.model.name} has no such field."
            yield Problem(f"model.{field.name}", value, rule, near_miss(field.name, own))


def other_data(recipe: Recipe, model: Layer, settings: Settings, batch) -> list[Problem]:
    """One problem if the model cannot take these batches, being made for other examples, or for other labels.

    It is tried on shapes: a user's own model may take anything, and its errors stay as they are.
    """

    try:
        jax.eval_shape(_alone(model, settings, batch))
    except Exception:
        reads = "example" not in family.parameters(family.pick("models", recipe.model.name))
        holds = jnp.issubdtype(batch[0].dtype, jnp.integer) and len(batch[0].shape) == len(batch[1].shape) == 2
        if reads == holds:
            rows = _rows(model, settings, batch)
            if rows is None or rows == batch[1].shape[1:]:
                raise
            rule = f"has labels of shape {list(batch[1].shape[1:])}, and the model {recipe.model.name} gives a class "
            rule += f"for each of {list(rows)}; [] is one for a whole example."
            return [Problem("data.name", recipe.data.name, rule, f"data with labels of shape {list(rows)}")]
        rule = f"holds {'tokens' if holds else 'no tokens'}, and the model {recipe.model.name} takes "
        rule += "tokens." if reads else "examples with one label each."
        return [Problem("data.name", recipe.data.name, rule, "stdlib_text" if reads else "digits")]
    return []


def _rows(model: Layer, settings: Settings, batch) -> tuple[int, ...] | None:
    """The shape of what has a class in one example; None if the model cannot take the inputs."""

    def logits():
        here = settings._replace(placement=SINGLE, remat=Remat(), key=jax.random.key(0))
        return model.apply(*model.init(jax.random.key(0)), _zeros(batch)[0], context(here))[0]

    try:
        return jax.eval_shape(logits).shape[1:-1]
    except Exception:
        return None


def unknown_activations(recipe: Recipe, model: Layer, settings: Settings, batch) -> list[Problem]:
    """A problem for each activation that `plan.remat` names and no layer of the model has."""
    if settings.remat.kind != "names":
        return []
    known = sorted(_names(jax.make_jaxpr(_alone(model, settings, batch))().jaxpr))
    rule = f"no layer of the model {recipe.model.name} calls an activation `{{}}`."
    missing = [name for name in settings.remat.names if name not in known]
    return [Problem("plan.remat", recipe.plan.remat, rule.format(name), near_miss(name, known)) for name in missing]


def _names(jaxpr) -> set[str]:
    """The activations that have a name (`jax.ad_checkpoint.checkpoint_name`) in a jaxpr and those within it."""
    found = {equation.params["name"] for equation in jaxpr.eqns if equation.primitive.name == "name"}
    inner = (getattr(one, "jaxpr", one) for equation in jaxpr.eqns for one in jaxprs(equation))
    return found.union(*map(_names, inner))


def _alone(model: Layer, settings: Settings, batch):
    """The loss on one device, of zeros; they and keys are made within, or would make jax's devices, perhaps too few."""
    one = settings._replace(placement=SINGLE, remat=Remat())

    def alone():
        here = one._replace(key=jax.random.key(0))
        return nats(model, here, *model.init(jax.random.key(0)), _zeros(batch))

    return alone


def _zeros(batch):
    return tuple(jnp.zeros(a.shape, jax.dtypes.canonicalize_dtype(a.dtype)) for a in batch)


def out_of_order(recipe: Recipe, model: Layer, order: Order) -> list[Problem]:
    """One problem if state would go through the microbatches in another order than without a pipeline."""
    if not jax.tree.leaves(model.dims[1]) or timetable(order).in_order:
        return []
    keeps = family.pick("policies", recipe.plan.precision)().history is not None
    under = f" under precision={recipe.plan.precision}" if keeps else ""
    rule = f"takes microbatches out of order, and the model {recipe.model.name}{under} has state that goes from one to "
    rule += "the next."
    return [Problem("plan.schedule", recipe.plan.schedule, rule, "an order with rising microbatches at each stage")]


def too_few_classes(recipe: Recipe, builder, classes: int):
    """A vocabulary without some of the labels: their loss would be silently wrong."""
    vocab = recipe.model.vocab
    if vocab is not None and 1 <= vocab < classes and "vocab" in family.parameters(builder):
        yield Problem("model.vocab", vocab, f"must hold the {classes} classes of the data.", f"{classes} or more")
