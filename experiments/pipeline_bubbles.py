"""How long do devices of a pipeline stand idle under each schedule, and is it what the papers say?

Every schedule on 4 and 8 devices with two and four times as many microbatches, played by the clock: a device starts
each cell as soon as it can, messages take no time, and F = B = W = 1 (a B that also finds the gradient of the weights
takes 2), of which a stage that is 1/V of a device takes 1/V. With p devices and m microbatches, expect to rounding:

    schedule                  span                bubble, as its source has it         source
    naive                     3 m p               share (p-1)/p                        Huang et al., figure 2b
    gpipe                     3 (m + p-1)         share (p-1)/(m+p-1)                  Huang et al., section 2.3
    one_f_one_b               3 (m + p-1)         ratio (p-1)/m                        Narayanan et al., section 2.2.1
    eager_one_f_one_b         3 (m + p-1)         ratio (p-1)/m                        Zhuang et al.
    interleaved, V chunks     3 (m + (p-1)/V)     ratio (p-1)/(V m)                    Narayanan et al., section 2.2.2
    zero_bubble_h1            3 m + p-1           gap (p-1)(F + B - W)                 Qi et al., section 2.3
    zero_bubble_h2            3 m + p-1           gap (p-1)(F + B - 2 W) = 0           Qi et al., section 2.3
    zero_bubble_v             3 m + (p-1)/2       gap 0                                Qi et al., section 6

Papers count idle time in three ways. A *share* is of all time, idle / span; a *ratio* is to work, idle / busy, and so
larger; a *gap* is what a device is idle between its own first and last cell: zero bubble means no gap. Devices still
start one after the other, so with a barrier at the end of a step, such as the global norm of clipping, even ZB-H2 has a
share of (p-1)/(3m+p-1); without one the next step fills it. Inputs of stages that are held, in parts of a device: m for
gpipe, p for 1F1B, ZB-H1 and ZB-V, 2p-1 for eager 1F1B and ZB-H2, p + (p-1)/V for interleaved: more memory or messages
buy less idle time.

Where all devices end each tick together, as in one program for all of them, 1F1B loses time (some do F while others do
B), and the others do not: the column "lock-step" is its bubble share. Nothing is trained and no device needed: seconds.
(Huang et al. 2019, arXiv:1811.06965; Narayanan et al. 2021, arXiv:2104.04473; Zhuang et al. 2022, arXiv:2211.05322; Qi
et al. 2023, arXiv:2401.10241.)

    python -m experiments.pipeline_bubbles
    python -m experiments.pipeline_bubbles --devices 16 --microbatches 32 --name long
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jaxpar import Refused, family
from jaxpar.cli import exit_codes, flags
from jaxpar.core.cells import Order
from jaxpar.core.makespan import Makespan, Times, makespan
from jaxpar.core.refuse import Problem
from jaxpar.core.timetable import timetable
from jaxpar.report.timetables import picture, text
from jaxpar.train.folder import of_study

SIZES = ((4, 8), (4, 16), (8, 16), (8, 32))
HEAD = (
    "schedule              p   m  V    span  expected  idle share  lock-step  as its source has  expected  held  sends"
)


class Stated(NamedTuple):
    """What is expected of a schedule.

    Attributes:
        span: of p devices, m microbatches and V chunks, where F = B = W = 1.
        kind: how its source counts idle time: `share`, `ratio` or `gap`.
        bubble: in that way.
        held: the most inputs of stages on any device, each counted as 1/V.
        source: where it is said.
    """

    span: Callable[[int, int, int], float]
    kind: str
    bubble: Callable[[int, int, int], float]
    held: Callable[[int, int, int], float]
    source: str


def _one(held: Callable, source: str) -> Stated:
    return Stated(lambda p, m, V: 3 * (m + p - 1), "ratio", lambda p, m, V: (p - 1) / m, held, source)


STATED = {
    ("naive", 1): Stated(
        lambda p, m, V: 3 * m * p, "share", lambda p, m, V: (p - 1) / p, lambda p, m, V: 1, "Huang et al., figure 2b"
    ),
    ("gpipe", 1): _one(lambda p, m, V: m, "Huang et al., section 2.3")._replace(
        kind="share", bubble=lambda p, m, V: (p - 1) / (m + p - 1)
    ),
    ("one_f_one_b", 1): _one(lambda p, m, V: p, "Narayanan et al., section 2.2.1"),
    ("eager_one_f_one_b", 1): _one(lambda p, m, V: 2 * p - 1, "Zhuang et al."),
    **{
        ("interleaved", chunks): Stated(
            lambda p, m, V: 3 * (m + (p - 1) / V),
            "ratio",
            lambda p, m, V: (p - 1) / (V * m),
            lambda p, m, V: p + (p - 1) / V,
            "Narayanan et al., section 2.2.2",
        )
        for chunks in (2, 3)
    },
    ("zero_bubble_h1", 1): Stated(
        lambda p, m, V: 3 * m + p - 1, "gap", lambda p, m, V: p - 1, lambda p, m, V: p, "Qi et al., section 2.3"
    ),
    ("zero_bubble_h2", 1): Stated(
        lambda p, m, V: 3 * m + p - 1, "gap", lambda p, m, V: 0, lambda p, m, V: 2 * p - 1, "Qi et al., section 2.3"
    ),
    ("zero_bubble_v", 2): Stated(
        lambda p, m, V: 3 * m + (p - 1) / 2, "gap", lambda p, m, V: 0, lambda p, m, V: p, "Qi et al., section 6"
    ),
}


@dataclass(frozen=True)
class Options:
    """What the flags say.

    Attributes:
        name: the folder in --runs-dir.
        runs_dir: where folders of runs lie.
        overwrite: write over the table that is there.
        devices: devices of the pipeline; 0 for 4 and 8.
        microbatches: parts of a batch; 0 for two and four times as many as devices.
    """

    name: str = "pipeline_bubbles"
    runs_dir: str = "runs"
    overwrite: bool = False
    devices: int = 0
    microbatches: int = 0


def measure(name: str, p: int, m: int, chunks: int) -> dict:
    """One row of the table: figures of a schedule, and what is expected of them."""
    stated, (_, found) = STATED[name, chunks], played(name, p, m, chunks)
    ways = {"share": found.bubble, "ratio": found.bubble / (1 - found.bubble), "gap": found.gap}
    row = {"schedule": name, "devices": p, "microbatches": m, "chunks": chunks, "span": found.span}
    row |= {"bubble": found.bubble, "lockstep_bubble": found.lockstep_bubble, "kind": stated.kind}
    row |= {"stated": ways[stated.kind], "held": max(found.peak) / chunks, "sends": max(found.sends)}
    row |= {"source": stated.source, "expected_span": stated.span(p, m, chunks)}
    return row | {"expected": stated.bubble(p, m, chunks), "expected_held": stated.held(p, m, chunks)}


def played(name: str, p: int, m: int, chunks: int) -> tuple[Order, Makespan]:
    """The order of a schedule, checked, and what it comes to."""
    table = timetable(family.pick("schedules", name)(p, m, chunks))
    return table.order, makespan(table.order, table.at, Times())


def agrees(row: dict) -> bool:
    """Whether span, idle time and memory are the expected ones."""
    pairs = [("span", "expected_span"), ("stated", "expected"), ("held", "expected_held")]
    return all(abs(row[got] - row[want]) < 1e-9 * max(1, abs(row[want])) for got, want in pairs)


def written(row: dict) -> str:
    """A row of the table as text."""
    return (
        f"{row['schedule']:<19}{row['devices']:>4}{row['microbatches']:>4}{row['chunks']:>3}{row['span']:>8.2f}"
        f"{row['expected_span']:>10.2f}{row['bubble']:>12.4f}{row['lockstep_bubble']:>11.4f}"
        f"{row['kind']:>11}{row['stated']:>8.4f}{row['expected']:>10.4f}{row['held']:>6.4g}{row['sends']:>7}"
        + ("" if agrees(row) else "   differs")
    )


def curves(path: Path, p: int) -> Path:
    """Idle share against microbatches: by the clock, and dashed where a tick lasts as long as its busiest device."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter

    from jaxpar.report.pictures import COLORS

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes, counts = figure.add_subplot(), [p, 2 * p, 4 * p, 8 * p]
    lines: dict[tuple[tuple[float, ...], bool], list[str]] = {}  # schedules that fare alike share a line
    for name, chunks in STATED:
        found = [played(name, p, m, chunks)[1] for m in counts]
        label = f"{name}{f' V={chunks}' if chunks > 1 else ''}"
        clock, locked = (tuple(round(share, 9) for share in shares) for shares in _shares(found))
        lines.setdefault((clock, False), []).append(label)
        if locked != clock:
            lines.setdefault((locked, True), []).append(f"{label}, in lock-step")
    for number, ((shares, late), names) in enumerate(sorted(lines.items(), reverse=True)):
        style = {"color": COLORS[number % len(COLORS)], "linestyle": "--" if late else "-"}
        axes.plot(counts, shares, marker="o", markersize=4, label="\n".join(names), **style)
    axes.set(xscale="log", xlabel="microbatches", ylabel="idle share of time", ylim=(0, 1))
    axes.set_title(f"{p} devices, by the clock; the same in lock-step unless dashed", loc="left", fontsize=10)
    axes.set_xticks(counts)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)
    return path


