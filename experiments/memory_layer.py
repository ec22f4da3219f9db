"""What does a block keep for its backward pass?  Section 4 of `experiments/memory.py`, which runs it.

Korthikanti et al. 2022 (arXiv:2205.05198, table 2) count 16-bit activations, and masks of a byte, of their own code.
Here the terms are found in the trace of ours, in bfloat16 with dropout, and named by their dims. Letters as theirs:
sequence s, microbatch b, width h, heads a, tensor-parallel devices t. Not counted, there or here: weights. Where ours
keeps everything, their casts to 16 bits are kept too, 24 h^2 / t bytes of a layer.
"""

import math
from collections import Counter

from jaxpar import Model, Plan, Recipe
from jaxpar.report.columns import aligned
from jaxpar.report.pictures import COLORS

WIDTHS = {"float32": 4, "bfloat16": 2, "bool": 1}  # bytes
SHAPE = {"s": 40, "b": 3, "h": 96, "a": 8, "t": 2}  # sizes that tell every dim from every other
OTHERS = ({"s": 80}, {"b": 5}, {"h": 192}, {"a": 16}, {"t": 4}, {"s": 64, "b": 2, "h": 256, "a": 32, "t": 8})
PAPER = {"s": 2048, "b": 4, "h": 6144, "a": 64, "t": 8}  # their model of 22B parameters
SELECTIVE = "names:query+key+value+attention+out+norm+up+activation"
CLAIMED = {  # bytes of a layer: theirs
    ("one_d", "none"): lambda s, b, h, a, t: s * b * h * (10 + 24 / t + 5 * a * s / (h * t)),
    ("sequence", "none"): lambda s, b, h, a, t: s * b * h / t * (34 + 5 * a * s / h),
    ("one_d", SELECTIVE): lambda s, b, h, a, t: s * b * h * (10 + 24 / t),
    ("sequence", SELECTIVE): lambda s, b, h, a, t: s * b * h / t * 34,
    ("one_d", "block"): lambda s, b, h, a, t: 2 * s * b * h,
    ("sequence", "block"): lambda s, b, h, a, t: 2 * s * b * h,  # kept whole, to save a gather; ours is split
}
TERMS = {  # of what `one_d` keeps, dims and dtype: their bytes in units of the dims, and what it is
    "b s h float32": (4, "norms: theirs keep the input in 16 bits, ours what autodiff reads, 3 arrays of 32 each"),
    "b s h bfloat16": (4, "inputs of QKV and MLP"),
    "b s h bool": (2, "masks of dropout, kept here too"),
    "b s h/t bfloat16": (8, "Q, K, V, and the input of the out projection"),
    "b s 4h/t bfloat16": (16, "input and result of GELU"),
    "b a/t s s float32": (2, "softmax: theirs in 16 bits"),
    "b a/t s s bool": (1, "mask of dropout"),
    "b a/t s s bfloat16": (2, "what dropout leaves of it"),
}


def parts_of(model: Model, batch: int, side: int, plan: str):
    """The parts of a plan for tokens, or for images so many pixels wide."""
    import jax

    from jaxpar.step.parts import assemble

    shape = (batch, side, side, 3) if side else (batch, model.context)
    inputs = jax.ShapeDtypeStruct(shape, "float32" if side else "int32")
    labels = jax.ShapeDtypeStruct((batch,) if side else shape, "int32")
    return assemble(Recipe(model=model, plan=Plan.parse(plan), batch=batch), inputs, labels, model.vocab or 10)


