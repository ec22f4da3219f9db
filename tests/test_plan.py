"""Plans and recipes as text, what is refused and how it is mended, and where a model then lies."""

import dataclasses
import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_equal

from jaxpar.core import family
from jaxpar.core.plan import Plan, scheme_of
from jaxpar.core.recipe import Data, Model, Recipe
from jaxpar.core.refuse import Refused
from jaxpar.plan import layout, padding
from jaxpar.plan.layout import place
from jaxpar.step.parts import assemble, prepare
from jaxpar.step.program import program

CONTRACT = "data=2,tensor=two_half_d:1x2x2,pipe=2,schedule=one_f_one_b,microbatches=8,zero=1,remat=block,precision=bf16"
DEFAULTS = (
    "data=1,tensor=single,pipe=1,schedule=one_f_one_b,chunks=1,microbatches=1,storage=recompute,zero=0,zero_group=0,"
    "remat=none,regather=true,ring=false,unroll=auto,offload=none,precision=fp32,partition=manual,reducer=mean"
)
quiet = settings(deadline=None, derandomize=True, database=None)


# text

VALUES = {
    int: st.integers(-(2**40), 2**40),
    bool: st.booleans(),
    str: st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters=","), min_size=1),
}
PLANS = st.builds(Plan, **{field.name: VALUES[type(field.default)] for field in dataclasses.fields(Plan)})


@quiet
@given(PLANS)
def test_a_plan_is_its_text(plan):
    assert Plan.parse(str(plan)) == plan


def test_the_contract_is_understood():
    plan = Plan.parse(CONTRACT)
    assert (plan.data, plan.tensor, plan.pipe, plan.microbatches) == (2, "two_half_d:1x2x2", 2, 8)
    assert (plan.schedule, plan.zero, plan.remat, plan.precision) == ("one_f_one_b", 1, "block", "bf16")
    assert Plan.parse(str(plan)) == plan
    assert str(plan) == CONTRACT.replace("schedule=one_f_one_b,", "")  # a default is not written
    assert Plan.parse("") == Plan() == Plan.parse(" data = 1 , ") == Plan.parse(str(Plan()))


def test_fields_and_defaults_are_those_of_the_contract():
    assert Plan.parse(DEFAULTS) == Plan()
    assert [field.name for field in dataclasses.fields(Plan)] == [item.split("=")[0] for item in DEFAULTS.split(",")]


@pytest.mark.parametrize(
    "text, told",
    [
        ("dta=2", r"plan\.dta = 2: there is no such field\. Legal: did you mean `data`\?"),
        ("data=two", r"plan\.data = two: must be a whole number\. Legal: data=1"),
        ("data=--2", r"plan\.data = --2: must be a whole number"),
        ("data=1.5", r"plan\.data = 1\.5: must be a whole number"),
        ("data=", r"plan\.data = \(nothing\): must be a whole number"),
        ("tensor=", r"plan\.tensor = \(nothing\): must not be empty"),
        ("regather=yes", r"plan\.regather = yes: must be true or false\. Legal: regather=true"),
        ("data=2,data=3", r"plan\.data = 3: is given twice"),
        ("data", r"plan = 'data': is not of the form field=value"),
        ("dta=2,zero=x,zero=1,fsdp:8", r"4 problems.*plan\.dta.*plan\.zero = x.*plan\.zero = 1.*'fsdp:8'"),
    ],
)
def test_text_that_is_no_plan_is_refused(text, told):
    with pytest.raises(Refused, match=f"(?s){told}"):
        Plan.parse(text)


@pytest.mark.parametrize(
    "tensor, told",
    [
        ("tow_d:2x2", "did you mean `two_d`"),
        ("two_d", "two_d needs 2 sizes of at least 1, as in two_d:rowsxcolumns. Legal: two_d:2x2"),
        ("two_d:2", "needs 2 sizes"),
        ("two_d:2x0", "needs 2 sizes"),
        ("two_d:2x-1", "needs 2 sizes"),
        ("two_d:2x2x", "needs 2 sizes"),
        ("single:2", "single takes no sizes. Legal: single"),
        ("nowhere.py:mine:2", "there is no file nowhere.py"),
    ],
)
def test_a_scheme_that_does_not_exist_is_refused(tensor, told):
    with pytest.raises(Refused, match=re.escape(told)) as refused:
        scheme_of(tensor)
    assert [problem.field for problem in refused.value.problems] == ["plan.tensor"]


