"""The text of a compiled program as plain values: computations, instructions, array sizes, trips of loops."""

import math
import re
from typing import Any, NamedTuple

_BITS = {
    128: "c128",
    64: "s64 u64 f64 c64",
    32: "s32 u32 f32",
    16: "s16 u16 f16 bf16",
    8: "pred s8 u8 f8e3m4 f8e4m3 f8e4m3b11fnuz f8e4m3fn f8e4m3fnuz f8e5m2 f8e5m2fnuz f8e8m0fnu",
    4: "s4 u4 f4e2m1fn",
    2: "s2 u2",
    1: "s1 u1",
    0: "token",
}
DTYPE_BITS = {dtype: bits for bits, dtypes in _BITS.items() for dtype in dtypes.split()}

_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) (\(.*)?\{$")
_END = re.compile(r"\}(, execution_thread=.*)?$")
_START = re.compile(r"\s*(ROOT )?%[\w.\-]+ = ")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)", re.DOTALL)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{[^{}]*?E\((\d+)\))?")
_INTEGER = re.compile(r"(pred|[su]\d+)\[1?\]")
_UNCHANGED = {"copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "opt-barrier"}


class Instruction(NamedTuple):
    """One instruction of a computation.

    Attributes:
        name: without the percent sign.
        op: the opcode, such as `"all-gather"`.
        result: shape of the result, as text.
        operands: names of the instructions of the same computation that it reads.
        literal: the text between the parentheses: the value of a constant, the index of a parameter.
        attributes: the text behind the parentheses.
        root: whether its result is that of the computation.
    """

    name: str
    op: str
    result: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        computations: instructions by name, in the order printed, by name of the computation.
        entry: name of the computation that runs first.
        replicas: number of replicas; one, unless made by `jax.pmap`.
        partitions: number of partitions of each replica; devices are numbered replica by replica.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    replicas: int
    partitions: int


class Array(NamedTuple):
    """One array of a shape: dtype as printed, number of entries, bits that each takes (None: dtype not known)."""

    dtype: str
    entries: int
    bits: int | None


class Affine(NamedTuple):
    """An integer: entry `slot` of a loop's tuple as it is before a trip, plus `offset`; no slot: `offset` alone."""

    slot: int | None
    offset: int


class Comparison(NamedTuple):
    """A test of two integers; `direction` as HLO writes it: LT, LE, GT, GE, NE or EQ."""

    direction: str
    left: Any
    right: Any


def parse(text: str) -> Program:
    """The program that `text`, from `compiled.as_text()`, describes.

    Raises:
        ValueError: if no computation of `text` is marked as the entry, or a line of one is no instruction.
    """
    computations, entry, lines = {}, None, None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if lines is None and header:
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif lines is not None and _END.match(line):
            lines = None
        elif lines is not None and _START.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += "\n" + line  # attributes of a kernel go on for several lines, which may begin with a brace
    if entry is None:
        raise ValueError(
            f"found no ENTRY computation in {len(text)} characters; pass the whole text that "
            "`jax.jit(f).lower(...).compile().as_text()` returns."
        )
    devices = dict(re.findall(r"(replica_count|num_partitions)=(\d+)", text.split("\n", 1)[0]))
    parsed = {name: {each.name: each for each in map(_instruction, lines)} for name, lines in computations.items()}
    return Program(parsed, entry, int(devices.get("replica_count", 1)), int(devices.get("num_partitions", 1)))


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape, those of a tuple in order; less than 8 bits take a byte, unless packed as in `E(4)`."""
    found = []
    for dtype, sizes, packed in _ARRAY.findall(shape):
        bits = DTYPE_BITS.get(dtype)
        entries = math.prod(map(int, re.findall(r"\d+", sizes)))
        found.append(Array(dtype, entries, int(packed) if packed else bits and max(bits, 8)))
    return found


def dims(shape: str) -> tuple[int, ...] | None:
    """The dims of the first array of a shape; None if it has no array."""
    first = _ARRAY.search(shape)
    return tuple(map(int, re.findall(r"\d+", first[2]))) if first else None


def called(instruction: Instruction, *keys: str) -> list[str]:
    """Names of the computations that the attributes `keys` hold, such as `called(loop, "condition", "body")`."""
    held = [re.search(rf"\b{key}=(\{{[^}}]*\}}|[^,\s]+)", instruction.attributes) for key in keys]
    return [name for match in held if match for name in re.findall(r"[\w.\-]+", match[1])]


def values(program: Program, computation: str, arguments: tuple) -> dict[str, Any]:
    """What is known of each result in a computation, given what is known of its parameters.

    A value is an `Affine`, a `Comparison`, a dict of values by index for a tuple, or None for nothing.
    """
    known = {}
    for each in program.computations[computation].values():  # printed in an order in which they can run
        operands = [known.get(name) for name in each.operands]
        followed = each.result.startswith("(") or _INTEGER.match(each.result)
        known[each.name] = _value(program, each, operands, arguments) if followed else None
    return known


def trips(program: Program, loop: Instruction, start: Any) -> tuple[int | None, dict]:
    """How often a while loop runs, and what is known of its tuple, by index, before any one trip.

    The number of trips is None where neither the compiler states it nor integers that move by constant steps decide it.

    Args:
        program: the program.
        loop: the while instruction.
        start: what is known of its operand, as `values` has it.
    """
    slots, after = _one_trip(program, loop)
    start = start if isinstance(start, dict) else {}
    state = slots | {slot: value for slot, value in _kept(start, after).items() if _is_constant(value)}
    stated = re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes)
    if stated:
        return int(stated[1]), state
    test = _root_value(program, called(loop, "condition")[0], (state,))
    if not isinstance(test, Comparison) or test.direction == "EQ":
        return None, state
    (left, left_step), (right, right_step) = (_course(side, start, after) for side in (test.left, test.right))
    if left is None or right is None or left.slot != right.slot:
        return None, state
    return _steps(test.direction, right.offset - left.offset, left_step - right_step), state


def _one_trip(program: Program, loop: Instruction) -> tuple[dict, dict]:
    """The tuple of a loop before a trip, each entry standing for itself, and what is known of it after that trip."""
    slots = {slot: Affine(slot, 0) for slot in range(len(arrays(loop.result)))}
    after = _root_value(program, called(loop, "body")[0], (slots,))
    return slots, after if isinstance(after, dict) else {}


def _kept(start: dict, after: dict) -> dict:
    """Entries of `start` that no trip changes."""
    return {slot: value for slot, value in start.items() if after.get(slot) == Affine(slot, 0)}


def _steps(direction: str, distance: int, pace: int) -> int | None:
    """Trips while `0 < distance` (LT; the others alike), which shrinks by `pace` in each; None if that never ends."""
    if direction == "NE":
        return distance // pace if pace and distance % pace == 0 and distance // pace >= 0 else None
    if direction in ("GT", "GE"):
        distance, pace = -distance, -pace
    distance += direction in ("LE", "GE")
    if distance <= 0:
        return 0
    return -(-distance // pace) if pace > 0 else None


def _course(side: Any, start: dict, after: dict) -> tuple[Affine | None, int]:
    """Where a side of a test begins, and its step per trip; None and 0 if that is not known."""
    if not isinstance(side, Affine) or side.slot is None:
        return (side if isinstance(side, Affine) else None), 0
    first, moved = start.get(side.slot), after.get(side.slot)
    if not isinstance(first, Affine) or not isinstance(moved, Affine) or moved.slot != side.slot:
        return None, 0
    return Affine(first.slot, first.offset + side.offset), moved.offset


def _value(program: Program, each: Instruction, operands: list, arguments: tuple) -> Any:
    if each.op == "constant":
        number = re.fullmatch(r"[{ ]*(-?\d+)[} ]*", each.literal)
        return Affine(None, int(number[1])) if number else None
    if each.op == "parameter":
        return arguments[int(each.literal)] if int(each.literal) < len(arguments) else None
    if each.op == "while":
        return _kept(operands[0], _one_trip(program, each)[1]) if isinstance(operands[0], dict) else None
    if each.op in ("fusion", "call"):
        return _root_value(program, called(each, "calls", "to_apply")[0], tuple(operands))
    if each.op in _UNCHANGED:
        return operands[0]
    return _COMBINED[each.op](each, *operands) if each.op in _COMBINED else None


def _root_value(program: Program, computation: str, arguments: tuple) -> Any:
    known = values(program, computation, arguments)
    return next(known[each.name] for each in program.computations[computation].values() if each.root)


def _is_constant(value: Any) -> bool:
    return isinstance(value, Affine) and value.slot is None


def _tuple(each: Instruction, *entries: Any) -> dict:
    return dict(enumerate(entries))


def _entry(each: Instruction, whole: Any) -> Any:
    index = int(re.search(r"index=(\d+)", each.attributes)[1])
    return whole.get(index) if isinstance(whole, dict) else None


def _compare(each: Instruction, left: Any, right: Any) -> Comparison:
    return Comparison(re.search(r"direction=(\w+)", each.attributes)[1], left, right)


def _sum(each: Instruction, left: Any, right: Any) -> Affine | None:
    sign = -1 if each.op == "subtract" else 1
    if isinstance(left, Affine) and _is_constant(right):
        return Affine(left.slot, left.offset + sign * right.offset)
    if isinstance(right, Affine) and _is_constant(left) and sign == 1:
        return Affine(right.slot, left.offset + right.offset)
    return None


_COMBINED = {"add": _sum, "subtract": _sum, "compare": _compare, "get-tuple-element": _entry, "tuple": _tuple}


def _instruction(line: str) -> Instruction:
    match = _INSTRUCTION.match(line)
    if match is None:
        raise ValueError(f"no HLO instruction: {line[:200]!r}; pass the text of `compiled.as_text()` unchanged.")
    root, name, result, op, rest = match.groups()
    depth, end = 1, len(rest)
    for bracket in re.finditer(r"[()]", rest):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            end = bracket.start()
            break
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    return Instruction(name, op, result, operands, rest[:end], rest[end + 1 :], bool(root))
