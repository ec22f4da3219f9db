"""Where do sums stop growing when they are kept in few bits?  Swamping, and what chunks and stochastic rounding do.

1. *Swamping.* The sum of numbers with mean 1 and standard deviation 1, evenly from 1 - sqrt 3 to 1 + sqrt 3, kept in
   (1,6,9). A number is lost in a sum whose neighbours are more than twice as far away as it is large, so the sum sticks
   at 2^(9 + 3), as the paper says: at 4096. Expect sums in chunks of 32 and more to follow the exact one, and those
   rounded stochastically to do so with an error of the size of its steps.
2. *The length of chunks.* Root mean square error of the whole sum, relative, over several series. Expect a U: a sum of
   N in chunks of L errs as N / L + L, so chunks that are too long fail as no chunks do; the paper takes 64. Expect the
   same U in bfloat16, which has two bits less, above it and narrower; in float16, with one bit more, below it.
(Wang et al. 2018, arXiv:1812.08011, section 2.3 and figure 3, whose kind of numbers these are.)

Half a minute on 2 idle cores; nothing is trained.

    python -m experiments.accumulation
    python -m experiments.accumulation --count 65536 --series 4 --name long
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jaxpar import Refused
from jaxpar.cli import exit_codes, flags
from jaxpar.core.refuse import Problem
from jaxpar.report.columns import aligned
from jaxpar.train.folder import of_study

FORMATS = ("fp169", "bf16", "fp16")
SHOWN = "fp169"  # of the first panel: that of the paper
FOLLOWED = (32, 64)  # lengths of chunks there
POINTS = 128  # of each curve
FACTOR = 2  # between lengths of chunks
CLAIMED = {"fp169": "4096"}  # where a sum in one go sticks, by the paper
MOST = 2**20
NEAR, AT_TOP = {"textcoords": "offset points"}, ("data", "axes fraction")


@dataclass(frozen=True)
class Options:
    """What is summed.

    Attributes:
        name: the folder in --runs-dir.
        runs_dir: where folders of runs lie.
        overwrite: write over the table that is there.
        count: how many numbers a series has.
        series: how many are summed, of which the first is drawn.
        seed: of the numbers and of stochastic rounding.
    """

    name: str = "accumulation"
    runs_dir: str = "runs"
    overwrite: bool = False
    count: int = 8192
    series: int = 16
    seed: int = 0


def drawn(options: Options):
    """The numbers, float32 `[series, count]`."""
    import numpy as np

    half = math.sqrt(3)
    return np.random.default_rng(options.seed).uniform(1 - half, 1 + half, (options.series, options.count)).astype("f4")


def stochastic_sums(x, fmt, seed: int):
    """Running sums of each row of `x`, one number after the other, rounded stochastically: `[rows, count]`."""
    import jax

    from jaxpar.core import formats

    def add(total, pair):
        total = formats.stochastic(total + pair[0], fmt, pair[1])
        return total, total

    bits = jax.random.bits(jax.random.key(seed), x.T.shape, "uint32")
    return jax.lax.scan(add, 0 * x[:, 0], (x.T, bits))[1].T


def curves(options: Options) -> dict[str, list[tuple[int, float]]]:
    """Sums of the first so many numbers of the first series, by the way they are made."""
    import jax
    import numpy as np

    from jaxpar.core import chunked, formats

    fmt = formats.named(SHOWN)
    x = np.asarray(formats.nearest(drawn(options)[:1], fmt))
    counts = sorted({max(1, options.count * point // POINTS) for point in range(1, POINTS + 1)})
    firsts = np.where(np.arange(options.count) < np.array(counts)[:, None], x, 0)  # zeros change no sum
    total = jax.jit(chunked.total, static_argnums=(1, 2))
    at = np.array(counts) - 1
    found = {
        "exact": x[0].astype(np.float64).cumsum()[at],
        "in one go": total(firsts, options.count, fmt),
        "stochastic": jax.jit(stochastic_sums, static_argnums=(1, 2))(x, fmt, options.seed)[0][at],
    }
    found |= {f"chunks of {chunk}": total(firsts, chunk, fmt) for chunk in FOLLOWED}
    return {way: [(count, float(sum)) for count, sum in zip(counts, sums, strict=True)] for way, sums in found.items()}


def errors(name: str, options: Options) -> dict:
    """Root mean square relative errors of sums in one format: by the length of chunks, and rounded stochastically."""
    import jax
    import numpy as np

    from jaxpar.core import chunked, formats

    fmt = formats.named(name)
    x = np.asarray(formats.nearest(drawn(options), fmt))
    exact = x.astype(np.float64).sum(1)
    total = jax.jit(chunked.total, static_argnums=(1, 2))

    def error(sums) -> float:
        return float(np.sqrt(np.mean((np.asarray(sums, np.float64) / exact - 1) ** 2)))

    powers = (FACTOR**power for power in range(options.count.bit_length()))
    lengths = [*(length for length in powers if length < options.count), options.count]
    by_length = [(length, error(total(x, length, fmt))) for length in lengths]
    largest = np.asarray(total(x, options.count, fmt))
    drawn_up = jax.jit(stochastic_sums, static_argnums=(1, 2))(x, fmt, options.seed)[:, -1]
    return {
        "format": name,
        "sticks": 2 ** (fmt.mantissa + 3),  # above, half of the distance of neighbours is more than any of them
        "in one go": float(largest.max()),
        "exact": float(exact.max()),
        "errors": by_length,
        "stochastic": error(drawn_up),
    }


def table(rows: list[dict]) -> str:
    """Errors as text."""
    best = {row["format"]: min(row["errors"], key=lambda pair: pair[1]) for row in rows}
    head = [
        "format",
        "sticks at",
        "paper",
        "largest sum",
        "exact",
        "error, one go",
        "chunks of 64",
        "best",
        "of length",
    ]
    head.append("stochastic")
    lines = []
    for row in rows:
        own = dict(row["errors"])
        length, least = best[row["format"]]
        sums = [f"{row['sticks']}", CLAIMED.get(row["format"], ""), f"{row['in one go']:.0f}", f"{row['exact']:.0f}"]
        shares = [row["errors"][-1][1], own.get(64, math.nan), least]
        lines.append(
            [row["format"], *sums, *(f"{share:.2%}" for share in shares), str(length), f"{row['stochastic']:.2%}"]
        )
    return aligned(head, lines, head[1:])


def picture(path: Path, lines: dict[str, list[tuple[int, float]]], rows: list[dict]) -> Path:
    """Sums as they grow, and errors by the length of chunks."""
    from matplotlib.figure import Figure

    from jaxpar.report.pictures import COLORS, MUTED

    figure = Figure(figsize=(11, 4.3), dpi=150, layout="constrained")
    sums, curve = figure.subplots(1, 2)
    styles = {"exact": {"color": "black", "lw": 4, "alpha": 0.25}, "in one go": {"lw": 2.5}}
    for number, (way, line) in enumerate(lines.items()):
        sums.plot(*zip(*line, strict=True), **{"color": COLORS[number], "lw": 1.3, "label": way} | styles.get(way, {}))
    level = next(row["sticks"] for row in rows if row["format"] == SHOWN)
    if lines["exact"][-1][1] > level:
        sums.axhline(level, color=MUTED, ls=":", lw=1)
        sums.annotate(f"paper: sticks at {level}", (0, level), xytext=(4, 4), textcoords="offset points", color=MUTED)
    sums.set(xlabel="numbers added, mean 1, standard deviation 1", ylabel="sum")
    sums.set_title("1. A sum kept in (1,6,9)", loc="left", fontsize=10)
    for number, row in enumerate(rows):
        lengths, shares = zip(*row["errors"], strict=True)
        curve.plot(lengths, shares, "o-", ms=3, color=COLORS[number], label=row["format"])
        curve.axhline(row["stochastic"], color=COLORS[number], ls="--", lw=0.8)
    curve.axvline(64, color=MUTED, ls=":", lw=1)
    curve.annotate("paper: 64", (64, 1), xytext=(4, -2), xycoords=AT_TOP, va="top", color=MUTED, **NEAR)
    curve.set(xscale="log", yscale="log", xlabel="length of chunks", ylabel="relative error of the sum, RMS")
    curve.set_title("2. By length of chunks; dashed: stochastic, in one go", loc="left", fontsize=10)
    for axes in (sums, curve):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
    return path


def main(options: Options) -> None:
    """Sum numbers in few bits: in one go, in chunks, and rounded stochastically."""
    from jaxpar.plan.mesh import devices

    for field, value, least, most in (("count", options.count, 2, MOST), ("series", options.series, 1, 1024)):
        if not least <= value <= most:
            legal = str(getattr(Options, field))
            raise Refused([Problem(field, value, f"must be from {least} to {most}.", legal)])
    folder = of_study(options.runs_dir, options.name, options.overwrite)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    devices(1)
    lines, rows = curves(options), []
    work, began = [partial(errors, name, options) for name in FORMATS], time.perf_counter()
    for done, one in enumerate(work, 1):
        rows.append(one())
        left = (time.perf_counter() - began) / done * (len(work) - done)
        print(f"  {done} of {len(work)}, about {left:.0f} s left", file=sys.stderr, flush=True)
    ends = ", ".join(f"{way} {line[-1][1]:.0f}" for way, line in lines.items())
    print(f"The first series in {SHOWN}: {ends}\n\n{table(rows)}")
    found = {"curves": lines, "errors": rows}
    (folder / "table.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"\npicture: {picture(folder / 'accumulation.png', lines, rows)}\ntable: {folder / 'table.json'}")


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}", Options()))
