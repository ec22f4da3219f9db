"""Which plan scales: what must each device send, hold and do, for models from 124M to 70B on 8 to 4096 devices?

Everything is predicted from shapes, on a laptop; a few rows are compiled as well, for simulated devices, and must come
to the same bytes and flops. Shapes are GPT-2's of 124M, and Llama-like ones of 1B, 7B and 70B: their widths, heads and
vocabulary, with two matrices of 3/2 the hidden width for the three of a gated MLP, so the same parameters and flops;
products in bfloat16, as the peak is. A
step has 0.5M tokens (GPT-2) or 4M, however many devices share them; times are the highest of the three ceilings on a
TPU v5p, `report/ceilings.py`: no step is faster, real ones are slower. What is held is so besides activations: where
that is more than a device has, a plan cannot fit.

What the papers of 2-D, 2.5-D and 3-D tensor parallelism claim is that their bytes fall with the number of devices p,
while those of 1-D do not: for a batch that does not grow, 1-D O(1), 2-D O(p^-1/2), 2.5-D of fixed depth likewise and
less, 3-D O(p^-2/3). The other tables have one model on p devices of one tensor-parallel group, on square (2.5-D: two
deep) and cubic meshes, and the slope of bytes against p. Expect those slopes; and that square 2-D loses where tokens
are few, since it sends weights as well: forward in a block 7 T h (c-1) + 12 h^2 (r-1) over r c elements, for T tokens
of width h, against 4 T h (p-1)/p. On 2x2 that is 1.75 T h + 3 h^2 against 3 T h, more if T < 2.4 h; so the first table
has T = 64 h, and the second T = h.
(Xu et al. 2021, arXiv:2104.05343; Wang et al. 2021, arXiv:2105.14500; Bian et al. 2021, arXiv:2105.14450; Shoeybi et
al. 2019, arXiv:1909.08053.)

Two minutes for all predicted rows, and half a minute for each that is compiled.

    python -m experiments.scaling
    python -m experiments.scaling --shapes llama_7b --devices 64,512 --name seven
"""

import itertools
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from jaxpar import Model, Plan, Recipe, Refused
from jaxpar.cli import exit_codes, flags
from jaxpar.core.refuse import Problem
from jaxpar.report.columns import aligned
from jaxpar.train.folder import of_study

SHAPES = {  # the model, and sequences per step
    "gpt2_124m": (Model("gpt", layers=12, width=768, heads=12, hidden=3072, context=1024, vocab=50257), 512),
    "llama_1b": (
        Model("gpt", layers=16, width=2048, heads=32, kv_heads=8, hidden=12288, context=4096, vocab=128256),
        1024,
    ),
    "llama_7b": (Model("gpt", layers=32, width=4096, heads=32, hidden=16512, context=4096, vocab=32000), 1024),
    "llama_70b": (
        Model("gpt", layers=80, width=8192, heads=64, kv_heads=8, hidden=43008, context=4096, vocab=32000),
        1024,
    ),
}
TORI = {8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16"}
TORI |= {2048: "8x16x16", 4096: "16x16x16"}
SLOPES = {"one_d": 0.0, "sequence": 0.0, "two_d": -1 / 2, "two_half_d": -1 / 2, "three_d": -2 / 3}  # claimed
GROUPS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)  # devices of one tensor-parallel group
CLAIMED = Model("gpt", layers=2, width=4096, heads=4096, hidden=16384, context=64, vocab=4096)
BATCHES = {"T = 64 h": 4096, "T = h": 64}  # sequences
COLUMNS = {
    "plan": ("plan", "{}"),
    "sent": ("GB sent", "{:.3f}"),
    "held": ("GB held", "{:.2f}"),
    "executed": ("Tflop", "{:.2f}"),
    "bubble": ("idle", "{:.0%}"),
    "seconds": ("s, at least", "{:.3f}"),
    "bound": ("bound by", "{}"),
    "share": ("of peak", "{:.0%}"),
    "fits": ("may fit", "{}"),
}


@dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
        name: the folder in --runs-dir.
        runs_dir: where folders of runs lie.
        overwrite: write over the table that is there.
        shapes: names of models, with commas between them; all if empty.
        devices: counts, with commas between them.
        compiled: how many rows are compiled as well, those of the first shape on the fewest devices.
    """

    name: str = "scaling"
    runs_dir: str = "runs"
    overwrite: bool = False
    shapes: str = ""
    devices: str = "8,64,512,4096"
    compiled: int = 2


def families(count: int) -> dict[str, list[str]]:
    """For each kind of plan on so many devices, the plans to try, the likeliest first; the first legal one is taken."""
    pairs = sorted(_meshes(count, 2), key=lambda sizes: (sum(sizes), sizes))
    triples = sorted(_meshes(count, 3), key=lambda sizes: (sum(sizes), sizes[::-1]))
    lines = [size for size, _ in sorted(_meshes(count, 2), reverse=True)]  # of the tensor axis, the longest first
    deep = [sizes for sizes in triples if sizes[1] == sizes[2] and sizes[0] > 1] + triples
    rest = [(size, count // size) for size in (8, 4, 2) if count % size == 0]
    found = {
        "data": [f"data={count}"],
        "fsdp": [f"tensor=fsdp:{count}"],
        "1-D": [_beside(count // size, f"one_d:{size}") for size in lines],
        "1-D + sequence": [_beside(count // size, f"sequence:{size}") for size in lines],
        "2-D": [f"tensor=two_d:{r}x{c}" for r, c in pairs] + _within(count, "two_d", 2),
        "2.5-D": [f"tensor=two_half_d:{d}x{r}x{c}" for d, r, c in deep] + _within(count, "two_half_d", 3),
        "3-D": [f"tensor=three_d:{i}x{j}x{k}" for i, j, k in triples] + _within(count, "three_d", 3),
        "data x 1-D": [_beside(data, f"one_d:{size}") for size, data in rest if data > 1],
        "data x 3-D": [_beside(count // 8, "three_d:2x2x2")] if count > 8 else [],
    }
    for pipe in (8, 4, 2):
        if count % (2 * pipe) == 0:
            tensor = min(8, count // pipe)
            rows = count // pipe // tensor
            plan = f"{_beside(rows, f'one_d:{tensor}')},pipe={pipe},microbatches={4 * pipe}"
            found.setdefault("pipe x data x 1-D", []).append(plan)
    return found


def _beside(data: int, tensor: str) -> str:
    return f"data={data},tensor={tensor}" if data > 1 else f"tensor={tensor}"


def _meshes(count: int, dims: int) -> list[tuple[int, ...]]:
    sizes = [size for size in range(1, count + 1) if count % size == 0]
    return [one for one in itertools.product(sizes, repeat=dims) if math.prod(one) == count]


def _within(count: int, name: str, dims: int) -> list[str]:
    """The same scheme on an even part of the devices, the rest for data."""
    found = []
    for part in (64, 16, 8, 4):
        if count % part == 0 and part < count:
            even = min(_meshes(part, dims), key=lambda sizes: (sum(sizes), sizes))
            found.append(_beside(count // part, f"{name}:{'x'.join(map(str, even))}"))
    return found


def parts_of(model: Model, batch: int, plan: str, precision: str = "bf16"):
    """The parts of a plan for tokens of a shape.

    Raises:
        Refused: if the plan cannot be.
    """
    import jax

    from jaxpar.step.parts import assemble

    tokens = jax.ShapeDtypeStruct((batch, model.context), "int32")
    return assemble(
        Recipe(model=model, plan=Plan.parse(f"{plan},precision={precision}"), batch=batch), tokens, tokens, model.vocab
    )


def measure(kind: str, model: Model, batch: int, plans: list[str], count: int) -> dict:
    """One row: what the first legal plan comes to on so many TPUs v5p, or why there is none."""
    from jaxpar.report import ceilings, forecast, topology
    from jaxpar.step.program import traced

    refused = None
    for plan in plans:
        try:
            parts = parts_of(model, batch, plan)
        except Refused as error:
            refused = refused or error.problems[0]
            continue
        where, trace = topology.parse(f"v5p:{TORI[count]}"), traced(parts)
        found = forecast.forecast(Plan.parse(plan), parts, where, trace)
        roof = ceilings.roof(found, parts, where, trace)
        held = sum(found["memory"]["predicted"][name] for name in forecast.CERTAIN)
        row = {"kind": kind, "plan": plan, "sent": roof.sent, "held": held}
        row |= {"executed": roof.flops, "model": found["flops"]["model"], "bubble": found["bubble"]}
        row |= {"seconds": roof.seconds, "bound": roof.bound}
        row |= {"fits": found["fits"] is not False}
        return row | {"comm": found["comm"]["predicted"], "roof": ceilings.as_json(roof)}
    return {"kind": kind, "plan": None, "refused": f"{refused.field}: {refused.rule}" if refused else "no such mesh"}


def compiled(model: Model, batch: int, row: dict) -> dict:
    """What the step of a row sends and executes, predicted and compiled for simulated devices.

    In float32: XLA for CPU sends bfloat16 as that.
    """
    from jaxpar.report import account, flops
    from jaxpar.report import compiled as reader
    from jaxpar.step.program import program

    parts = parts_of(model, batch, row["plan"], "fp32")
    made, began = program(parts), time.perf_counter()
    step = made.step.lower(made.shapes, made.batch).compile()
    found = reader.read(parts, made, step, time.perf_counter() - began)
    predicted = {"sent": account.predicted(parts).total_sent, "executed": flops.executed(parts)}
    return {"predicted": predicted, "compiled": {"sent": sum(found.sent.values()), "executed": found.flops}}


def claims(count: int, batch: int) -> dict[str, dict]:
    """For each scheme, what a device sends on so many devices, on its square or cubic mesh; 2.5-D has a depth of 2."""
    from jaxpar.report import account

    meshes = {
        "one_d": [(count,)],
        "sequence": [(count,)],
        "two_d": [sizes for sizes in _meshes(count, 2) if sizes[0] == sizes[1]],
        "two_half_d": [(2, *sizes) for sizes in _meshes(count // 2, 2) if sizes[0] == sizes[1] > 1 and count % 2 == 0],
        "three_d": [sizes for sizes in _meshes(count, 3) if len(set(sizes)) == 1],
    }
    found = {}
    for name, choices in meshes.items():
        for sizes in choices:
            plan = f"tensor={name}:{'x'.join(map(str, sizes))}"
            try:
                sent = account.predicted(parts_of(CLAIMED, batch, plan)).total_sent
            except Refused:  # more devices than rows
                continue
            found[name] = {"plan": plan, "sent": sent}
    return found


def slope(rows: dict[int, dict], name: str) -> float | None:
    """The exponent of p in what a scheme sends, between its first count of 16 or more devices and its last."""
    known = [(count, found[name]["sent"]) for count, found in rows.items() if name in found and count >= 16]
    if len(known) < 2:
        return None
    (p, first), (q, last) = known[0], known[-1]
    return math.log(last / first) / math.log(q / p)


def picture(path: Path, tables: dict[str, dict[int, dict]]) -> Path:
    """What a device sends against the number of devices, a line per scheme and a panel per batch."""
    from matplotlib.figure import Figure

    from jaxpar.report.pictures import COLORS

    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(tables), sharey=True), tables.items(), strict=True):
        for number, name in enumerate(SLOPES):
            known = [(count, found[name]["sent"] / 1e9) for count, found in rows.items() if name in found]
            if known:
                exponent = slope(rows, name)
                label = name if exponent is None else f"{name}, p^{exponent:.2f} (claimed p^{SLOPES[name]:.2f})"
                axes.plot(*zip(*known, strict=True), "o-", ms=4, color=COLORS[number], label=label)
        axes.set(xscale="log", yscale="log", xlabel="devices of one group")
        axes.set_xscale("log", base=2)
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    figure.axes[0].set_ylabel("GB that a device sends in a step")
    figure.savefig(path)
    return path


def bars(path: Path, rows: list[dict]) -> Path:
    """The least time of a step by plan, a panel per model and count of devices, in the colour of what bounds it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colors = {"arithmetic": "#2e7d32", "memory": "#e0a030", "communication": "#c0392b"}
    shapes, counts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "devices"))
    figure = Figure(figsize=(3.4 * len(counts) + 1, 2.2 * len(shapes) + 0.6), dpi=150, layout="constrained")
    panels = figure.subplots(len(shapes), len(counts), squeeze=False)
    for line, shape in zip(panels, shapes, strict=True):
        for axes, count in zip(line, counts, strict=True):
            here = [row for row in rows if (row["shape"], row["devices"]) == (shape, count) and row["plan"]]
            for place, row in enumerate(here):
                hatch = None if row["fits"] else "///"
                axes.barh(
                    place, row["seconds"], color=colors[row["bound"]], hatch=hatch, edgecolor="white", linewidth=0
                )
            axes.set_yticks(range(len(here)), [row["kind"] for row in here], fontsize=6)
            if not here:
                axes.text(0.5, 0.5, "too few examples for any", ha="center", fontsize=7)
            axes.invert_yaxis()
            axes.set_title(f"{shape}, {count} v5p", fontsize=8, loc="left")
            axes.tick_params(axis="x", labelsize=6)
            axes.spines[["top", "right"]].set_visible(False)
    legend = [Patch(color=color, label=name) for name, color in colors.items()]
    legend.append(Patch(facecolor="white", edgecolor="grey", hatch="///", label="hatched: does not fit"))
    figure.legend(handles=legend, loc="outside upper right", ncols=4, frameon=False, fontsize=8)
    figure.supxlabel("seconds per step, at least", fontsize=9)
    figure.savefig(path)
    return path


