"""From a recipe to its parts: everything is picked, built and checked here, before any array exists."""

import dataclasses
from typing import NamedTuple

import jax
import optax

from jaxpar.core import family, spec, strict
from jaxpar.core.cells import Order
from jaxpar.core.plan import Plan, order_of, scheme_of
from jaxpar.core.policy import Policy
from jaxpar.core.recipe import Model, Recipe
from jaxpar.core.refuse import Collector, Problem, refuse
from jaxpar.core.scaling import loss_scale_of
from jaxpar.core.timetable import timetable
from jaxpar.core.types import Dataset, Layer, LossScale, Reducer
from jaxpar.plan import check, layout, offload, remat
from jaxpar.plan.context import Settings
from jaxpar.plan.layout import SINGLE, Placement
from jaxpar.plan.wire import device_wire
from jaxpar.plan.zero import zero_of
from jaxpar.step import checks, histories, master, scaling
from jaxpar.step.gradients import Pipeline
from jaxpar.step.master import Master
from jaxpar.step.rates import learning_rate, schedule_of
from jaxpar.step.rounding import Origin
from jaxpar.step.stages import Division, costs_of, divide

CONTEXT = 128  # tokens per sequence where neither the recipe nor the model says


class Parts(NamedTuple):
    """The parts of one run, as the recipe names them.

    Attributes:
        model: from inputs to logits.
        optimizer: unscaling, clipping and the optimizer, chained, on global arrays.
        links: what is chained there.
        loss_scale: what gradients are scaled by; None for 1.
        master: how parameters rest; None for float32.
        offload: what rests on the host, as `plan/offload.py` parses it.
        reducer: how gradients are summed over data.
        settings: what the Context is made of.
        norms: how often a step takes the norm of all gradients: to report it, and to clip.
        pipeline: in which order microbatches go through which stages.
        microbatches: parts of a batch.
        partition: who decides the collectives: `manual` or `auto`.
        seed: of the run.
        inputs: shape and dtype of the inputs of one batch.
        labels: the same of its labels.
    """

    model: Layer
    optimizer: optax.GradientTransformation
    links: tuple[optax.GradientTransformation, ...]
    loss_scale: LossScale | None
    master: Master | None
    offload: frozenset[str]
    reducer: Reducer
    settings: Settings
    norms: int
    pipeline: Pipeline
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
    refuse(strict.mistyped(recipe))
    of_data, of_rest = Collector([]), Collector([])
    dataset = of_data.attempt(_dataset, recipe, data_dir)
    if dataset is None:
        of_rest.attempt(_checked, recipe, None, None, 1)
        told = {problem.field for problem in of_rest.problems}
        named = [_in_recipe(problem) for problem in of_data.problems]
        refuse([*(problem for problem in named if problem.field not in told), *of_rest.problems])
    batch = dataset.batch(0)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in batch]
    return assemble(recipe, *shapes, dataset.classes), dataset