def test_a_scheme_of_ones_own(tmp_path, monkeypatch):
    source = "from jaxpar.schemes.one_d import one_d\n\n\ndef mine(parts):\n    return one_d(parts)\n"
    (tmp_path / "schemes.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    plan = Plan.parse("data=2,tensor=schemes.py:mine:4")
    assert Plan.parse(str(plan)) == plan
    assert scheme_of(plan.tensor) == scheme_of("one_d:4")
    with pytest.raises(Refused, match=r"defines no `mein`\. Legal: did you mean `mine`"):
        scheme_of("schemes.py:mein:4")


def optional(values):
    return st.none() | values


RECIPES = st.builds(
    Recipe,
    model=st.builds(
        Model,
        layers=optional(st.integers()),
        dropout=optional(st.floats(0, 1)),
        norm=optional(st.text()),
        bias=optional(st.booleans()),
        tied=optional(st.booleans()),
    ),
    data=st.builds(Data, name=st.text()),
    plan=PLANS,
    batch=st.integers(),
    learning_rate=st.floats(allow_nan=False),
    clip=st.floats(allow_nan=False),
)


@settings(parent=quiet, max_examples=40)
@given(RECIPES)
def test_a_recipe_is_its_json(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe


# refusals


def built(recipe, classes=256):
    """The parts of a recipe, for token ids of the shape that it says."""
    ids = jax.ShapeDtypeStruct((recipe.batch, recipe.model.context), jnp.int32)
    return assemble(recipe, ids, ids, classes)


def gpt(plan="data=1", batch=8, **fields):
    sizes = {"layers": 1, "width": 16, "heads": 4, "context": 8} | fields
    return Recipe(model=Model("gpt", **sizes), plan=Plan.parse(plan), batch=batch)


def problems_of(recipe):
    try:
        built(recipe)
    except Refused as refused:
        return refused.problems
    return ()


@pytest.fixture
def no_devices(monkeypatch):
    def none(*args, **fields):
        raise AssertionError("a device was asked for before everything was checked")

    for name in ("devices", "local_devices", "device_count", "device_put", "jit"):
        monkeypatch.setattr(jax, name, none)


def test_every_problem_is_told_at_once(no_devices):
    recipe = gpt("data=2,tensor=three_d:2x2x2,microbatches=3,zero=4,remat=blok", 7, width=18, kv_heads=3, hidden=9)
    recipe = replace(
        recipe, steps=10, warmup=20, seed=-1, learning_rate=0.0, weight_decay=float("nan"), optimizer="adam"
    )
    recipe = replace(recipe, model=replace(recipe.model, dropout=1.5))
    told = ["batch", "seed", "warmup", "weight_decay", "learning_rate", "optimizer", "plan.zero", "plan.remat"]
    told += ["model.width", "model.kv_heads", "model.hidden", "model.dropout"]
    assert {problem.field for problem in problems_of(recipe)} == set(told)
    recipe = replace(recipe, model=replace(recipe.model, norm="layr"))  # the model cannot be built, nor measured
    assert {problem.field for problem in problems_of(recipe)} == {*told, "model.norm"} - {"model.hidden"}


def test_a_problem_with_a_name_hides_none_of_sizes(no_devices):
    recipe = gpt("data=3,tensor=two_dd:2x2,precision=bf61,reducer=men", kv_heads=3)
    told = {problem.field: problem.legal for problem in problems_of(recipe)}
    assert list(told) == ["plan.precision", "plan.reducer", "plan.tensor", "model.kv_heads"]
    for field, name in {"plan.tensor": "two_d", "plan.precision": "bf16", "plan.reducer": "mean"}.items():
        assert f"did you mean `{name}`?" in told[field]
    told = {problem.field for problem in problems_of(replace(gpt("data=3"), model=Model("gtp", context=8)))}
    assert told == {"model.name", "batch"}


def test_a_field_of_another_model_is_refused(no_devices):
    recipe = Recipe(model=Model("gru", heads=4, context=8))  # the context is a field of the data
    (problem,) = problems_of(recipe)
    assert (problem.field, problem.value, problem.rule) == ("model.heads", 4, "the model gru has no such field.")
    assert "width" in problem.legal and "kv_heads" not in problem.legal


def test_a_vocabulary_smaller_than_the_data_is_refused(no_devices):
    (problem,) = problems_of(gpt(vocab=255))
    assert str(problem) == "model.vocab = 255: must hold the 256 classes of the data. Legal: 256 or more."
    assert not problems_of(gpt(vocab=257))


@pytest.mark.parametrize("field, value", [("ring", True)])
def test_what_has_not_landed_is_refused_by_name(field, value, no_devices):
    recipe = replace(gpt(), plan=Plan(**{field: value}))
    (problem,) = problems_of(recipe)
    assert problem.field == f"plan.{field}" and "not landed" in problem.rule
    assert Plan.parse(problem.legal) == Plan()


def test_data_and_sizes_are_refused_together(no_devices):
    recipe = Recipe(model=Model("gpt", width=17), data=Data("stdlib_txt"), plan=Plan(data=3))
    with pytest.raises(Refused, match=r"(?s)3 problems.*did you mean `stdlib_text`") as refused:
        prepare(recipe)
    assert [problem.field for problem in refused.value.problems] == ["data.name", "model.width", "batch"]
    with pytest.raises(Refused, match="did you mean `digits`"):
        prepare(Recipe(model=Model("mlp"), data=Data("digts")))  # a model that cannot be built without data


def suggestions(problem):
    """What the message offers, as (field, value)."""
    for own in re.findall(r"^(?:\w+ = )?(\d+(?:(?:, | or )\d+)*)", problem.legal):
        yield from ((problem.field, int(number)) for number in re.findall(r"\d+", own))
    for other in re.findall(r"or model.context = ([\d or]+)", problem.legal):
        yield from (("model.context", int(number)) for number in re.findall(r"\d+", other))


def mended(recipe, field, value):
    owner, _, name = field.rpartition(".")
    return replace(recipe, **({owner: replace(getattr(recipe, owner), **{name: value})} if owner else {name: value}))


def rules(problems, field):
    """The rules of a field that are violated, numbers aside."""
    return {re.sub(r"\d+", "#", problem.rule) for problem in problems if problem.field == field}


def sized_scheme(name):
    sizes = st.lists(st.integers(1, 4), **dict.fromkeys(("min_size", "max_size"), COUNTS[name]))
    return sizes.map(lambda sizes: ":".join(filter(None, [name, "x".join(map(str, sizes))])))


COUNTS = {name: len(family.parameters(family.pick("schemes", name))) for name in family.names("schemes")}


def test_what_is_suggested_is_legal(no_devices):
    seen = {}

    @settings(parent=quiet, max_examples=20)
    @given(
        tensor=st.sampled_from(sorted(COUNTS)).flatmap(sized_scheme),
        parts=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        batch=st.integers(1, 40),
        sizes=st.fixed_dictionaries(
            {"width": st.integers(1, 48), "heads": st.integers(1, 8), "context": st.integers(1, 20)},
            optional={"kv_heads": st.integers(1, 8), "hidden": st.integers(1, 48)},
        ),
    )
    def check(tensor, parts, batch, sizes):
        recipe = gpt("data={},microbatches={},tensor={}".format(*parts, tensor), batch, **sizes)
        for problem in problems_of(recipe):
            offered = list(suggestions(problem))
            assert offered, str(problem)
            for field, value in offered:
                left = rules(problems_of(mended(recipe, field, value)), problem.field)
                wrong = left if problem.field == "batch" else left & rules([problem], problem.field)
                assert not wrong, f"{problem}\nwith {field} = {value}: {wrong}"
                seen[problem.field] = seen.get(problem.field, 0) + 1

    check()
    assert set(seen) >= {"batch", "model.width", "model.hidden", "model.heads", "model.kv_heads"}


OUT_OF_RANGE = {"batch": [0], "steps": [0], "warmup": [-1, 201], "clip": [-1.0], "seed": [-1, 2**32]}
OUT_OF_RANGE |= {"learning_rate": [0.0, 101.0, float("nan")], "weight_decay": [-0.1, float("inf")]}
OUT_OF_RANGE |= {"evaluate_every": [-1], "evaluate_batches": [0], "checkpoint_every": [-1]}
OUT_OF_RANGE |= {"model.layers": [0], "model.hidden": [-4], "model.dropout": [-0.1, 1.0]}
OUT_OF_RANGE |= {"plan.data": [0], "plan.microbatches": [-2]}


@pytest.mark.parametrize("field, value", [(field, value) for field, some in OUT_OF_RANGE.items() for value in some])
def test_numbers_out_of_range_are_refused(field, value, no_devices):
    recipe = mended(gpt(), field, value)
    (problem,) = problems_of(recipe)
    assert (problem.field, problem.value) == (field, value)
    number = re.findall(r"[\d.]+", problem.legal)[0]
    assert not rules(problems_of(mended(recipe, field, float(number) if "." in number else int(number))), field)


# where rows lie


@pytest.mark.parametrize(
    "tensor, batch, context, on_context",
    [
        ("three_d:2x2x2", 4, 8, ()),  # the batch can carry both
        ("three_d:1x4x2", 2, 8, ("j",)),  # inner rows need k = 2 sequences; the 4 parts of j lie on the context
        ("three_d:2x4x2", 4, 8, ("j",)),
        ("three_d:2x4x2", 8, 8, ()),
        ("sequence:4", 8, 8, ("tensor",)),  # as the scheme wishes
        ("sequence:4", 1, 8, ("tensor",)),
        ("sequence:4", 4, 6, ()),  # as can be
        ("fsdp:4", 4, 8, ()),
    ],
)
def test_rows_of_few_sequences_lie_on_the_context(tensor, batch, context, on_context):
    parts = built(gpt(f"tensor={tensor}", batch, context=context, heads=8))
    assert parts.settings.placement.on_context == on_context
    outer, inner = (layout.activation(parts.settings.placement, word, 3)[:2] for word in ("embed", "mlp"))
    assert outer[1] == on_context and not inner[1]
    scheme = parts.settings.placement.scheme
    assert set(outer[0] + outer[1]) == set(scheme.outer[0]) and inner[0] == scheme.inner[0]


@pytest.mark.parametrize(
    "tensor, batch, context, told",
    [
        ("three_d:2x2x2", 2, 8, "into 4 parts, since inner activations split the batch over i=2, k=2. Legal: 4."),
        ("fsdp:4", 6, 8, "into 4 parts, since inner activations split the batch over shard=4. Legal: 4 or 8."),
        ("three_d:1x4x2", 2, 6, "over j=4. Legal: 4; or model.context = 4 or 8, to carry j=4."),
        (
            "sequence:4",
            2,
            6,
            "model.context = 6: must split into 4 parts, since tensor=4 lies on the context. Legal: 4 or 8.",
        ),
    ],
)
def test_other_splits_of_few_sequences_are_refused(tensor, batch, context, told):
    recipe = gpt(f"tensor={tensor}", batch, context=context, heads=8)
    (problem,) = problems_of(recipe)
    assert told in str(problem)
    for field, value in suggestions(problem):
        assert not problems_of(mended(recipe, field, value))


@pytest.mark.parametrize("microbatches, told", [(3, "Legal: 24."), (4, "Legal: 16.")])
def test_microbatches_are_counted(microbatches, told):
    (problem,) = problems_of(gpt(f"tensor=fsdp:{8 if microbatches == 3 else 4},microbatches={microbatches}", 8))
    assert told in str(problem)


# padding and initial parameters


@pytest.mark.parametrize("vocab", [37, 256])
@pytest.mark.parametrize(
    "tensor, parts", [("single", 1), ("sequence:3", 3), ("fsdp:4", 1), ("two_half_d:2x2x5", 5), ("three_d:2x3x4", 3)]
)
def test_a_vocabulary_of_any_size_is_padded(tensor, parts, vocab):
    placement = place(scheme_of(tensor), 2, {"batch": 120})
    assert padding.parts(placement) == parts
    dims = {"table": "vocab embed", "head": "embed vocab", "bias": "vocab", "other": "embed mlp"}
    whole = {"table": (vocab, 120), "head": (120, vocab), "bias": (vocab,), "other": (120, 120)}
    tree = {name: 1 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in whole.items()}
    padded = padding.pad(placement, dims, tree)
    for name, words in dims.items():
        for size, axes in zip(padded[name].shape, layout.weight(placement, words), strict=True):
            assert size % layout.size(placement.scheme, axes) == 0
    added = -vocab % parts
    assert padded["head"].shape == (120, vocab + added) and padded["other"].shape == (120, 120)
    assert not np.any(padded["table"][vocab:]) and np.sum(padded["bias"]) == np.sum(tree["bias"])
    assert_equal(padding.unpad(placement, dims, padded, tree), tree, tolerance=0)


@cache
def born(plan):
    """Parameters of a small GPT at birth, unpadded, on the host; and its model."""
    parts = built(gpt(plan, heads=4, layers=2, width=24), classes=37)
    compiled = program(parts)
    params = compiled.init().params
    if plan != "data=1":
        assert len(jax.tree.leaves(params)[0].sharding.device_set) > 1
    params = jax.tree.map(np.asarray, params)
    return padding.unpad(compiled.placement, parts.model.dims[0], params, compiled.unpadded.params), parts


@pytest.mark.parametrize("plan", ["data=2,tensor=two_d:2x2", "tensor=three_d:2x2x2"])
def test_a_plan_does_not_change_what_is_drawn(plan):
    got, want = born(plan)[0], born("data=1")[0]
    jax.tree.map(np.testing.assert_array_equal, got, want)  # to the last bit


def test_initial_parameters_are_those_of_the_model():
    got, parts = born("data=1")
    want, _ = parts.model.init(jax.random.key(parts.seed))
    assert_equal(got, want, tolerance=1e-6)
    assert got["tokens"]["table"].shape == (37, 24)
