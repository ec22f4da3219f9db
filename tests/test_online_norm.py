"""Online norm is the reference's, number by number, and has the four properties that its paper states."""

import contextlib
from functools import partial

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laid_out import laid_out, pull
from parity import assert_equal

from jaxpar.norms.online import online

NAMES = {"ls": "layer_scaling", "ac": "clamp", "none": "none"}
REFERENCES = {"online_norm_1d_n8_default": (0.999, 0.99), "online_norm_2d_n8_cifar10": (1 - 2**-10, 1 - 2**-7)}
DIMS = {2: "batch embed", 3: "batch context embed", 4: "batch height width embed"}


def runs(norm, rank, count, plan="data=1"):
    """Jitted training `(params, extra, x, dy) -> Pulled` with the new state in full, and evaluation."""
    train, still = (
        laid_out(norm, plan, {"batch": count, "context": 4}, (DIMS[rank],) * 2, train=mode) for mode in (True, False)
    )

    def step(params, extra, x, dy):
        forward, backward = extra["forward"], extra["backward"]

        def apply(params, inputs):
            x, backward = inputs
            y, new = train(params, {"forward": forward, "backward": backward}, x)
            return y, new["forward"]

        y, back, new = jax.vjp(apply, params, (x, backward), has_aux=True)
        trained, (dx, control) = back(dy)
        return y, (trained, dx), {"forward": new, "backward": control}

    return jax.jit(step), jax.jit(partial(pull, still))


def last(array):
    """Channels last."""
    return np.moveaxis(array, 1, -1) if array.ndim > 1 else array


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), ("float64", 1e-11)])
@pytest.mark.parametrize("control", NAMES)
@pytest.mark.parametrize("name", REFERENCES)
def test_six_steps_and_an_evaluation_are_those_of_the_reference(name, control, precision, tolerance):
    wide = precision == "float64"
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        arrays = {key: array.astype(precision) for key, array in golden.load(name).items() if key != "meta_json"}
        read = {key.split("/")[-1]: array for key, array in arrays.items() if key.startswith(f"{control}/numpy64")}
        forward, backward = REFERENCES[name]
        norm = online(len(arrays["weight"]), forward=forward, backward=backward, control=NAMES[control], clamp=2.0)
        _, extra = norm.init(jax.random.key(0))
        params = {"gain": jnp.asarray(arrays["weight"]), "bias": jnp.asarray(arrays["bias"])}
        train, still = runs(norm, arrays["x_eval"].ndim, len(arrays["x_eval"]))
        for step, (x, g) in enumerate(zip(arrays["x"], arrays["g"], strict=True)):
            y, (trained, dx), extra = train(params, extra, last(x), last(g))
            want = {key: array[step] for key, array in read.items() if len(array) == len(arrays["x"])}
            assert_equal(y, last(want["out"]), tolerance)
            assert_equal(dx, last(want["grad_in"]), tolerance)
            assert_equal(trained, {"gain": want["grad_weight"], "bias": want["grad_bias"]}, tolerance)
            assert_equal(extra["forward"], {"mean": want["mu"], "variance": want["var"]}, tolerance)
            passes = jnp.asarray(step + 1, precision)
            assert_equal(extra["backward"], {"u": want["u"], "v": want["v"], "passes": passes}, tolerance)
        found = still(params, extra, last(arrays["x_eval"]), last(arrays["g_eval"]))
        assert_equal(found.y, last(read["eval_out"]), tolerance)
        assert_equal(found.extra, extra, 0)
        ours = found.gradients[1], found.gradients[0]["gain"], found.gradients[0]["bias"]
        names = ("eval_grad_in", "eval_grad_weight", "eval_grad_bias")
        theirs = [arrays[f"{control}/kernel32/{key}"] for key in names]  # the reference's are in float32 alone
        assert_equal(ours, (last(theirs[0]), *theirs[1:]), 1e-5)


@pytest.mark.parametrize(
    "case, fields",
    [
        ("ls1d", {}),
        ("ls2d", {}),
        ("ls2d_g2", {"groups": 3}),  # of six channels, two each
        ("clamp2d", {"control": "clamp", "clamp": 1.0}),
    ],
)
def test_error_compensation_alone_is_the_reference_s(case, fields):
    """In evaluation, with statistics that change nothing."""
    x, g, out, grad = (last(golden.load("online_norm_ecm")[f"{case}/{key}"]) for key in ("x", "g", "out", "grad_in"))
    norm = online(6, **fields)
    params, extra = norm.init(jax.random.key(0))
    extra["forward"]["variance"] -= 1e-5  # with eps it is 1
    found = runs(norm, x.ndim, len(x))[1](params, extra, x, g)
    assert_equal(found.y, out, 1e-5)
    assert_equal(found.gradients[1], grad, 1e-5)
