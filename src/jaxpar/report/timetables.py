"""Pictures of timetables: as text, and as PNG with what is held in memory meanwhile."""

import colorsys
import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from jaxpar.core.cells import Cell, Order
from jaxpar.core.makespan import Times, durations, live, spans

LIGHTNESS = {"F": 0.80, "B": 0.60, "W": 0.40}  # of a colour, by kind of work
SAID = {"F": "forward", "B": "backward", "W": "gradient of weights"}


def text(order: Order, times: Times | None = None, width: int = 120) -> str:
    """A timetable as text: a row per device, a column per unit of time; `=` goes on, `.` is idle.

    `F3` is forward of microbatch 3; with several stages per device `Fb3`, by its second. A table that is too wide
    goes on below, after a line that says at which column.

    Args:
        order: whose devices start each cell as soon as they can.
        times: of one microbatch; one unit of time is that of the shortest cell.
        width: characters of a line.
    """
    times = times or Times()
    began, ended = spans(order, times)
    unit = min(filter(None, durations(order, times).values()), default=1.0)
    wide = max(len(_name(order, cell)) for cell in began) + 1
    columns = _column(max(ended.values()), unit)
    rows = [["."] * columns for _ in range(order.devices)]
    for cell, start in began.items():
        first, end = _column(start, unit), _column(ended[cell], unit)
        rows[order.place[cell.stage]][first:end] = [_name(order, cell), *["="] * (end - first - 1)]
    heads = [f"d{device:<{len(str(order.devices - 1))}} |" for device in range(order.devices)]
    each = max(1, (width - len(heads[0])) // wide)
    lines = []
    for first in range(0, columns, each):
        lines += [f"from {first}"] if columns > each else []
        for head, row in zip(heads, rows, strict=True):
            cells = (
                word.ljust(wide) if len(word) > 1 else f" {word}".ljust(wide) for word in row[first : first + each]
            )
            lines.append((head + "".join(cells)).rstrip())
    return "\n".join(lines)


def _column(time: float, unit: float) -> int:
    return math.floor(time / unit + 0.5)


def _name(order: Order, cell: Cell) -> str:
    """`F3`, or `Fb3` where devices have several stages: kind, which of the device's stages, microbatch."""
    device = order.place[cell.stage]
    chunk = order.place[: cell.stage].count(device)
    return f"{cell.kind}{chr(ord('a') + chunk) if order.stages > order.devices else ''}{cell.microbatch}"


def picture(path: Path, orders: Mapping[str, Order], times: Times | None = None) -> Path:
    """Draw timetables one below the other against the same time, each over what its devices hold, as PNG.

    A microbatch has one colour, F B and W have shades of it, idle time is white. Below it, how many
    inputs of stages each device holds, counted as 1/V where devices have V stages.

    Args:
        path: file to write.
        orders: by the title of each.
        times: of one microbatch.
    """
    times = times or Times()
    played = {title: spans(order, times) for title, order in orders.items()}
    longest = max(max(ended.values()) for _, ended in played.values())
    cells = max(longest / min(filter(None, durations(order, times).values())) for order in orders.values())
    across = min(24.0, max(8.0, 1.2 + 0.22 * cells))
    heights = [height for order in orders.values() for height in (0.3 * order.devices, 0.9)]
    figure = Figure(figsize=(across, sum(heights) + 0.75 * len(orders) + 0.3), dpi=150, layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for number, (title, order) in enumerate(orders.items()):
        began, ended = played[title]
        _work(panels[2 * number], order, began, ended, points=72 * (across - 1) / longest)
        _memory(panels[2 * number + 1], order, began, ended)
        panels[2 * number].set_title(title, loc="left", fontsize=10)
    panels[0].set_xlim(0, longest)
    panels[-1].set_xlabel("time")
    kinds = [kind for kind in SAID if any(kind in order.kinds for order in orders.values())]
    shades = [Patch(color=[LIGHTNESS[kind]] * 3, label=SAID[kind]) for kind in kinds]
    panels[0].legend(handles=shades, ncols=3, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), fontsize=8)
    figure.savefig(path)
    return path


def _color(place: float, kind: str) -> tuple[float, float, float]:
    """The colour of a microbatch that is so far along, 0 to 1, in the shade of a kind of work."""
    return colorsys.hls_to_rgb(0.85 * place, LIGHTNESS[kind], 0.62)


def _work(axes: Axes, order: Order, began, ended, points: float) -> None:
    """A bar per device; `points` is how wide a unit of time is, in points, so that numbers fit into their cells."""
    boxes, colors, count = [], [], max(1, order.microbatches - 1)
    longest = max(len(_name(order, cell)) for cell in began) - 1
    for cell, start in began.items():
        device, lasting = order.place[cell.stage], ended[cell] - start
        name = _name(order, cell)[1:]
        boxes.append(Rectangle((start, device - 0.46), lasting, 0.92))
        colors.append(_color(cell.microbatch / count, cell.kind))
        size = min(8.0, 0.95 * lasting * points / (0.65 * longest))
        if size > 2.5:
            ink = "white" if cell.kind == "W" else "black"
            axes.text(start + lasting / 2, device, name, ha="center", va="center", fontsize=size, color=ink)
    axes.add_collection(PatchCollection(boxes, facecolors=colors, edgecolors="white", linewidths=0.6))
    axes.set(ylim=(order.devices - 0.5, -0.5), ylabel="device")
    axes.set_yticks(range(order.devices))
    axes.tick_params(length=0, labelbottom=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _memory(axes: Axes, order: Order, began, ended) -> None:
    """Steps of what each device holds, the first device darkest; lines that coincide are drawn a little apart."""
    end, curves = max(ended.values()), live(order, began, ended)
    apart = max(count for curve in curves for _, count in curve) / 100
    for device, curve in enumerate(curves):
        place = device / max(1, order.devices - 1)
        color = colorsys.hls_to_rgb(0.58, 0.25 + 0.5 * place, 0.7)
        times, counts = zip(*curve, (end, curve[-1][1]), strict=True)
        shown = [(count + apart * device) * order.devices / order.stages for count in counts]
        label = f"{device}" if device in (0, order.devices - 1) else None
        axes.step(times, shown, where="post", color=color, linewidth=1.1, label=label)
    axes.set(ylabel="inputs held", ylim=(0, None))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="device", frameon=False, fontsize=7, title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1.1))
