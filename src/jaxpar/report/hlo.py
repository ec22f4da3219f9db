"""Bytes that each device sends in a compiled program, counted in the program's own text."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import NamedTuple

from jaxpar.core.cost import wire_bytes
from jaxpar.report.groups import groups as groups_of
from jaxpar.report.groups import label
from jaxpar.report.hlo_text import Instruction, Program, arrays, called, parse, trips, values

KINDS = {
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-reduce": "all_reduce",
    "collective-permute": "permute",
    "all-to-all": "all_to_all",
    "collective-broadcast": "broadcast",
}
CALLS = {
    "fusion": ("calls",),
    "call": ("to_apply",),
    "async": ("calls",),
    "while": ("condition", "body"),
    "conditional": ("true_computation", "false_computation", "branch_computations"),
}
_COLLECTIVE = re.compile(r"\b(all-|collective-|reduce-scatter|cross-|send$)")
SLICES = "slices"  # stands for a mesh axis in what slices of TPUs send to each other
BETWEEN = {
    "ALL_REDUCE": "all_reduce",
    "ALL_GATHER": "all_gather",
    "REDUCE_SCATTER": "reduce_scatter",
    "ALL_TO_ALL": "all_to_all",
    "ONE_TO_ONE": "permute",
    "COLLECTIVE_PERMUTE": "permute",
}
_CUSTOM = re.compile(
    r'"has_communication":true|custom_call_target="[^"]*'
    r"(nccl|nvshmem|collective|all_?reduce|all_?gather|all_?to_?all|reduce_?scatter)",
    re.IGNORECASE,
)
CHAINED = "async_collective_fusion_config"
CHAIN_ENDS = 'custom_call_target="AsyncCollective'


class Traffic(NamedTuple):
    """What one device sends in one execution of a program.

    Attributes:
        sent: bytes, by (mesh axes joined by `+` in mesh order, kind of operation); never 0. Axes of size 1 are not
            named; `?` stands for groups of devices that no axes describe. Kinds are the values of `KINDS`.
        messages: how often such operations run, by the same keys; every trip of a loop counts.
        unknown: one sentence for each thing that was not understood. If there is any, `sent` may be too low.
    """

    sent: dict[tuple[str, str], float]
    messages: dict[tuple[str, str], int]
    unknown: tuple[str, ...]


_NOTHING = Traffic({}, {}, ())
Shares = Callable[[str, int], Sequence[float] | None]


class How(NamedTuple):
    """What a text is read with: the arguments of `count`."""

    axes: dict[str, int]
    shares: Shares
    slices: int = 1


def count(text: str, axes: dict[str, int], shares: Shares | None = None, slices: int = 1) -> Traffic:
    """Count the bytes that each device sends in one execution of a compiled program.

    Bytes are those of ring algorithms (`jaxpar.core.cost.wire_bytes`), of the operands; a broadcast sends its operand
    once, a permute once to each other device, and where devices differ the most that any sends. Groups of one device
    are left out. If a conversion was fused into an operation, so that it reads float32 and returns bfloat16, the
    narrower is counted. Of a conditional, the branch that sends most is counted, unless `shares` knows better.

    Dtypes and paddings are those of the text: XLA for CPU sends bfloat16 as float32 and float8 as float16, so there
    the count is twice that of the same program on a GPU or TPU.

    Args:
        text: what `compiled.as_text()` returns.
        axes: size of each mesh axis by name, major first, in the order in which the program numbers its devices. For
            several slices of TPUs the text is that of one slice: pass the axes within it.
        shares: `shares(name, branches)`: of the conditional whose operation is called so in the source, how often each
            branch is taken, as a share of all; None where it does not know.
        slices: how many slices of TPUs run the program; what they tell each other is listed under `SLICES`.

    Returns:
        The traffic. Look at `Traffic.unknown` before trusting a sum.

    Raises:
        ValueError: if `text` is not a compiled program, or is one for another number of devices than `axes` has.
    """
    program = parse(text)
    devices = program.replicas * program.partitions
    if devices != prod(axes.values()):
        raise ValueError(
            f"the program is for {devices} devices, the mesh {axes} has {prod(axes.values())}; pass the axes of the "
            "mesh that it was compiled for: count(text, dict(mesh.shape))."
        )
    found = _traffic(program, How(axes, shares or (lambda name, branches: None), slices), program.entry, ())
    return found._replace(unknown=tuple(dict.fromkeys([*found.unknown, *_overlooked(program)])))


def _traffic(program: Program, how: How, computation: str, arguments: tuple) -> Traffic:
    """Traffic of one execution of `computation`, given what is known of its parameters."""
    follows, known = not starts_chain(program, computation), values(program, computation, arguments)
    parts = []
    for each in program.computations[computation].values():
        op = each.op.removesuffix("-start")
        operands = tuple(known.get(name) for name in each.operands)
        if op == "while":
            parts.append((1, _loop(program, how, each, *trips(program, each, operands[0]))))
        elif op == "conditional":
            parts.append((1, _branches(program, how, each, operands[1:])))
        elif op in CALLS:
            parts += [(1, _traffic(program, how, callee, operands)) for callee in called(each, *CALLS[op])]
        elif is_collective(each) and not (follows and CHAINED in each.attributes):
            parts.append((1, message(program, how, computation, each)))
    return _total(parts)


def starts_chain(program: Program, computation: str) -> bool:
    """A TPU chain prints one collective in each fusion that carries a piece of it; the first has this custom call."""
    return any(f"{CHAIN_ENDS}Start" in each.attributes for each in program.computations[computation].values())


def is_collective(instruction: Instruction) -> bool:
    """Whether this instruction begins to send something to other devices."""
    if instruction.op == "custom-call":
        return CHAIN_ENDS not in instruction.attributes and bool(_CUSTOM.search(instruction.attributes))
    if instruction.op == "send":  # to the host, unless this is how slices of TPUs reach each other
        return "is_host_transfer=true" not in instruction.attributes or "megascale" in instruction.attributes
    return not instruction.op.endswith(("-done", "-update")) and bool(_COLLECTIVE.search(instruction.op))


def _loop(program: Program, how: How, loop: Instruction, times: int | None, state: dict) -> Traffic:
    check, trip = (_traffic(program, how, callee, (state,)) for callee in called(loop, *CALLS["while"]))
    if times is not None:
        return _total([(times, trip), (times + 1, check)])
    once = _total([(1, trip), (1, check)])
    size = sum(once.sent.values())
    doubt = _unknown(loop, f"how often this loop runs could not be read; one trip, {size:.0f} bytes, is counted")
    return _NOTHING if once == _NOTHING else _total([(1, once), (1, doubt)])


def _branches(program: Program, how: How, instruction: Instruction, operands: tuple) -> Traffic:
    callees = called(instruction, *CALLS["conditional"])
    branches = [_traffic(program, how, callee, (value,)) for callee, value in zip(callees, operands, strict=True)]
    unknown = tuple(doubt for branch in branches for doubt in branch.unknown)
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    shares = how.shares(source[1] if source else "", len(branches))
    if shares is not None:
        return _total(zip(shares, branches, strict=True))._replace(unknown=unknown)
    return max(branches, key=lambda branch: sum(branch.sent.values()))._replace(unknown=unknown)


def message(program: Program, how: How, computation: str, instruction: Instruction) -> Traffic:
    """Traffic of one collective operation."""
    if instruction.op == "send" and "megascale" in instruction.attributes:
        return _to_slices(program, how, computation, instruction)
    kind = KINDS.get(instruction.op.removesuffix("-start"))
    if kind == "all_reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce_scatter"  # a TPU fusion of this name keeps only its own part of the sum
    size, problem = _payload(program, computation, instruction)
    groups = groups_of(program, instruction)
    if kind is None:
        return _unknown(instruction, f"this operation cannot be counted; its operands are {size} bytes")
    if groups is None or "slice_sizes=" in instruction.attributes:
        return _unknown(instruction, f"who sends which part could not be read; its operands are {size} bytes")
    groups = [group for group in groups if len(set(group)) > 1]
    if groups and problem:
        return _unknown(instruction, f"{problem}; not counted, with {size} bytes of other operands")
    if not groups or not size:
        return _NOTHING
    named = label(groups, how.axes, kind)
    repeats = max(Counter(pair[0] for pair in groups).values()) if kind == "permute" else 1
    sent = size if kind == "broadcast" else repeats * wire_bytes(kind, size, max(map(len, groups)))
    found = Traffic({(named, kind): sent}, {(named, kind): 1}, ())
    doubt = _unknown(instruction, f"its groups of devices, such as {groups[0]}, lie along no axes of {how.axes}")
    return _total([(1, found), (1, doubt)]) if named == "?" else found


def _to_slices(program: Program, how: How, computation: str, instruction: Instruction) -> Traffic:
    """What a slice of TPUs hands to its host, for the same device of the other slices; as large as the text pads it."""
    size, problem = _payload(program, computation, instruction)
    type_ = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    kind = BETWEEN.get(type_[1] if type_ else "")
    if kind is None or problem or how.slices < 2:
        return _unknown(instruction, f"what goes to other slices cannot be counted; its operands are {size} bytes")
    return Traffic({(SLICES, kind): wire_bytes(kind, size, how.slices)}, {(SLICES, kind): 1}, ())


def _unknown(instruction: Instruction, why: str) -> Traffic:
    return Traffic({}, {}, (f"{instruction.op} {instruction.name}: {why}.",))


def _payload(program: Program, computation: str, instruction: Instruction) -> tuple[int, str]:
    """Bytes of the operands, in the narrower dtype of operand and result; and what is wrong with them, if anything."""
    known = program.computations[computation]
    shapes = [arrays(known[name].result) if name in known else [] for name in instruction.operands]
    operands = [array for shape in shapes for array in shape]
    results = [array.bits for array in arrays(instruction.result)] + [None] * len(operands)
    size = 0
    for array, bits in zip(operands, results, strict=False):  # a -start returns its operands as well, and first
        if array.bits is not None:
            size += -(-array.entries * min(array.bits, bits or array.bits) // 8)
    strange = ", ".join(sorted({array.dtype for array in operands if array.bits is None}))
    if strange:
        return size, f"the size of dtype {strange} is not known"
    return size, "" if shapes and all(shapes) else "not all of its operands could be found"


def _overlooked(program: Program) -> list[str]:
    """Sentences on collectives in computations that nothing was seen to run, and on TPU chains with no beginning."""
    reached, waiting = set(), [program.entry]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            for each in program.computations[name].values():
                waiting += called(each, *CALLS.get(each.op.removesuffix("-start"), ()))
    found, channels = [], {True: set(), False: set()}
    for name, held in program.computations.items():
        if name not in reached and any(map(is_collective, held.values())):
            found.append(f"computation {name}: it has collectives, and how often it runs is not clear; not counted.")
        pieces = [each.attributes for each in held.values() if CHAINED in each.attributes]
        channels[starts_chain(program, name)].update(re.search(r"channel_id=\d+|$", piece)[0] for piece in pieces)
    lost = sorted(channels[False] - channels[True])
    return found + [
        f"collective with {channel}: no fusion begins this chain of fusions; not counted." for channel in lost
    ]


def _total(parts: Iterable[tuple[float, Traffic]]) -> Traffic:
    """The sum of (times, traffic)."""
    sent, messages, unknown = defaultdict(float), Counter(), []
    for times, part in parts:
        unknown += part.unknown
        for key in part.sent if times else ():
            sent[key] += times * part.sent[key]
            messages[key] += times * part.messages[key]
    return Traffic(dict(sent), dict(messages), tuple(unknown))
