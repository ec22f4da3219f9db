"""Model flops against the formulas of the textbooks, and MFU against a stated peak."""

from dataclasses import replace

import jax
import pytest
from harness import SMALL, built, recipe_of
from tiny import TINY

from jaxpar.core import products
from jaxpar.report import chips, flops
from jaxpar.train.fit import fit
from jaxpar.train.progress import quiet


@pytest.mark.parametrize("plan", ["data=1", "tensor=two_half_d:2x2x2", "data=2,microbatches=2,unroll=true"])
def test_a_gpt_works_as_much_as_its_formula_says_under_every_plan(plan):
    model = SMALL["gpt"]
    parts, _ = built(recipe_of(model, plan))
    batch, tokens = parts.inputs.shape
    d, h, vocab = model.width, model.hidden, 61
    block = 2 * 4 * d * d + 2 * 2 * d * h + 2 * 2 * tokens * d  # q k v o, up and down, scores and values
    assert flops.of_model(parts) == 3 * batch * tokens * (model.layers * block + 2 * d * vocab)


def test_a_convolution_counts_its_kernel_at_every_place():
    model = SMALL["convnet"]
    parts, _ = built(recipe_of(model, "data=1"))
    places, w, c = 16 * 4 * 4, model.width, model.hidden
    first = 2 * places * 9 * 1 * w  # of pixels, which need no gradient
    rest = 2 * places * model.layers * (9 * w * c + 9 * c * w) + 2 * 16 * w * 10
    assert flops.of_model(parts) == 2 * first + 3 * rest


def test_loops_count_as_often_as_they_run():
    def recurrent(x, w):
        return jax.lax.scan(lambda h, _: (h @ w, None), x, length=5)[0]

    x, w = jax.ShapeDtypeStruct((2, 3), "float32"), jax.ShapeDtypeStruct((3, 3), "float32")
    assert products.flops(jax.make_jaxpr(jax.jit(recurrent))(x, w).jaxpr) == 5 * 2 * 2 * 3 * 3


@pytest.mark.parametrize("name", ["gpt", "gru", "mlp"])
def test_one_device_executes_what_the_model_asks_for(name):
    parts, _ = built(recipe_of(SMALL[name], "data=1"))
    assert flops.executed(parts) == flops.of_model(parts) > 0


def test_what_is_done_again_and_what_is_padded_is_executed_but_not_the_models():
    model = SMALL["gpt"]
    rows, d, h = 16 * 8, model.width, model.hidden
    parts, _ = built(recipe_of(model, "tensor=one_d:4"))
    padding = 3 * 2 * rows * d * (64 - 61)
    assert flops.executed(parts) == flops.of_model(parts) / 4 + padding / 4
    parts, _ = built(recipe_of(model, "pipe=2,microbatches=4"))
    block = 2 * 4 * d * d + 2 * 2 * d * h + 2 * 2 * 8 * d
    again = block - 2 * d * h  # the first stage's forward pass, but for the last product, which no gradient needs
    assert flops.executed(parts) == rows * (3 * block + again) > rows * (3 * block + 3 * 2 * d * 61)


def test_mfu_is_reckoned_against_the_stated_peak_or_not_at_all():
    run = fit(replace(TINY, steps=3, peak_tflops=0.5), report=quiet())
    assert run.summary["peak_flops"] == 0.5e12 and 0 < run.summary["mfu"] < 1
    seconds = run.summary["model_flops"] / run.summary["mfu"] / 0.5e12
    assert seconds < 60
    unknown = fit(replace(TINY, steps=1), report=quiet())
    assert unknown.summary["mfu"] is None and unknown.summary["peak_flops"] is None, "nobody states that of a CPU"


def test_chips_are_found_by_how_jax_names_them():
    assert chips.peak("TPU v5 lite") == 197e12 and chips.peak("TPU v5p") == chips.peak("TPU v5") == 459e12
    assert chips.peak("NVIDIA H100 80GB HBM3") == 989e12 and chips.peak("NVIDIA H100 PCIe") == 756e12
    assert chips.peak("cpu") is None