def sketch(recipe: Recipe, data_dir: str | None = None) -> Parts:
    """As `prepare`, to plan with: a batch may have more examples than the data has.

    Raises:
        Refused: as `prepare`, but for what a run asks of its data.
    """
    refuse(strict.mistyped(recipe))
    dataset = _dataset(dataclasses.replace(recipe, batch=1), data_dir)
    shapes = [jax.ShapeDtypeStruct((recipe.batch, *a.shape[1:]), a.dtype) for a in dataset.batch(0)]
    return assemble(recipe, *shapes, dataset.classes)


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
    refuse(strict.mistyped(recipe))
    model, placement, division = _checked(recipe, inputs, labels, classes)
    plan = recipe.plan
    settings = Settings(
        placement=placement,
        policy=_policy(plan),
        wire=device_wire(),
        zero=zero_of(plan, placement, model.dims[0], _shapes(model)[0]),
        unroll={"true": True, "false": False, "auto": None}[plan.unroll],
        regather=plan.regather,
        remat=remat.parse(plan.remat)._replace(offload="activations" in offload.parse(plan.offload)),
    )
    refuse(checks.other_data(recipe, model, settings, (inputs, labels)))
    refuse(checks.unknown_activations(recipe, model, settings, (inputs, labels)))
    reducer = family.pick("reducers", plan.reducer)()
    loss_scale = scaling.chosen(recipe.loss_scale, settings.policy)
    kept = master.chosen(recipe, settings.policy)
    refuse(master.unused(recipe, kept))
    *first, update = optimizer_links(recipe, model, loss_scale)
    origin = Origin(model.dims[0], _shapes(model)[0], placement.stack)
    links = (*first, master.kept(kept, update, recipe.seed, origin))
    return Parts(
        model=model,
        optimizer=optax.chain(*links) if len(links) > 1 else links[0],
        links=links,
        loss_scale=loss_scale,
        master=kept,
        offload=offload.parse(plan.offload),
        reducer=reducer,
        settings=settings,
        norms=1 + bool(recipe.clip),
        pipeline=_pipeline(plan, division),
        microbatches=plan.microbatches,
        partition=plan.partition,
        seed=recipe.seed,
        inputs=inputs,
        labels=labels,
    )


def _pipeline(plan: Plan, division: Division) -> Pipeline:
    """The timetables of training and of evaluation."""
    order = order_of(plan)
    return Pipeline(timetable(order), timetable(_ahead(order)), division, plan.storage)


def _ahead(order: Order) -> Order:
    """The forward work alone, in the same order."""
    return Order(order.place, tuple(tuple(cell for cell in row if cell.kind == "F") for row in order.work))


def _checked(recipe: Recipe, inputs, labels, classes: int) -> tuple[Layer, Placement, Division]:
    """The model, where it lies and its stages, once no problem is left that could be found; arguments as of `assemble`.

    Without inputs and labels it checks what does not need them; the model may then be None.
    """
    found = Collector([*checks.of_numbers(recipe), *check.of_plan(recipe.plan)])
    scheme = found.attempt(scheme_of, recipe.plan.tensor)
    builder = found.attempt(family.pick, "models", recipe.model.name, "model.name")
    found.attempt(optimizer_of, recipe, None)
    found.attempt(schedule_of, recipe.schedule)
    found.problems.extend(master.wrong(recipe))
    if recipe.loss_scale != scaling.AUTO:
        found.attempt(loss_scale_of, recipe.loss_scale)
    fields, model = {}, None
    if builder:
        given = model_fields(recipe, classes) | ({"example": inputs.shape[1:]} if inputs else {})
        fields = family.defaults(builder) | family.accepted(builder, given)
        found.problems.extend(
            [*checks.unknown_fields(recipe, builder), *checks.too_few_classes(recipe, builder, classes)]
        )
    if not 1 <= min(_sizes(recipe)) <= max(_sizes(recipe)) <= checks.MOST:  # the rest divides by them
        refuse(found.problems)
    if builder:
        found.problems.extend(check.of_heads(*(fields.get(name) for name in ("width", "heads", "kv_heads"))))
        if inputs or "example" not in family.parameters(builder):
            model = found.attempt(builder, **fields)
    if model and inputs and not found.problems:
        model = found.attempt(_with_histories, recipe, model, inputs, labels)
    order = found.attempt(order_of, recipe.plan)
    found.problems.extend([*remat.of_order(recipe.plan, order), *offload.of_order(recipe.plan, order)] if order else ())
    division = None
    if order and model:
        division = found.attempt(_divided, recipe, model, order, inputs)
    if scheme:
        sizes = _dims(recipe, fields, labels)
        stack = division.stack if division else ()
        group = check.group(recipe.plan)
        placement = layout.place(scheme, recipe.plan.data, sizes, recipe.plan.pipe, stack, group)
        found.problems.extend(check.of_zero(placement, recipe.plan))
        found.problems.extend(check.of_rows(placement, recipe.plan, recipe.batch, sizes.get("context")))
    if scheme and model:
        found.problems.extend(check.of_model(placement, model.dims, _shapes(model), sizes, fields))
        if not found.problems:
            block = _policy(recipe.plan).block
            found.problems.extend(check.of_blocks(placement, model.dims[0], _shapes(model)[0], block))
    refuse(found.problems)
    return model, placement, division


