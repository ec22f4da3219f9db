"""State that is made of gradients does not know of the loss scale, whatever becomes of that."""

import functools

import pytest
from harness import losses, recipe_of
from parity import assert_equal

from jaxpar.core.recipe import Model

STEPS = 4
GROWING = "dynamic:1024+interval=1"  # by powers of two, so nothing is rounded


@functools.cache
def trained(norm, plan, loss_scale):
    model = Model("convnet", layers=2, width=16, norm=norm, activation="gelu_tanh")
    return losses(recipe_of(model, plan, loss_scale=loss_scale, warmup=0, learning_rate=1e-2), STEPS)


CASES = [
    ("online", "data=1"),
    *(
        pytest.param(norm, plan, marks=pytest.mark.slow)
        for norm in ("online", "streaming")
        for plan in (
            "data=1",
            "data=2,pipe=2,microbatches=4,schedule=gpipe,storage=residual",
            "microbatches=2,remat=block",
        )
    ),
]


@pytest.mark.parametrize("norm, plan", CASES)
def test_state_of_the_backward_pass_is_that_without_a_loss_scale(norm, plan):
    # unscaling and clipping are one product, so rounding differs; scales are from 1024 on
    assert_equal(trained(norm, plan, GROWING), trained(norm, plan, "none"), tolerance=1e-4)
