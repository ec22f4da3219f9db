"""What every member of the smaller families must do: a new file is picked up here, and trains alike on any mesh."""

import numpy as np
import pytest
from harness import SMALL, losses, recipe_of, variant
from networks import NETWORKS
from test_recurrent import TEXT

from jaxpar.core import family

MESH = "data=2,tensor=two_d:2x2"
STEPS = 4


def curves(field="", model=SMALL["mlp"], **choice):
    """Loss curves of the small MLP under a mesh and on one device."""
    plans = (f"{plan}{field}" for plan in (MESH, "data=1"))
    return [losses(recipe_of(model, plan, **choice), STEPS)[0] for plan in plans]


def test_every_model_is_compared_with_one_device():
    why = "add the model to SMALL in tests/harness.py, which test_parity.py runs, or to tests/networks.py"
    assert sorted({*SMALL, *NETWORKS, *TEXT}) == family.names("models"), why


@pytest.mark.parametrize("name", family.names("optimizers"))
def test_an_optimizer_moves_the_same_under_any_layout(name):
    got, want = curves(optimizer=name, learning_rate=0.05)
    assert abs(want[-1] - want[0]) > 1e-3
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", family.names("policies"))
def test_a_policy_gives_the_same_losses_under_any_layout(name):
    model = variant(SMALL["mlp"], layers=1)  # of 9 policies, some slow to compile
    got, want = curves(f",precision={name}", model, learning_rate=0.05)
    np.testing.assert_allclose(got, want, rtol=family.pick("policies", name)().tolerance)


@pytest.mark.parametrize("name", family.names("reducers"))
def test_a_reducer_gives_the_losses_of_one_device(name):
    got, want = curves(f",reducer={name}", learning_rate=0.05)
    np.testing.assert_allclose(got, want, rtol=1e-5)
