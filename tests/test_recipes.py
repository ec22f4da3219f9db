"""Recipes are strict: what is not plainly one is refused with its fields named, and what is accepted trains."""

import dataclasses
import json
import math
import random
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import TINY

from jaxpar.core import strict
from jaxpar.core.plan import Plan
from jaxpar.core.recipe import Data, Model, Recipe
from jaxpar.core.refuse import Refused
from jaxpar.plan import mesh
from jaxpar.report import machine, memory
from jaxpar.step.parts import prepare
from jaxpar.step.program import program
from jaxpar.train.fit import fit
from jaxpar.train.progress import quiet

BAD = {
    int: ["8", 8.0, True, None, np.int64(8), [8]],
    float: ["1e-3", True, None, np.float32(1), math.nan, math.inf, -1.0],
    str: [1, None, b"gpt", "", "no such name", "../x.py:name"],
    bool: [1, 0, "true", None, 0.0],
}


def fields_of(record, above=""):
    """(dotted name, kinds of value) of each field of a recipe."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{above}{field.name}.")
        else:
            kind = type(field.default) if field.default is not None else None
            yield (
                f"{above}{field.name}",
                kind or next(k for k in BAD if re.search(rf"\b{k.__name__}\b", str(field.type))),
            )


FIELDS = dict(fields_of(Recipe()))


def changed(recipe, name, value):
    """`recipe` with the field of that dotted name set."""
    first, _, rest = name.partition(".")
    return replace(recipe, **{first: changed(getattr(recipe, first), rest, value) if rest else value})


def test_every_field_is_known_here():
    assert len(FIELDS) == 13 + 1 + len(dataclasses.fields(Plan)) + len(dataclasses.fields(Recipe)) - 3


@pytest.mark.parametrize("name", FIELDS)
def test_values_of_a_wrong_type_are_refused_by_name(name):
    optional = {"warmup", "peak_tflops"} | {f"model.{field.name}" for field in dataclasses.fields(Model)} - {
        "model.name"
    }
    for value in BAD[FIELDS[name]]:
        plain = type(value) is FIELDS[name] or (value is None and name in optional)
        if plain:
            continue
        with pytest.raises(Refused) as refused:
            prepare(changed(TINY, name, value))
        assert [problem.field for problem in refused.value.problems] == [name]
        assert type(value).__name__ in str(refused.value)


def test_a_whole_number_is_a_number():
    assert not [*strict.mistyped(replace(TINY, learning_rate=1))]


@pytest.mark.parametrize(
    "text, told",
    [
        ('{"steps": 5, "steps": 6}', "steps = 5 and 6: is given twice"),
        ('{"stepz": 5}', "stepz = 5: there is no such field.*did you mean `steps`"),
        ('{"model": {"name": "gpt", "widht": 5}}', "model.widht = 5: .*did you mean `width`"),
        ('{"model": {"width": 5, "width": 5}}', r"model\.width = 5 and 5: is given twice"),
        ('{"plan": "date=2"}', "plan.date = 2: there is no such field"),
        ('{"plan": {"data": 2}}', r"plan = .*must be Plan, got dict"),
        ('{"model": "gpt"}', "model = 'gpt': must be Model, got str"),
        ('{"steps": "5"}', "steps = '5': must be a whole number, got str"),
        ('{"steps": 5.0}', "steps = 5.0: must be a whole number, got float"),
        ('{"learning_rate": NaN}', "learning_rate = nan: is not a finite number"),
        ('{"clip": -Infinity}', "clip = -inf: is not a finite number"),
        ('{"model": {"bias": 1}}', "model.bias = 1: must be true or false or null, got int"),
        ('{"clip": 1e999, "model": {"dropout": NaN}}', r"(?s)clip = inf.*model\.dropout = nan"),
        ("[]", r"recipe = \[\]: must be one JSON object"),
        ("steps: 5", "is not JSON"),
        ("", "is not JSON"),
        ('{"a": ' * 100_000, "is not JSON"),
        (" " * 2_000_000, "bytes long"),
        ('{"stepz": 5, "batch": "x", "model": {"heds": 2}}', "3 problems"),
        ('{"stepz": 5, "batch": "x", "clip": NaN, "clip": 1}', "4 problems"),
    ],
)
def test_json_that_is_no_recipe_is_refused(text, told):
    with pytest.raises(Refused, match=rf"(?s){told}"):
        Recipe.from_json(text)


def test_json_of_a_part_keeps_the_other_defaults():
    assert Recipe.from_json('{"steps": 7, "plan": "data=2", "model": {"width": 8}}') == Recipe(
        steps=7, plan=Plan(data=2), model=Model(width=8)
    )


@pytest.mark.parametrize("name, data", [("gpt", "digits"), ("mlp", "stdlib_text")])
def test_data_that_a_model_cannot_take_is_refused(name, data):
    recipe = Recipe(model=Model(name, layers=1, width=16), data=Data(data), batch=8)
    with pytest.raises(Refused, match=rf"data.name = {data}: holds .*tokens, and the model {name} takes"):
        prepare(recipe)


def test_a_model_that_cannot_fit_is_refused_before_it_is_compiled():
    with pytest.raises(Refused, match=r"memory = data=1: each device would hold [\d,.]+ GiB \(parameters .*optimizer"):
        fit(replace(TINY, model=Model("mlp", width=2**20)), report=quiet())


@pytest.mark.parametrize("plan", ["tensor=two_half_d:2x2x2", "data=2,tensor=one_d:2,pipe=2,microbatches=2"])
@pytest.mark.parametrize("model", [TINY.model, Model("convnet", layers=1, width=8)], ids=["mlp", "batch norm"])
def test_the_memory_that_a_step_holds_is_that_of_its_arrays(model, plan):
    parts, dataset = prepare(replace(TINY, model=model, plan=Plan.parse(plan)))
    made = program(parts)
    state, found = made.init(), memory.held(parts)

    def here(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert found["parameters"] == found["gradients"] == here(state.params)
    assert (found["optimizer"], found["state"]) == (here(state.opt), here((state.extra, state.comm)))
    assert found["batch"] == here(made.place(dataset.batch(0)))
    assert 0 < memory.available(jax.devices()[0], 8) == machine.memory()[1] // 8


def test_a_mesh_of_too_many_devices_is_refused():
    assert mesh.needed(Plan(data=10**6)) == 10**6
    with pytest.raises(Refused, match="at most 512 can be simulated"):
        mesh.devices(10**6)


# recipes, most of them wrong in some field

SIZES = [None, 1, 2, 3, 4, 8, 16, 32, 0, -1, 2**31, 10**12]
CHOICES = {
    "model.name": ["mlp", "gpt", "gru", "convnet", "gtp", "tests/nothing.py:here"],
    "model.layers": [None, 1, 2, 0, 10**9],
    "model.width": SIZES,
    "model.hidden": SIZES,
    "model.heads": [None, 1, 2, 4, 3, 0],
    "model.kv_heads": [None, None, 1, 2, 0],
    "model.context": [None, 8, 8, 3, 10**9],
    "model.vocab": [None, None, 300, 5, 10**9],
    "model.dropout": [None, 0.0, 0.1, 1.0, math.nan],
    "model.norm": [None, None, "layer", "batch", "rmz"],
    "model.activation": [None, "gelu", "gelu_tanh", "relu", "swish"],
    "model.bias": [None, True, False],
    "model.tied": [None, True, False],
    "data.name": ["digits", "stdlib_text", "digist"],
    "plan.data": [1, 2, 3, 8, 0, 10**6],
    "plan.tensor": ["single", "one_d:2", "two_d:2x2", "three_d:1x2x2", "fsdp:4", "one_d", "one_d:0", "2d:2x2"],
    "plan.microbatches": [1, 1, 2, 0],
    "plan.zero": [0, 0, 0, 0, 1],
    "plan.unroll": ["auto", "true", "maybe"],
    "plan.precision": ["fp32", "bf16", "fp33"],
    "plan.remat": ["none", "none", "none", "block"],
    "plan.partition": ["manual", "auto"],
    "batch": [8, 16, 4, 1, 0, 10**9],
    "steps": [1, 1, 2, 0, 2**40],
    "seed": [0, 7, 2**32 - 1, -1, 2**32],
    "learning_rate": [1e-3, 1.0, 0.0, math.nan],
    "warmup": [None, 0, 1, -1, 10**6],
    "weight_decay": [0.0, 0.1, -1.0],
    "clip": [0.0, 1.0, math.inf],
    "evaluate_every": [0, 1, -1],
    "evaluate_batches": [1, 0],
    "checkpoint_every": [0, 1],
    "skip_limit": [1, 0],
    "peak_tflops": [None, 1.0, 0.0],
    "optimizer": ["adamw", "sgd", "adam", "sgd:momentum=0.5", "sgd:momentum=2"],
    "schedule": ["cosine", "constant", "linear:0", "steps:0.5=0.1", "steps", "cosine:x"],
}


def drawn(base, names, choose):
    """`base` with the fields of these names drawn anew."""
    for name in names:
        base = changed(base, name, choose(CHOICES[name]))
    return base


@st.composite
def recipes(draw):
    """A small recipe that is right, with some of its fields drawn anew."""
    names = draw(st.lists(st.sampled_from(sorted(CHOICES)), min_size=1, max_size=8, unique=True))
    return drawn(draw(st.sampled_from(SOUND)), names, lambda values: draw(st.sampled_from(values)))


SOUND = [
    Recipe(model=model, data=Data(data), batch=8, steps=1, evaluate_batches=1)
    for model, data in (
        (Model("mlp", layers=1, width=16), "digits"),
        (Model("convnet", layers=1, width=8), "digits"),
        (Model("gpt", layers=1, width=16, heads=2, context=8), "stdlib_text"),
        (Model("gru", layers=1, width=16, context=8), "stdlib_text"),
    )
]


def refused_or_trained(recipe, seen):
    """Whether the recipe trained; what was refused must name fields that there are."""
    try:
        run = fit(recipe, report=quiet())
    except Refused as refused:
        named = {problem.field for problem in refused.problems if problem.rule}
        if not named <= {*FIELDS, "memory", "plan"}:
            pytest.fail(f"{recipe}\n{refused}")
        seen.update(named)
        return False
    assert len(run.losses) == recipe.steps and all(map(math.isfinite, run.losses)), recipe
    return True


PLANS = ["data=1", "tensor=two_d:2x2", "data=2,microbatches=2,tensor=one_d:2", "tensor=fsdp:4,partition=auto"]


def test_random_recipes_are_refused_by_field_or_train():
    """Each model with each of PLANS in turn, and one to five fields drawn anew: hypothesis begins with less spread."""
    rng, seen, trained = random.Random(1), set(), []
    for number in range(40):
        base = replace(SOUND[number % 4], plan=Plan.parse(PLANS[number // 4 % 4]))
        names = rng.sample(sorted(CHOICES), 1 + number // 8)
        trained.append(refused_or_trained(drawn(base, names, rng.choice), seen))
    assert 8 <= sum(trained) <= 20 and len(seen) > 15, (sum(trained), sorted(seen))


@pytest.mark.slow
def test_500_random_recipes_are_refused_by_field_or_train():
    seen, trained = set(), []

    @settings(max_examples=500, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(recipes())
    def run(recipe):
        trained.append(refused_or_trained(recipe, seen))
        jax.clear_caches()  # of hundreds of programs

    run()
    assert 50 < sum(trained) < 500 and len(seen) > 5, (sum(trained), len(trained), sorted(seen))


def test_what_is_written_is_what_is_read():
    for recipe in SOUND:
        assert Recipe.from_json(recipe.to_json()) == recipe
        assert json.loads(recipe.to_json())["plan"] == "data=1"


def test_the_largest_seed_trains():
    run = fit(replace(TINY, steps=1, seed=2**32 - 1), report=quiet())
    assert math.isfinite(run.losses[0])
