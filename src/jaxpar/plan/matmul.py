"""The collectives of a product, derived from where its operands live.

Letters: rows r, contraction k, output n; x[r.., k] times w[k, n] gives y[r.., n].
"""

from typing import NamedTuple

from jaxpar.core.scheme import Axes
from jaxpar.plan.layout import Layout, axes_of

Step = tuple[int, str]  # a dim of an operand (of w: 0 contraction, 1 output) and the mesh axis that moves


class Moves(NamedTuple):
    """What one device does around its local product, in this order.

    Attributes:
        vary: axes over which both operands differ, or will: gradients are summed over them after being scattered.
        gather_w: all-gathers on w, minor axes first.
        keep_w: slices of w that a device keeps, where all hold the same columns and y wants them split.
        gather_x: all-gathers on x, minor axes first.
        keep_x: the same for rows of x.
        scatter: reduce-scatters of partial sums onto dims of y.
        total: axes of the partial sums that are left, for one all-reduce.
    """

    vary: Axes
    gather_w: tuple[Step, ...]
    keep_w: tuple[Step, ...]
    gather_x: tuple[Step, ...]
    keep_x: tuple[Step, ...]
    scatter: tuple[Step, ...]
    total: Axes


def derive(x: Layout, w: Layout, y: Layout) -> Moves:
    """The moves that turn a local product into the whole one.

    0. an axis is gathered only while it is the minor one of its dim;
    1. w gathers the axes of its contraction that x does not share, and of its output that y does not want;
    2. x gathers the axes of its contraction that w does not share, and of its rows those that split w's output or
       that y does not want there;
    3. the local product: axes that both contractions share leave partial sums;
    4. partial sums are reduce-scattered onto the dims where y wants their axes; what is left is summed;
    5. an axis that y wants and that splits nothing needs no collective: each device keeps its own part.

    Args:
        x: Layout of x, rows first, contraction last.
        w: Layout of w, (contraction, output).
        y: Layout wanted of y, the rows of x first, output last.

    Raises:
        ValueError: if the rules do not lead from x and w to y; a result that would be silently wrong is never made.
    """
    last = len(x) - 1
    now_x, now_w = [list(dim) for dim in x], [list(dim) for dim in w]
    gather_w = [*_gather(now_w, 0, "w", lambda axis: axis not in x[last])]
    gather_w += _gather(now_w, 1, "w", lambda axis: axis not in y[last])
    gather_x = [*_gather(now_x, last, "x", lambda axis: axis not in now_w[0])]
    for dim in range(last):
        gather_x += _gather(now_x, dim, "x", lambda axis, dim=dim: axis in now_w[1] or axis not in y[dim])
    if now_x[last] != now_w[0]:
        raise ValueError(f"the contraction lies over {now_x[last]} in x but over {now_w[0]} in w: {_shown(x, w, y)}")

    partial_sums = list(now_x[last])
    now_y = [*now_x[:last], now_w[1]]
    keep, scatter = [], []
    for dim, wanted in enumerate(y):
        for axis in wanted[len(now_y[dim]) :]:
            held = partial_sums + [axis for axes in now_y for axis in axes]
            if axis in partial_sums:
                scatter.append((dim, axis))
                partial_sums.remove(axis)
            elif axis not in held and not any(dim == scattered for scattered, _ in scatter):
                keep.append((dim, axis))
            else:
                break
            now_y[dim].append(axis)
    if [tuple(axes) for axes in now_y] != [tuple(axes) for axes in y]:
        raise ValueError(f"y comes to lie over {now_y}: {_shown(x, w, y)}")
    return Moves(
        vary=axes_of(x, w, y),
        gather_w=tuple(gather_w),
        keep_w=tuple((1, axis) for dim, axis in keep if dim == last),
        gather_x=tuple(gather_x),
        keep_x=tuple(step for step in keep if step[0] != last),
        scatter=tuple(scatter),
        total=tuple(partial_sums),
    )


def _gather(now: list[list[str]], dim: int, name: str, drop) -> list[Step]:
    """Take the axes to be dropped off `now[dim]`, minor first (rule 0)."""
    steps = []
    for axis in [axis for axis in reversed(now[dim]) if drop(axis)]:
        if now[dim][-1] != axis:
            raise ValueError(
                f"{name} must gather {axis!r} on dim {dim}, which lies over {tuple(now[dim])}: only the minor "
                f"axis can be gathered, or parts would change places. Write {axis!r} last."
            )
        now[dim].pop()
        steps.append((dim, axis))
    return steps


def _shown(x: Layout, w: Layout, y: Layout) -> str:
    return f"x {x} times w {w} was to give y {y}. Mend the scheme's table."