def written(rows: list[dict]) -> str:
    """Rows of one model on one count of devices as a table."""
    lines = []
    for row in rows:
        if not row["plan"]:
            lines.append((row["kind"], row["refused"][:60], *[""] * (len(COLUMNS) - 1)))
            continue
        shown = row | {
            "share": row["executed"] / row["roof"]["peak"] / row["seconds"],
            "fits": "yes" if row["fits"] else "no",
        }
        shown |= {"sent": row["sent"] / 1e9, "held": row["held"] / 1e9, "executed": row["executed"] / 1e12}
        lines.append((row["kind"], *(form.format(shown[key]) for key, (_, form) in COLUMNS.items())))
    head = ("", *(head for head, _ in COLUMNS.values()))
    return aligned(head, lines, [name for name in head if name not in ("", "plan", "bound by", "may fit")])


def chosen(options: Options) -> tuple[list[str], list[int]]:
    """The models and counts of devices that the flags name.

    Raises:
        Refused: for a name or a count that is not known.
    """
    shapes = [name.strip() for name in options.shapes.split(",")] if options.shapes else list(SHAPES)
    counts = [word.strip() for word in options.devices.split(",")]
    problems = [
        Problem("shapes", name, "there is no such shape.", ", ".join(SHAPES)) for name in shapes if name not in SHAPES
    ]
    problems += [
        Problem("devices", word, "is no size of a v5p slice here.", ", ".join(map(str, TORI)))
        for word in counts
        if not word.isdecimal() or int(word) not in TORI
    ]
    if options.compiled < 0:
        problems.append(Problem("compiled", options.compiled, "is no count.", "0 or more"))
    if problems:
        raise Refused(problems)
    return shapes, [int(word) for word in counts]


