"""The counter of compiled traffic, against bytes known from theory: to the byte, and never a silent zero."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxpar.report.hlo import count
from jaxpar.report.hlo_text import arrays

MESHES = {"8": {"a": 8}, "2x4": {"a": 2, "b": 4}, "2x2x2": {"a": 2, "b": 2, "c": 2}}
X = jnp.ones((16, 32))
BYTES = 16 * 32 * 4


def compiled(body, axes, *inputs):
    """Text of `body`, run on every device with the whole of `inputs`."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(mapped).lower(*inputs).compile().as_text()


def again(times, step, x):
    return jax.lax.scan(lambda carry, _: (step(carry), None), x, None, length=times)[0]


def ring(axis, x):
    n = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(place, (place + 1) % n) for place in range(n)])


def moved_sum(axis, x):
    return jnp.sin(jax.lax.psum(x, axis))  # the sine keeps XLA from taking the sum out of a loop


def sum_of_three_dtypes(axis, x):
    return jax.lax.psum((x, x.astype(jnp.int32), x.astype(jnp.float16)), axis)


def unequal_branches(axis, x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: moved_sum(axis, x[:8]).repeat(2, 0), lambda x: moved_sum(axis, x), x)


# name: (program, kind, bytes sent by one of n devices for an x of b bytes, operations executed)
PROGRAMS = {
    "all_gather": (lambda axis, x: jax.lax.all_gather(x, axis), "all_gather", lambda n, b: (n - 1) * b, 1),
    "psum": (jax.lax.psum, "all_reduce", lambda n, b: 2 * (n - 1) * b / n, 1),
    "psum_scatter": (jax.lax.psum_scatter, "reduce_scatter", lambda n, b: (n - 1) * b / n, 1),
    "all_to_all": (jax.lax.all_to_all, "all_to_all", lambda n, b: (n - 1) * b / n, 1),
    "ppermute": (ring, "permute", lambda n, b: b, 1),
    "ppermute_one_pair": (lambda axis, x: jax.lax.ppermute(x, axis, [(0, 1)]), "permute", lambda n, b: b, 1),
    "scan_7": (lambda axis, x: again(7, lambda x: moved_sum(axis, x), x), "all_reduce", lambda n, b: 14 * (n - 1) * b / n, 7),
    "scan_5_of_7": (
        lambda axis, x: again(5, lambda x: jnp.sin(again(7, lambda x: ring(axis, jnp.cos(x)), x)), x),
        "permute",
        lambda n, b: 35 * b,
        35,
    ),
    "fori_3_to_11": (
        lambda axis, x: jax.lax.fori_loop(3, 11, lambda _, x: moved_sum(axis, x), x),
        "all_reduce",
        lambda n, b: 16 * (n - 1) * b / n,
        8,
    ),
    "cond": (unequal_branches, "all_reduce", lambda n, b: 2 * (n - 1) * b / n, 1),
}
CALLS = {
    "all_gather": lambda axis, x: jax.lax.all_gather(x, axis),
    "psum_scatter": lambda axis, x: jax.lax.psum_scatter(x, axis, tiled=True),
    "all_to_all": lambda axis, x: jax.lax.all_to_all(x, axis, 0, 1, tiled=True),
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_program_sends_what_theory_says(name, mesh):
    axes = MESHES[mesh]
    program, kind, theory, operations = PROGRAMS[name]
    axis, n = list(axes.items())[-1]
    body = CALLS.get(name, lambda axis, x: program(x, axis) if name == "psum" else program(axis, x))
    traffic = count(compiled(lambda x: body(axis, x), axes, X), axes)
    assert traffic == ({(axis, kind): theory(n, BYTES)}, {(axis, kind): operations}, ())