def _policy(plan: Plan) -> Policy:
    """The policy that a plan names."""
    return family.pick("policies", plan.precision, "plan.precision")()


def _with_histories(recipe: Recipe, model: Layer, inputs, labels) -> Layer:
    """The model with state for delayed scaling, if its precision asks for it and it can take this data."""
    policy = _policy(recipe.plan)
    if policy.history is None:
        return model
    refuse(checks.other_data(recipe, model, Settings(SINGLE, policy, device_wire()), (inputs, labels)))
    return histories.remembering(model, policy, inputs)


def _shapes(model: Layer):
    """Of (params, extra), as on disk."""
    return jax.eval_shape(lambda seed: model.init(jax.random.key(seed)), 0)


def _divided(recipe: Recipe, model: Layer, order: Order, inputs) -> Division:
    """The model in stages; what they cost is only asked where the cut depends on it."""

    def costs():
        policy = _policy(recipe.plan)
        return costs_of(model, Settings(SINGLE, policy, device_wire()), inputs)

    refuse(checks.out_of_order(recipe, model, order))
    return divide(model, order.place, recipe.model.name, costs)


def _sizes(recipe: Recipe) -> list[int]:
    """All sizes that the recipe gives."""
    given = [getattr(recipe.model, field) for field in checks.MODEL_SIZES]
    return [recipe.batch, recipe.plan.data, recipe.plan.microbatches, *(size for size in given if size is not None)]


def _dims(recipe: Recipe, fields: dict, labels) -> dict[str, int]:
    """Entries of the dims that the plan may split and that are none of a parameter."""
    sizes = {"batch": recipe.batch // recipe.plan.microbatches}
    sizes |= {name: fields[name] for name in ("kv_heads", "context", "heads") if fields.get(name)}
    return sizes | ({"context": labels.shape[1]} if labels and len(labels.shape) == 2 else {})


def model_fields(recipe: Recipe, classes: int | None) -> dict:
    """What the recipe says of the model, with the vocabulary that the data has unless it says otherwise."""
    fields = {field.name: getattr(recipe.model, field.name) for field in dataclasses.fields(recipe.model)}
    fields.pop("name")
    return fields | {"vocab": fields["vocab"] or classes, "context": fields["context"] or CONTEXT}


def optimizer_links(
    recipe: Recipe, model: Layer, loss_scale: LossScale | None = None
) -> tuple[optax.GradientTransformation, ...]:
    """Unscaling and clipping, if there is any, then the optimizer; only matrices decay."""
    decayed = jax.tree.map(lambda words: len(words.replace("layers ", "").split()) > 1, model.dims[0])
    update = optimizer_of(recipe, decayed)
    if loss_scale:
        return scaling.unscaling(loss_scale, recipe.clip), update
    return (optax.clip_by_global_norm(recipe.clip), update) if recipe.clip else (update,)


def optimizer_of(recipe: Recipe, decayed) -> optax.GradientTransformation:
    """The optimizer alone; `decayed`: which leaves decay."""
    return spec.member("optimizers", recipe.optimizer, "optimizer")(learning_rate(recipe), recipe.weight_decay, decayed)


def _in_recipe(problem: Problem) -> Problem:
    """A problem of a dataset's argument by the name that it has in a recipe."""
    ours = {field.name for field in dataclasses.fields(Model)} - {"name"}
    return problem._replace(field=f"model.{problem.field}") if problem.field in ours else problem


def _dataset(recipe: Recipe, data_dir: str | None) -> Dataset:
    builder = spec.member("datasets", recipe.data.name, "data.name", ("seed", "vocab", "data_dir"))
    fields = model_fields(recipe, None) | {"batch": recipe.batch, "seed": recipe.seed, "data_dir": data_dir}
    return builder(**family.accepted(builder, fields))
