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


def table(rows: list[dict]) -> str:
    """One line for each run: losses, gradients lost, time."""
    head = ["", "run", "steps", "held out", "- fp32", "skipped", "scale"]
    head += ["lost: activations", "weights", "step ms", "x fp32"]
    lines = []
    for row in rows:
        (first,) = [one for one in rows if one["task"] == row["task"] and one["case"] == "fp32"]
        lines.append([row["task"], row["case"] + "*" * row["emulated"], str(row["steps"]), f"{row['held_out']:.4f}"])
        apart = row["held_out"] - first["held_out"]
        lines[-1] += [f"{apart:+.4f}" if row["steps"] == first["steps"] else "", str(row["skipped"])]
        lines[-1] += [f"{row['scale']:g}", *(f"{row['flushed'][kind]:.2%}" for kind in ("activation", "weight"))]
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
    """Losses against the step, exponents of gradients, and the shares of them that are lost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), dpi=130, layout="constrained")
    panels = figure.subplots(2, 2)
    names = list(dict.fromkeys(row["case"] for row in rows))
    policies, first = [name for name in names if name != "fp32" and "," not in name], next(iter(found))
    styles = {"no scale": ":", "scale 2^-10": "--"}
    for axes, task in zip(panels[0], found, strict=False):
        for row in (row for row in rows if row["task"] == task):
            policy, _, other = row["case"].partition(", ")
            look = {"color": "black", "lw": 5, "alpha": 0.25}
            if policy != "fp32":
                color = COLORS[policies.index(policy) % len(COLORS)]
                look = {"color": color, "ls": styles.get(other, "-"), "lw": 1.3}
            window = max(1, len(row["losses"]) // 40)
            ends = range(window, len(row["losses"]) + 1, window)
            curve = [statistics.fmean(row["losses"][end - window : end]) for end in ends]
            label = f"{row['case']}{'*' * row['emulated']}: {row['held_out']:.3f}"
            axes.plot(ends, curve, **look, label=label)
        axes.set(xlabel="step", ylabel="training loss, nats")
        axes.set_title(f"{task}; in the legend: held out, *: emulated", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    kinds = {f"{task} {kind}": found[task][kind] for task in found for kind in ("activation", "weight")}
    precision_gradients.draw(panels[1, 0], kinds, {name: f"{name}s" for name in kinds})
    bars = panels[1, 1]
    for place, name in enumerate(names):
        for number, kind in enumerate(("activation", "weight")):
            (row,) = [row for row in rows if row["case"] == name and row["task"] == first]
            share = 100 * row["flushed"][kind]
            at = place + 0.4 * number - 0.2
            bars.barh(at, share, height=0.38, color=COLORS[number], label=None if place else f"of {kind}s")
            bars.annotate(
                f"{share:.3g}", (share, at), xytext=(3, 0), textcoords="offset points", fontsize=7, va="center"
            )
    scales = {row["case"]: row["scale"] for row in rows if row["task"] == first}
    labels = [f"{name} (x {scales[name]:g})" if scales[name] != 1 and "," not in name else name for name in names]
    bars.set_yticks(range(len(names)), labels, fontsize=8)
    bars.set(xlabel="% of float32's gradients that become 0", ylim=(len(names) - 0.4, -0.6))
    bars.set_title(f"{first}: gradients that a policy loses", loc="left", fontsize=10)
    bars.legend(frameon=False, fontsize=8)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path
