"""What differs between versions of jax, in one place.  Written for jax 0.10 to 0.12."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.extend.random import threefry2x32_p
from jax.interpreters import partial_eval
from jax.sharding import AbstractMesh, AxisType, Mesh


def make_mesh(sizes: tuple[int, ...], names: tuple[str, ...], devices) -> Mesh:
    """A mesh whose axes are all `Auto`: since 0.8 the default of jax is `Explicit`, which types every array."""
    return Mesh(np.asarray(devices).reshape(sizes), names, axis_types=(AxisType.Auto,) * len(names))


def abstract_mesh(axes: dict[str, int]) -> AbstractMesh:
    """The same without devices, to trace with."""
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def no_compile_cache() -> None:
    """Neither read compiled programs from jax's cache on the disk nor write them there, for the rest of this process.

    For programs over several CPU devices, which jaxlib 0.10.2 does not read back as they were: that collectives run one
    after the other is written down for each loop apart, so those inside a loop may then run beside those outside. They
    all have one key, so they meet partners of another kind, and the process stands still or dies of a broken heap.
    `tests/xla_cache.py` shows it without jaxpar.
    """
    if jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # jax looks at the setting once only


def varying_together(tree):
    """The same, each leaf typed as varying over all axes that any of them does; the gradient of one is then its sum."""
    axes = sorted({axis for leaf in jax.tree.leaves(tree) for axis in varying_axes(leaf)})
    return jax.tree.map(lambda leaf: vary(leaf, axes), tree)


def varying_axes(a) -> tuple[str, ...]:
    """Mesh axes over which `a`, an array or what is known of one, is typed as varying inside `jax.shard_map`."""
    known = a if isinstance(a, jax.core.AbstractValue) else jax.typeof(a)
    return tuple(known.mat.varying)


def vary(a, axes):
    """Type `a` as varying over `axes` too; free forward, its transpose sums the cotangent over those axes."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(a))
    return jax.lax.pcast(a, missing, to="varying") if missing else a


@jax.custom_jvp
def gelu(x):
    """x times the normal distribution function of x, exact.

    As `jax.nn.gelu(x, approximate=False)`, whose derivative jax 0.12.0 refuses inside `jax.shard_map` with check_vma:
    the one of erf asks for constants that vary.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    return jax.nn.gelu(x, approximate=False)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    below = jax.lax.erfc(-x * np.sqrt(0.5).astype(x.dtype)) / 2
    density = jnp.exp(-x * x / 2) * np.sqrt(0.5 / np.pi).astype(x.dtype)
    return gelu(x), (below + x * density) * dx


def random_bits(key, high, low):
    """32 random bits for each pair of counters (uint32 arrays of one shape): a pure function of key, high and low.

    Source: Salmon et al. 2011, Threefry-2x32 with 20 rounds, as in `jax.random`'s default generator.
    """
    keys = [jnp.broadcast_to(word, high.shape) for word in jax.random.key_data(key)]
    axes = sorted({*varying_axes(high), *varying_axes(low), *varying_axes(keys[0])})
    return vary(threefry2x32_p.bind(*[vary(word, axes) for word in (*keys, high, low)])[0], axes)  # it drops them


def without_dead_code(jaxpr):
    """A jaxpr without the operations, in the jaxprs within it as well, whose results nobody reads."""
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]


def run(equation, values: list) -> list:
    """The results of one operation of a traced program, for these values of what it reads."""
    primitive = equation.primitive
    with equation.ctx.manager:
        found = primitive.bind(*values, **primitive.get_bind_params(equation.params))
    return list(found) if primitive.multiple_results else [found]


def scan_counts(equation) -> tuple[int, int]:
    """Of a traced `jax.lax.scan`: how many operands are the same on every trip, and how many it carries."""
    given = equation.params
    if "num_consts" in given:
        return given["num_consts"], given["num_carry"]
    consts, carry, _ = (len(part) for part in given["ft_in"].unpack())  # since 0.12
    return consts, carry
