"""Sums in few bits are those of the reference, in any chunks, and products are such sums."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxpar.core import chunked, compat
from jaxpar.core.formats import FORMATS, nearest

SERIES = ("uniform_mean1_std1", "normal0", "ones", "relu_normal")
IN_FILE = {"fp16": "float16", "bf16": "bfloat16", "fp169": "fp169_own"}


@pytest.mark.parametrize("name", IN_FILE)
def test_chunk_sums_are_those_of_the_reference(name):
    file, fmt = golden.load("chunk_accumulation"), FORMATS[name]
    x = np.stack([file[f"{series}/{IN_FILE[name]}/xq"] for series in SERIES])
    sums = jax.jit(chunked.total, static_argnums=(1, 2))
    assert np.array_equal(once_more(x, fmt), x)
    for at, chunk in enumerate(file["chunk_lengths"]):
        want = [file[f"{series}/{IN_FILE[name]}/chunked"][at] for series in SERIES]
        assert np.array_equal(sums(x, int(chunk), fmt), want), chunk
    naive = [file[f"{series}/{IN_FILE[name]}/naive_final"] for series in SERIES]
    assert np.array_equal(sums(x, 10**6, fmt), naive)
    if name == "fp169":
        assert naive[0] == 4096, "where 1 is less than half of the distance between two numbers"


def once_more(x, fmt):
    return np.asarray(nearest(x, fmt))


def by_numpy(a, b, chunk, fmt):
    """The same product in loops of numpy, rounded by a dtype."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    out = np.zeros((a.shape[0], b.shape[1]), fmt)
    for start in range(0, a.shape[1], chunk):
        part = np.zeros_like(out)
        for k in range(start, min(start + chunk, a.shape[1])):
            part = (part.astype(np.float64) + np.outer(a[:, k], b[k])).astype(fmt)
        out = (out.astype(np.float64) + part.astype(np.float64)).astype(fmt)
    return out.astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 7, 8, 23, 64])
def test_a_product_is_summed_in_chunks_that_need_not_divide(chunk):
    rng = np.random.default_rng(0)
    a, b = (once_more(rng.normal(size=size).astype(np.float32), FORMATS["e5m2"]) for size in ((5, 23), (23, 4)))
    got = jax.jit(chunked.matmul, static_argnums=(2, 3))(a, b, chunk, FORMATS["fp16"])
    assert np.array_equal(got, by_numpy(a, b, chunk, np.float16))
    assert np.any(np.asarray(got) != a @ b)


def test_what_is_too_large_is_told():
    a, b = jnp.full((1, 4), 200.0), jnp.full((4, 1), 200.0)
    assert np.isinf(chunked.matmul(a, b, 2, FORMATS["fp16"])) and np.isnan(chunked.matmul(a, b, 2, FORMATS["e4m3"]))


def test_a_product_of_parts_on_several_devices():
    mesh = compat.make_mesh((2, 2), ("x", "y"), jax.devices()[:4])
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=size).astype(np.float32) for size in ((4, 9), (9, 6)))
    spread = jax.shard_map(
        lambda a, b: chunked.matmul(a, b, 4, FORMATS["fp169"]),
        mesh=mesh,
        in_specs=(PartitionSpec("x"), PartitionSpec(None, "y")),
        out_specs=PartitionSpec("x", "y"),
    )
    assert np.array_equal(jax.jit(spread)(a, b), chunked.matmul(a, b, 4, FORMATS["fp169"]))
