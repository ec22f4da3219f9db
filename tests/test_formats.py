"""Numbers are rounded onto the grid of their format as the references do, and at random without a bias."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.core import formats
from jaxpar.core.formats import FORMATS, Format, fixed, named, nearest, stochastic
from jaxpar.core.refuse import Refused

ROUNDED = {name: fmt for name, fmt in FORMATS.items() if name != "fp32"} | {
    fmt.name: fmt for fmt in (fixed(4, 12), fixed(2, 6), fixed(1, 22), fixed(8, 0))
}
each_format = pytest.mark.parametrize("name", ROUNDED)
DRAWS = 1_000_000
once, many = jax.jit(nearest, static_argnums=1), jax.jit(stochastic, static_argnums=1)


def equal(got, want):
    """Same numbers, signs of zero included, and NaN for NaN."""
    got, want = np.asarray(got), np.asarray(want)
    same = (got == want) & (np.signbit(got) == np.signbit(want))
    return bool(np.all(same | (np.isnan(got) & np.isnan(want))))


def codes(a):
    return np.asarray(jax.lax.bitcast_convert_type(a, jnp.uint8))


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", jnp.float8_e4m3fn), ("e5m2", jnp.float8_e5m2)])
def test_eight_bits_are_rounded_as_torch_and_ml_dtypes_do(name, dtype):
    file, fmt = golden.load("fp8_tables"), FORMATS[name]
    own, x = jnp.dtype(dtype).name, file["x"]
    plain, kept = nearest(x, fmt, saturate=False), nearest(x, fmt)
    torch = kept if name == "e4m3" else plain  # its casts to e4m3 saturate
    assert len(x) == 10529 and equal(plain, file[f"rne/{own}/ml_dtypes_values"])
    assert equal(torch, file[f"rne/{own}/torch_values"])
    assert np.array_equal(codes(plain.astype(dtype)), file[f"rne/{own}/ml_dtypes_codes"])
    numbers = ~np.isnan(torch)  # of which torch and ml_dtypes have different codes for NaN
    assert np.array_equal(codes(torch.astype(dtype))[numbers], file[f"rne/{own}/torch_codes"][numbers])
    clipped = nearest(np.clip(x, -fmt.largest, fmt.largest), fmt)
    assert equal(clipped, file[f"rne_sat/{own}/values"])
    assert np.array_equal(codes(formats.cast(x, dtype)), file[f"rne_sat/{own}/codes"])
    if name == "e4m3":
        for between, by in (("bf16", "bf16_then_e4m3fn"), ("fp16", "f16_then_e4m3fn")):
            twice = nearest(nearest(x, FORMATS[between], saturate=False), fmt, saturate=False)
            assert equal(twice, file[f"double_round/{by}"]) and not equal(twice, plain)


@pytest.mark.parametrize(("name", "own"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_sixteen_bits_are_rounded_as_torch_does(name, own):
    file = golden.load("fp8_tables")
    assert equal(nearest(file["x"], FORMATS[name], saturate=False), file[f"rne/{own}/torch"])


OTHERS = {
    "float8_e4m3": formats.ieee("", 4, 3),
    "float8_e3m4": formats.ieee("", 3, 4),
    "float8_e4m3b11fnuz": Format("", 4, 3, 11, 30.0, infinite=False),
    "float8_e4m3fnuz": Format("", 4, 3, 8, 240.0, infinite=False),
    "float8_e5m2fnuz": Format("", 5, 2, 16, 57344.0, infinite=False),
    "float6_e2m3fn": Format("", 2, 3, 1, 7.5, infinite=False),
    "float6_e3m2fn": Format("", 3, 2, 3, 28.0, infinite=False),
    "float4_e2m1fn": Format("", 2, 1, 1, 6.0, infinite=False),
    "float8_e4m3fn": FORMATS["e4m3"],
    "float8_e5m2": FORMATS["fp152"],
}


@pytest.mark.parametrize("own", OTHERS)
def test_the_grid_is_the_table_of_codes(own):
    table, fmt = golden.load("fp8_tables")[f"table/{own}/ml_dtypes"], OTHERS[own]
    finite = np.unique(np.abs(table[np.isfinite(table)])).astype(np.float32)
    assert finite[-1] == fmt.largest and finite[1] == fmt.quantum
    between = (finite[1:] + finite[:-1]) / 2
    asked = [finite, -finite, np.nextafter(between, np.float32(0)), np.nextafter(between, np.float32(1e9)), between]
    *found, even = np.split(np.asarray(once(np.concatenate(asked), fmt)), np.cumsum(list(map(len, asked)))[:-1])
    assert all(map(equal, found, [finite, -finite, finite[:-1], finite[1:]]))
    assert set(even[::2]) <= set(finite[::2]) and set(even[1::2]) <= set(finite[::2]), "ties go to even codes"


def neighbours(x: float, fmt: Format) -> tuple[float, float]:
    """The numbers of a format on both sides of x, in exact arithmetic."""
    exponent = np.floor(np.log2(abs(x))) if fmt.exponent else 0
    step = max(2.0 ** (exponent - fmt.mantissa), fmt.quantum) if fmt.exponent else fmt.quantum
    below = np.floor(x / step) * step
    return below, below + step


def places(fmt: Format) -> np.ndarray:
    """Numbers to round, none of them on the grid: where something could go wrong."""
    normal = 2.0 ** (1 - fmt.bias) if fmt.exponent else 16 * fmt.quantum
    one = 2.0 if fmt.exponent else fmt.largest / 4
    found = [
        1.3 * one,  # amid a binade
        -1.7 * one,
        2 * one * (1 + 2.0 ** -(fmt.mantissa + 2)),  # above a power of two, and below it
        2 * one * (1 - 2.0 ** -(fmt.mantissa + 3)),
        one + fmt.quantum * 2.0**-3 if not fmt.exponent else one * (1 + 2.0 ** -(fmt.mantissa + 5)),
        normal * (1 - 2.0 ** -(fmt.mantissa + 2)),  # carries from the subnormals into the first binade
        normal * 0.6 + fmt.quantum / 3,
        2.3 * fmt.quantum,
        fmt.quantum * 0.7,
        -fmt.quantum * 0.01,
        fmt.largest * (1 - 2.0 ** -(fmt.mantissa + 2)) if fmt.exponent else fmt.largest - fmt.quantum / 4,
    ]
    return np.array([x for x in found if abs(x) < fmt.largest], np.float32)


@functools.cache
def random_bits():
    return np.random.default_rng(0).integers(0, 2**32, DRAWS, np.uint32)


@each_format
def test_the_mean_of_stochastic_rounding_is_what_was_rounded(name):
    fmt = ROUNDED[name]
    checked = 0
    for x in places(fmt):
        below, above = neighbours(float(x), fmt)
        if x in (below, above):
            continue
        got = np.asarray(many(x, fmt, random_bits()))
        down, up = (int(np.sum(got == np.float32(side))) for side in (below, above))
        assert down and up and down + up == DRAWS, x
        mean = (down * below + up * above) / DRAWS
        share = (float(x) - below) / (above - below)
        error = (above - below) * np.sqrt(share * (1 - share) / DRAWS)
        assert abs(mean - float(x)) < 4 * error, (x, (mean - x) / error)
        checked += 1
    assert checked >= 8


@functools.partial(jax.jit, static_argnums=2)
def each_way(x, bits, fmt):
    """To nearest and at random, saturating and not."""
    return [[nearest(x, fmt, sat), stochastic(x, fmt, bits, sat)] for sat in (True, False)]


@each_format
def test_what_is_no_number_or_too_large_is_as_declared(name):
    fmt, beyond = ROUNDED[name], np.float32(np.inf if ROUNDED[name].infinite else np.nan)
    top, least = np.float32(fmt.largest), np.float32(fmt.least)
    above = fmt.largest * (1 + 2.0 ** -(fmt.mantissa + 2)) if fmt.exponent else fmt.largest + fmt.quantum / 4
    grid, huge = np.asarray(once(places(fmt), fmt)), np.finfo(np.float32).max
    x = np.float32([np.nan, np.inf, -np.inf, huge, -huge, 0, -0.0, top, least, *grid, above])
    bits = np.full(x.shape, 2**32 - 1, np.uint32)  # up, if at all
    saturating, other = each_way(x, bits, fmt)
    infinities = (np.inf, -np.inf) if fmt.infinite else (top, least)
    same = [0.0, -0.0 if fmt.exponent else 0.0, top, least, *grid]
    for got in saturating:
        assert equal(got, [np.nan, *infinities, top, least, *same, top])
    for got, last in zip(other, (top, beyond), strict=True):
        assert equal(got, [np.nan, beyond, -beyond, beyond, -beyond, *same, last])


def test_numbers_smaller_than_floats_normal_ones_are_kept_where_they_exist():
    x = np.array([2.0**-133, 3 * 2.0**-134, 2.0**-149, 2.0**-126 - 2.0**-149], np.float32)
    want = np.array([2.0**-133, 2.0**-132, 0, 2.0**-126], np.float32)
    assert equal(jax.jit(lambda x: nearest(x, FORMATS["bf16"]))(x), want), "not flushed, as XLA:CPU's sums are"
    up = stochastic(x, FORMATS["bf16"], jnp.full(4, 2**32 - 1, jnp.uint32))
    assert np.array_equal(np.asarray(up).view(np.uint32) >> 16, [1, 2, 1, 128])
    assert equal(nearest(x, FORMATS["fp16"]), 0 * want)


def test_a_format_has_a_name_or_a_dtype():
    assert named("fixed:4.12") == fixed(4, 12) and named("fp169").largest == 2**32 - 2**22
    for dtype, name in ((jnp.bfloat16, "bf16"), (np.float16, "fp16"), (jnp.float8_e4m3fn, "e4m3"), ("fp169",) * 2):
        assert named(dtype).name == name
    for wrong in ("fp17", "fixed:20.12", "fixed:0.4", np.int8):
        with pytest.raises(Refused, match=r"1 problem.*\n.*recipe.master = "):
            named(wrong, "recipe.master")