def main(options: Options) -> None:
    """Predict what every kind of plan costs for models of 124M to 70B parameters on 8 to 4096 devices."""
    from jaxpar.plan.mesh import simulate

    shapes, counts = chosen(options)
    folder = of_study(options.runs_dir, options.name, options.overwrite)
    simulate(min(counts))
    rows, began = [], time.perf_counter()
    for done, (shape, count) in enumerate(itertools.product(shapes, counts), 1):
        model, batch = SHAPES[shape]
        here = [measure(kind, model, batch, plans, count) for kind, plans in families(count).items() if plans]
        rows += [{"shape": shape, "devices": count} | row for row in here]
        print(f"\n{shape}, {batch} x {model.context} tokens, {count} TPUs v5p\n{written(here)}", flush=True)
        left = (time.perf_counter() - began) / done * (len(shapes) * len(counts) - done)
        print(f"  about {left:.0f} s left for tables", file=sys.stderr, flush=True)

    tables = {title: {count: claims(count, batch) for count in GROUPS} for title, batch in BATCHES.items()}
    for title, table in tables.items():
        print(f"\nGB sent by a device of one group, {title}, h = {CLAIMED.width}; against 1-D\n{claimed(table)}")
    of = {name: slope(tables["T = 64 h"], name) for name in SLOPES}
    print("\nslopes from 16 devices on, T = 64 h, and as claimed:")
    for name, found in of.items():
        print(f"  {name:<11} {'-' if found is None else f'{found:6.2f}'}  {SLOPES[name]:6.2f}")

    for row in [row for row in rows if row["plan"] and row["devices"] == min(counts)][: options.compiled]:
        model, batch = SHAPES[row["shape"]]
        row["compiled"] = compiled(model, batch, row)
        pairs = [(key, row["compiled"]["compiled"][key], size) for key, size in row["compiled"]["predicted"].items()]
        ratios = ", ".join(f"{key} {after / before:.4f}" for key, after, before in pairs if before)
        print(f"\n{row['shape']}, {row['plan']}, fp32: compiled / predicted: {ratios}", flush=True)
    about = {"rows": rows, "claims": {title: list(table.items()) for title, table in tables.items()}, "slopes": of}
    (folder / "table.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    pictures = [bars(folder / "plans.png", rows), picture(folder / "claims.png", tables)]
    print(f"pictures: {' '.join(map(str, pictures))}\ntable: {folder / 'table.json'}")


def claimed(table: dict[int, dict]) -> str:
    """What each scheme sends, and as a share of what 1-D does."""
    lines = []
    for count, found in table.items():
        cells = [
            f"{found[n]['sent'] / 1e9:.3f} ({found[n]['sent'] / found['one_d']['sent']:.2f})" if n in found else ""
            for n in SLOPES
        ]
        lines.append((f"{count}", *cells))
    return aligned(("devices", *SLOPES), lines, ("devices", *SLOPES))


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}"))