def _shares(found: list[Makespan]) -> tuple[list[float], list[float]]:
    return [one.bubble for one in found], [one.lockstep_bubble for one in found]


def drawn(folder: Path, name: str, p: int, m: int) -> Path:
    """The timetables of all schedules but the naive one in one picture."""
    orders = {}
    for schedule, chunks in STATED:
        if schedule != "naive" and chunks < 3:
            order, found = played(schedule, p, m, chunks)
            parts = f", {chunks} stages per device" if chunks > 1 else ""
            orders[f"{schedule}{parts}: span {found.span:g}, idle {found.bubble:.1%}"] = order
    return picture(folder / f"{name}.png", orders)


def main(options: Options) -> None:
    """Compare the idle time of every pipeline schedule with closed forms and with what papers state."""
    p, m = options.devices, options.microbatches
    if p < 0 or (m and not p):
        raise Refused([Problem("devices", p, "is no number of devices.", "4")])
    if m and m < 2 * p:
        rule = f"of {p} devices, zero bubble needs {2 * p - 1}, and the closed forms are of as many or more."
        raise Refused([Problem("microbatches", m, rule, f"{2 * p} or more")])
    folder = of_study(options.runs_dir, options.name, options.overwrite)

    naive, found = played("naive", 4, 2, 1)
    print(f"One microbatch at a time, 4 devices: {found.bubble:.0%} idle.\n\n{text(naive, width=100)}\n")
    pictures = [picture(folder / "naive.png", {f"one microbatch at a time: idle {found.bubble:.1%}": naive})]
    sizes = ((p, m),) if m else [(p, 2 * p), (p, 4 * p)] if p else SIZES
    print(HEAD)
    rows = [measure(name, p, m, chunks) for p, m in sizes for name, chunks in STATED]
    for row in rows:
        print(written(row))
    print(
        f"\n{sum(map(agrees, rows))} of {len(rows)} rows are as expected. Held: inputs of stages, in parts of a device."
    )
    (folder / "table.json").write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")
    pictures += [drawn(folder, f"timetables_{p}x{m}", p, m) for p, m in dict(reversed(sizes)).items() if m <= 32]
    pictures.append(curves(folder / "bubbles.png", sizes[-1][0]))
    print(f"pictures: {' '.join(map(str, pictures))}\ntable: {folder / 'table.json'}")


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}"))
