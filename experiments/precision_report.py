"""Table and picture of `experiments/precision.py`, which runs this and says more."""

import statistics
from pathlib import Path

from experiments import precision_gradients
from jaxpar.report.columns import aligned
from jaxpar.report.pictures import COLORS

CLAIMED = {
    "bf16": "as fp32 (Kalamkar)",
    "fp16": "as fp32 (Micikevicius)",
    "fp16, no scale": "SSD diverges, most others as fp32",
    "fp16, scale 2^-10": "",
    "fp8_current": "as 16 bits (FP8 Formats)",
    "fp8_delayed": "as 16 bits (FP8 Formats)",
    "fp8_block": "0.25 % from bf16 (DeepSeek-V3)",
    "fp8_chunked": "as fp32 (Wang)",
    "fp8_mixed": "as fp32 (Mellempudi)",
}


def smoothed(row: dict, rows: list[dict], apart: bool) -> list[tuple[int, float]]:
    """(step, loss) of a run, as means of some steps; or how far that is from float32 on the same batches."""
    (first,) = [one for one in rows if one["task"] == row["task"] and one["case"] == "fp32"]
    losses = [a - b for a, b in zip(row["losses"], first["losses"], strict=False)] if apart else row["losses"]
    window = max(1, len(first["losses"]) // 40)
    return [(end, statistics.fmean(losses[end - window : end])) for end in range(window, len(losses) + 1, window)]


def table(rows: list[dict]) -> str:
    """One line for each run: losses, gradients lost, time."""
    head = ["", "run", "steps", "held out", "last batches - fp32", "skipped", "scale"]
    head += ["lost: activations", "weights", "step ms", "x fp32"]
    lines = []
    for row in rows:
        last = [loss for _, loss in smoothed(row, rows, apart=True)][-4:]
        lines.append([row["task"], row["case"] + "*" * row["emulated"], str(row["steps"]), f"{row['held_out']:.4f}"])
        lines[-1] += [f"{statistics.fmean(last):+.4f}", str(row["skipped"]), f"{row['scale']:g}"]
        lines[-1] += [f"{row['flushed'][kind]:.2%}" for kind in ("activation", "weight")]
        lines[-1] += [f"{row['step_ms']:.1f}", f"{row['times']:.2f}", CLAIMED.get(row["case"], "")]
    return aligned([*head, "papers"], lines, head[2:])


def told(found: dict) -> str:
    """Where gradients lie, in words."""
    lines = ["*: emulated. lost: gradients that are not 0 in float32, and become 0. x fp32: times, on this machine"]
    for task, kinds in found.items():
        for kind, one in kinds.items():
            below = ((least, precision_gradients.below(one, least)) for least in (-24, -16, -9))
            shares = ", ".join(f"{share:.1%} below 2^{least}" for least, share in below)
            zeros = f"{task}, gradients of {kind}s: {one['zero']:.1%} are 0"
            lines.append(f"{zeros}; of the others {shares}; largest 2^{one['largest']}")
    lines.append("SSD (1710.03740, figure 3): 67 % of activation gradients are 0, and float16 has 2^15 to 2^-24")
    lines.append("speech (figure 2b): 5 % of weight gradients lie below 2^-24")
    return "\n".join(lines)


def picture(path: Path, rows: list[dict], found: dict) -> Path:
    """Losses against the step and beside those of float32, exponents of gradients, and which of them are lost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 9), dpi=110, layout="constrained")
    panels = figure.subplots(2, 3)
    for task, losses, bars in zip(found, panels[0], panels[1, 1:], strict=False):
        own = [row for row in rows if row["task"] == task]
        for row in own:
            fewer = f" after {row['steps']}" * (row["steps"] < max(one["steps"] for one in own))
            label = f"{row['case']}{'*' * row['emulated']}: {row['held_out']:.3f}{fewer}"
            losses.plot(*zip(*smoothed(row, rows, apart=False), strict=True), **_look(row, rows), label=label)
        losses.set(xlabel="step", ylabel="training loss, nats")
        losses.set_title(f"{task}; in the legend: held out, *: emulated", loc="left", fontsize=10)
        losses.legend(frameon=False, fontsize=8, loc="upper right", labelspacing=0.3)
        _lost(bars, own)
        bars.set_title(f"{task}: gradients that a policy loses", loc="left", fontsize=10)
    first, apart = next(iter(found)), panels[0, 2]
    for row in (row for row in rows if row["task"] == first):
        apart.plot(*zip(*smoothed(row, rows, apart=True), strict=True), **_look(row, rows))
    apart.set_yscale("symlog", linthresh=0.05)
    apart.set(xlabel="step", ylabel="nats more than float32, on the same batches")
    apart.set_title(f"{first}: beside float32 (linear up to 0.05)", loc="left", fontsize=10)
    kinds = {f"{task} {kind}": found[task][kind] for task in found for kind in ("activation", "weight")}
    precision_gradients.draw(panels[1, 0], kinds, {name: f"{name}s" for name in kinds})
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def _look(row: dict, rows: list[dict]) -> dict:
    """A color for each policy, a style for each scale that is not its own."""
    policies = list(dict.fromkeys(one["case"].partition(", ")[0] for one in rows if one["case"] != "fp32"))
    policy, _, other = row["case"].partition(", ")
    if policy == "fp32":
        return {"color": "black", "lw": 5, "alpha": 0.25}
    style = {"": "-", "no scale": ":"}.get(other, "--")
    return {"color": COLORS[policies.index(policy) % len(COLORS)], "ls": style, "lw": 1.3}


def _lost(axes, rows: list[dict]) -> None:
    """Bars of the shares of gradients that become 0, of each run of one recipe."""
    for number, kind in enumerate(("activation", "weight")):
        for place, row in enumerate(rows):
            share, at = 100 * row["flushed"][kind], place + 0.4 * number - 0.2
            axes.barh(at, share, height=0.38, color=COLORS[number], label=None if place else f"of {kind}s")
            offset = {"xytext": (3, 0), "textcoords": "offset points", "fontsize": 7, "va": "center"}
            axes.annotate(f"{share:.2f}" if share else "0", (share, at), **offset)
    labels = [row["case"] + f" (x {row['scale']:g})" * (row["scale"] != 1 and "," not in row["case"]) for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set(xlabel="% of float32's gradients that become 0", ylim=(len(rows) - 0.4, -0.6), xlim=(0, 100))
    axes.legend(frameon=False, fontsize=8)