def kept(parts, trace=None) -> Counter[tuple[tuple[int, ...], str]]:
    """What a stack keeps of one block for its backward pass: activations by shape and dtype, from the traced step.

    These are the arrays that its forward scan stacks and whose first dim is the batch; copies of weights have another.
    """
    from jaxpar.core.walk import jaxprs
    from jaxpar.step.program import traced

    def scans(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                yield equation
            else:
                for inner in jaxprs(equation):
                    yield from scans(getattr(inner, "jaxpr", inner))

    found: Counter = Counter()
    for scan in scans(trace or traced(parts)):
        if "transpose(" not in str(scan.source_info.name_stack):
            stacked = scan.params["jaxpr"].jaxpr.outvars[scan.params["num_carry"] :]
            rows = parts.inputs.shape[0]
            found.update((var.aval.shape, str(var.aval.dtype)) for var in stacked if (*var.aval.shape, 0)[0] == rows)
    return found


def size(arrays: Counter) -> int:
    """Bytes of what was found to be kept."""
    import numpy as np

    return sum(count * math.prod(shape) * np.dtype(dtype).itemsize for (shape, dtype), count in arrays.items())


def layer_terms(scheme: str, policy: str, shape: dict[str, int]) -> Counter:
    """What a device keeps of one transformer block in bfloat16 with dropout, as of `kept`."""
    model = Model("gpt", layers=2, width=shape["h"], heads=shape["a"], context=shape["s"], vocab=64, dropout=0.1)
    plan = f"tensor={scheme}:{shape['t']},precision=bf16,unroll=false,remat={policy}"
    return kept(parts_of(model, shape["b"], 0, plan))


def sizes(shape: dict[str, int]) -> dict[str, int]:
    """The sizes of dims on one device, by their names in terms."""
    s, h, a, t = (shape[name] for name in "shat")
    return shape | {"s/t": s // t, "h/t": h // t, "4h/t": 4 * h // t, "a/t": a // t, "1": 1}


def named(arrays: Counter) -> Counter[str]:
    """Terms such as "b s h/t bfloat16", from what was found at SHAPE."""
    words = {count: word for word, count in sizes(SHAPE).items() if word not in ("t", "a")}
    terms: Counter = Counter()
    for (shape, dtype), count in arrays.items():
        terms[" ".join([*(words[one] for one in shape), dtype])] += count
    return terms


def bytes_of(terms: Counter, shape: dict[str, int]) -> dict[str, int]:
    """Bytes of each term at another shape."""
    import numpy as np

    at = sizes(shape)
    return {
        term: count * math.prod(at[word] for word in term.split()[:-1]) * np.dtype(term.split()[-1]).itemsize
        for term, count in terms.items()
    }


def transformer(scheme: str, policy: str) -> dict:
    """Terms of one layer, ours at the paper's sizes beside theirs, and whether they hold at other shapes."""
    terms = named(layer_terms(scheme, policy, SHAPE))
    ours, theirs = bytes_of(terms, PAPER), CLAIMED[scheme, policy](**PAPER)
    shapes = [SHAPE | other for other in OTHERS]
    holds = [size(layer_terms(scheme, policy, one)) == sum(bytes_of(terms, one).values()) for one in shapes]
    found = {"scheme": scheme, "remat": policy, "terms": terms, "ours": ours, "theirs": theirs}
    return found | {"ratio": sum(ours.values()) / theirs, "holds": [sum(holds), len(holds)]}


def table(rows: list[dict]) -> str:
    """What a layer keeps, and of the first row each term, as text."""
    unit = PAPER["s"] * PAPER["b"] * PAPER["h"]
    head = ["scheme", "remat", "ours", "theirs", "ratio", "formula holds"]
    lines = []
    for row in rows:
        ours = f"{sum(row['ours'].values()) / unit:.2f}"
        told = [f"{row['theirs'] / unit:.2f}", f"{row['ratio']:.2f}", "at {} of {} shapes".format(*row["holds"])]
        lines.append([row["scheme"], row["remat"].partition(":")[0], ours, *told])
    shape = ", ".join(f"{name}={count}" for name, count in PAPER.items())
    text = [f"4. Bytes of a layer in units of s b h, at {shape}", aligned(head, lines, head[2:])]
    terms, lines = rows[0]["terms"], []
    for term, count in terms.items():
        theirs, what = TERMS.get(term, (0, "statistics of norms and softmax, not counted in theirs"))
        lines.append(
            [term, str(count), str(count * WIDTHS[term.split()[-1]] * (4 if "4h" in term else 1)), str(theirs), what]
        )
    head = ["one_d, none", "arrays", "bytes", "theirs", "what it is"]
    return "\n".join([*text, "", aligned(head, lines, head[1:4])])


def draw(axes, rows: list[dict]) -> None:
    """Bytes of a layer by dtype, beside the paper's."""
    unit = PAPER["s"] * PAPER["b"] * PAPER["h"]
    below = [0.0] * len(rows)
    for number, dtype in enumerate(WIDTHS):
        sizes = [sum(n for term, n in row["ours"].items() if term.endswith(f" {dtype}")) / unit for row in rows]
        axes.bar([n - 0.2 for n in range(len(rows))], sizes, 0.38, bottom=below, color=COLORS[number], label=dtype)
        below = [a + b for a, b in zip(below, sizes, strict=True)]
    theirs = [row["theirs"] / unit for row in rows]
    axes.bar([n + 0.2 for n in range(len(rows))], theirs, 0.38, color="#bbbbbb", label="Korthikanti et al.")
    for place, pair in enumerate(zip(below, theirs, strict=True)):
        for at, height in zip((place - 0.2, place + 0.2), pair, strict=True):
            axes.text(at, height, f"{height:.3g}", ha="center", va="bottom", fontsize=8)
    labels = [f"{row['scheme']}\n{row['remat'].partition(':')[0]}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylabel("bytes of a layer and device, in s b h")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("4. A transformer's layer in bfloat16 (22B: t = 8)", loc="left", fontsize=10)
