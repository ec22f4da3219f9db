"""Which device holds what: the mesh, activations and parameters of a plan, as text and as a picture."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxpar.plan import layout, padding
from jaxpar.plan.layout import Layout
from jaxpar.step.parts import Parts

MOST = 16  # parts of a dim that are drawn; of more, the first ones


class Array(NamedTuple):
    """An array that lies over a mesh; of any rank.

    Attributes:
        name: what it is.
        dims: the name of each dim.
        shape: its sizes.
        layout: the mesh axes of each dim, major first.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout


def holders(axes: Mapping[str, int], over: Layout) -> np.ndarray:
    """Which devices hold each part of an array.

    Args:
        axes: sizes of the mesh axes, major first; devices are numbered in that order.
        over: the mesh axes of each dim of the array, major first.

    Returns:
        Tuples of device numbers, `[parts of dim 0, parts of dim 1, ...]`; of an array without dims, the one that all
        devices hold.
    """
    found = np.empty([math.prod(axes[axis] for axis in dim) for dim in over], object)
    found.fill(())
    for device, places in enumerate(itertools.product(*(range(size) for size in axes.values()))):
        at = dict(zip(axes, places, strict=True))
        part = tuple(_number([at[axis] for axis in dim], [axes[axis] for axis in dim]) for dim in over)
        found[part] = (*found[part], device)
    return found


def _number(digits: Sequence[int], sizes: Sequence[int]) -> int:
    number = 0
    for digit, size in zip(digits, sizes, strict=True):
        number = number * size + digit
    return number


def arrays(parts: Parts) -> list[Array]:
    """The mesh, a microbatch, activations beside and inside blocks, and of parameters one of each kind of dims."""
    placement, model = parts.settings.placement, parts.model
    axes = placement.scheme.axes or {"data": 1}
    split = tuple((axis,) if placement.scheme.axes else () for axis in axes)
    found = [Array("mesh", tuple(axes), tuple(axes.values()), split)]
    batch = parts.inputs.shape[0] // parts.microbatches
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0))[0])
    paths, zero = jax.tree_util.tree_leaves_with_path(model.dims[0]), parts.settings.zero
    leaves = list(zip(paths, jax.tree.leaves(shapes), zero.leaves(), strict=True))
    width = {word: size for (_, words), leaf, _ in leaves for word, size in zip(words.split(), leaf.shape, strict=True)}
    rows = ("batch", "context") if len(parts.inputs.shape) == 2 else ("batch",)
    counts = (batch, *parts.inputs.shape[1 : len(rows)])
    for word in ("embed", "mlp", "heads", "channels"):
        if word in width:
            dims = (*rows, word)
            over = layout.activation(placement, " ".join(dims), len(dims))
            found.append(Array(f"activations of a microbatch, {word}", dims, (*counts, width[word]), over))
    seen = set()
    for (path, words), leaf, rest in leaves:
        if words not in seen and len(words.removeprefix("layers").split()) > 1:
            seen.add(words)
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            shape = padding.shape(placement, words, leaf.shape)
            found.append(Array(name, tuple(words.split()), shape, rest.layout(zero.stage, 3)))
    return found


def text(axes: Mapping[str, int], shown: Sequence[Array]) -> str:
    """Arrays as grids of device numbers: the last two split dims are rows and columns, others one grid per part."""
    return "\n\n".join(_text(axes, array) for array in shown)


def _text(axes: Mapping[str, int], array: Array) -> str:
    sizes = " x ".join(f"{dim} {size}" for dim, size in zip(array.dims, array.shape, strict=True))
    head = f"{array.name}: {sizes}"
    if not any(array.layout):
        return f"{head}\n  whole on {_ranges(holders(axes, ()).item())}"
    lines = [head]
    for title, rows, columns, grid in _slabs(axes, array):
        cells = [["", *columns], *([row, *map(_ranges, line)] for row, line in zip(rows, grid, strict=True))]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += [f"  {title}"] if title else []
        for line in cells:
            lines.append("  " + "  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)))
    if max(math.prod(axes[axis] for axis in over) for over in array.layout) > MOST:
        lines.append(f"  ... and so on: the first {MOST} parts of each dim are shown")
    return "\n".join(line.rstrip() for line in lines)


def _slabs(axes: Mapping[str, int], array: Array):
    """(title, names of rows, names of columns, devices) of each grid that an array is shown as."""
    held = holders(axes, array.layout)
    split = [dim for dim, over in enumerate(array.layout) if over]
    held = held.reshape([held.shape[dim] for dim in split])
    names = [_spans(array.dims[dim], array.shape[dim], count) for dim, count in zip(split, held.shape, strict=True)]
    if len(split) == 1:
        names, held = [[""], *names], held[None]
    *outer, rows, columns = names
    for place in itertools.product(*(range(len(some)) for some in outer)):
        title = ", ".join(some[number] for some, number in zip(outer, place, strict=True))
        yield title, rows, columns, [list(line[: len(columns)]) for line in held[place][: len(rows)]]


def _spans(dim: str, size: int, count: int) -> list[str]:
    """Names of the parts of a dim, as many as are shown."""
    each = size // count
    return [f"{dim} {n * each}:{(n + 1) * each}" if each > 1 else f"{dim} {n}" for n in range(min(count, MOST))]


def _ranges(devices: Sequence[int]) -> str:
    """Numbers in order, as `0-3,8`, the neighbours joined."""
    found: list[list[int]] = []
    for device in devices:
        if found and found[-1][-1] == device - 1:
            found[-1][-1] = device
        else:
            found.append([device, device])
    words = [f"{first}-{last}" if last > first else f"{first}" for first, last in found]
    return ",".join(words if len(words) <= 4 else [*words[:3], "..."])


def picture(path: Path, axes: Mapping[str, int], shown: Sequence[Array]) -> Path:
    """The same as PNG: a row of grids per array, each part in the colour of the first device that holds it."""
    drawn = [(array, list(_slabs(axes, array))[:4]) for array in shown if any(array.layout)]
    if not drawn:
        raise ValueError("nothing is split: every device holds everything")
    figure = Figure(figsize=(11, max(2.0, 1.3 * len(drawn))), dpi=150, layout="constrained")
    count = math.prod(axes.values())
    for row, (array, slabs) in zip(figure.subfigures(len(drawn), 1, squeeze=False)[:, 0], drawn, strict=True):
        sizes = " x ".join(f"{dim} {size}" for dim, size in zip(array.dims, array.shape, strict=True))
        row.suptitle(f"{array.name}: {sizes}", fontsize=9, x=0.01, ha="left")
        for panel, slab in zip(row.subplots(1, len(slabs), squeeze=False)[0], slabs, strict=True):
            _grid(panel, slab, count)
    figure.savefig(path)
    return path


def _grid(panel: Panel, slab: tuple, count: int) -> None:
    title, rows, columns, grid = slab
    for down, line in enumerate(grid):
        for across, devices in enumerate(line):
            color = colormaps["viridis"](0.15 + 0.8 * devices[0] / max(1, count - 1))
            panel.add_patch(Rectangle((across, down), 0.96, 0.94, color=color))
            ink = "white" if devices[0] < count / 2 else "black"
            panel.text(across + 0.48, down + 0.47, _ranges(devices), ha="center", va="center", fontsize=7, color=ink)
    panel.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    panel.set_xticks([n + 0.48 for n in range(len(columns))], columns, fontsize=6)
    panel.set_yticks([n + 0.47 for n in range(len(rows))], rows, fontsize=6)
    panel.set_title(title, fontsize=7, loc="left")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
