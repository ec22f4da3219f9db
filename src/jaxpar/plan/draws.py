"""Random bits of an activation: functions of its global index, whatever the layout."""

import jax.numpy as jnp

from jaxpar.plan import layout
from jaxpar.plan.layout import Layout


def offset(settings, axes, count: int):
    """Global index of the first of `count` local entries of a dim that lies over `axes`, major first."""
    place = 0
    for axis in axes:
        place = place * settings.placement.scheme.axes[axis] + settings.wire.index(axis)
    return place * count


def counters(settings, shape: tuple[int, ...], lies: Layout, *, examples: bool = True) -> list:
    """Two 32-bit counters per entry, from its global index: the first two dims, then the others.

    Two words rather than one product, which 2^32 entries of a large batch would overflow.

    Args:
        settings: `Settings` of the microbatch.
        shape: of the local array.
        lies: its layout.
        examples: whether the first dim is one of examples, of which microbatches hold parts.
    """
    words = [jnp.uint32(0), jnp.uint32(0)]
    for dim, (count, axes) in enumerate(zip(shape, lies, strict=True)):
        index = offset(settings, axes, count) + jnp.arange(count)
        if dim == 0 and examples:
            index = index + settings.first_example
        index = index.astype(jnp.uint32).reshape([-1 if d == dim else 1 for d in range(len(shape))])
        word = int(dim > 1) if len(shape) > 2 else dim
        total = count * layout.size(settings.placement.scheme, axes)
        words[word] = words[word] * jnp.uint32(total) + index
    return [jnp.broadcast_to(word, shape) for word in words]
