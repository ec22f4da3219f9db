"""Where arrays wait between ticks of a timetable: pools with a leading dim of slots, changed in place."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxpar.core import compat
from jaxpar.step.messages import Boundary
from jaxpar.step.pieces import Work

KEEPS = {"F": "kept", "B": "between"}  # the pool of what each kind of work keeps


class Shelves(NamedTuple):
    """How a pool holds what different roles keep: arrays of one shape, dtype and axes share a shelf.

    Attributes:
        arrays: (shape, dtype, axes) of each shelf.
        of: for each role, the shelf of each thing that it keeps.
    """

    arrays: list[tuple]
    of: list[list[int]]


def shelved(works: Sequence[dict[str, Work]], kind: str) -> Shelves:
    """The shelves of what one kind of work keeps, by the roles that `works` are of."""
    arrays: list[tuple] = []
    of = []
    for work in works:
        used: list[int] = []
        for keep in work[kind].keeps if kind in work else ():
            form = (keep.shape, keep.dtype, compat.varying_axes(keep))
            free = [n for n, there in enumerate(arrays) if there == form and n not in used]
            if not free:
                arrays.append(form)
            used.append(free[0] if free else len(arrays) - 1)
        of.append(used)
    return Shelves(arrays, of)


def empty(boundary: Boundary | None, shelves: dict[str, Shelves], slots: dict[str, int]) -> dict[str, list]:
    """Zeros for all pools: `x` and `seed` with one for each array of a message, the others with one for each shelf.

    Args:
        boundary: of all stages; None if there is one.
        shelves: by kind of work.
        slots: of each pool.
    """

    def pool(name, shape, dtype, axes):
        return compat.vary(jnp.zeros((slots[name], *shape), dtype), axes)

    messages = {}
    if boundary:
        shapes, *form = boundary
        messages = {name: [pool(name, shape, *form) for shape in shapes] for name in ("x", "seed")}
    return messages | {
        KEEPS[kind]: [pool(KEEPS[kind], *form) for form in held.arrays] for kind, held in shelves.items()
    }


def taken(pools: Sequence, slot) -> list:
    """What lies in one slot of each of these."""
    return [lax.dynamic_index_in_dim(pool, slot, 0, keepdims=False) for pool in pools]


def written(pools: Sequence, values: Sequence, slot) -> list:
    """The pools with `values` in one slot."""
    pairs = zip(pools, values, strict=True)
    return [lax.dynamic_update_index_in_dim(pool, value, slot, 0) for pool, value in pairs]
