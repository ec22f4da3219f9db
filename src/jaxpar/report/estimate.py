"""How long a compiled step may take: the compiler's own schedule, played with its own counts of cycles.

Nothing is measured. TPU programs carry, for each instruction, the cycles that the compiler reckons with; what they send
is set against the links of the chip. Good to rank two programs for the same chip, never to promise a speed.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxpar.report import hlo
from jaxpar.report.hlo import CALLS, How
from jaxpar.report.hlo_flops import Work, work
from jaxpar.report.hlo_text import Instruction, Program, arrays, called, trips, values

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_DIMS = re.compile(r"active_dims:([01]+)")
_THROUGH = ("get-tuple-element", "bitcast", "copy", "tuple", "async-update", "opt-barrier")
_PREFETCH = ("copy-start", "slice-start")


class Rates(NamedTuple):
    """What a device does in a second.

    Attributes:
        clock: cycles.
        memory: bytes from its memory.
        link: `link(axes, kind)`: bytes that it sends along mesh axes (joined by `+`) in a collective of this kind, over
            one dim of the torus.
        hop: seconds until the next device has the first byte.
    """

    clock: float
    memory: float
    link: Callable[[str, str], float]
    hop: float


class Played(NamedTuple):
    """One execution of a program on one device, in seconds, flops and bytes.

    Attributes:
        seconds: from beginning to end; the sum of `compute`, `kernels`, `exposed`, `fetching` and `idle`.
        compute: of instructions whose cycles the compiler states.
        kernels: of custom kernels, whose cycles nobody states: the time to read and write what they are given.
        sending: that links are busy, one collective after the other.
        exposed: that the core waits for other devices' data.
        fetching: that it waits for its own memory.
        idle: that it waits for other devices of a pipeline, which play the same tick.
        flops: of matrix products and convolutions.
        sent: bytes.
        started: bytes of collectives that are begun before they are waited for.
        beside: bytes of those that have products or cycles in between.
        unknown: one sentence for each thing that was not understood.
    """

    seconds: float = 0.0
    compute: float = 0.0
    kernels: float = 0.0
    sending: float = 0.0
    exposed: float = 0.0
    fetching: float = 0.0
    idle: float = 0.0
    flops: float = 0.0
    sent: float = 0.0
    started: float = 0.0
    beside: float = 0.0
    unknown: tuple[str, ...] = ()


Together = Callable[[str, int], Any]


class Reader(NamedTuple):
    """What a program is played with.

    Attributes:
        program: parsed.
        how: mesh axes, and how often this device takes each branch of a switch.
        rates: of the device; None where only flops and bytes are asked for.
        inside: what each computation computes, from `hlo_flops.inside`.
        together: `together(scope, branches)`: which branch each device of a pipeline takes in each tick, an array
            `[ticks, devices]`, of the switch at this scope; None if it is no switch of a timetable.
    """

    program: Program
    how: How
    rates: Rates | None
    inside: dict[str, Work]
    together: Together


class _Begun(NamedTuple):
    """A transfer under way: when it ends, its bytes, and how much had been computed when it began."""

    end: float
    sent: float
    before: float


def play(reader: Reader, computation: str, arguments: tuple = ()) -> Played:
    """One execution of a computation, in the order in which its instructions are printed.

    Transfers of one loop's trip are waited for in that trip. Of a conditional the branch that takes longest is played,
    unless `Reader.how` knows better.
    """
    program, known = reader.program, values(reader.program, computation, arguments)
    total, links, begun = Played(), {}, {}
    for each in program.computations[computation].values():
        operands = tuple(known.get(name) for name in each.operands)
        message = _begins(reader, computation, each)
        if each.op in ("while", "conditional", "call"):
            part = _within(reader, each, operands)
        elif message:
            part = _begin(reader, each, message, total, links)
            begun[_ticket(each)] = _Begun(links[_link(each, message)], part.sent, _done(total))
        elif each.op in _PREFETCH:
            part = _prefetch(reader, each, total, links)
            begun[each.name] = _Begun(links["memory"], 0.0, _done(total))
        elif _ends(program, each):
            part = _wait(program, computation, each, total, begun)
        else:
            part = _instruction(reader, computation, each)
        total = _add(total, part)
    return total


def _within(reader: Reader, each: Instruction, operands: tuple) -> Played:
    """What an instruction runs that runs other computations."""
    if each.op == "call":
        return play(reader, called(each, *CALLS["call"])[0], operands)
    if each.op == "conditional":
        return _branches(reader, each, operands[1:])
    times, state = trips(reader.program, each, operands[0])
    once = _add(*(play(reader, name, (state,)) for name in called(each, *CALLS["while"])))
    if times is None and once != Played():
        doubt = f"while {each.name}: how often this loop runs could not be read; one trip is played."
        return once._replace(unknown=(*once.unknown, doubt))
    return _times(once, times or 0)


def _branches(reader: Reader, each: Instruction, operands: tuple) -> Played:
    callees = called(each, *CALLS["conditional"])
    played = [play(reader, name, (value,)) for name, value in zip(callees, operands, strict=True)]
    source = re.search(r'op_name="([^"]*)"', each.attributes)
    shares = reader.how.shares(source[1] if source else "", len(played))
    if shares is None:
        return max(played, key=lambda one: (one.seconds, one.flops, one.sent))
    mixed = Played()
    for share, one in zip(shares, played, strict=True):
        mixed = _add(mixed, _times(one, share))
    ticks = reader.together(source[1], len(played))
    if ticks is None:
        return mixed
    lasts = sum(max(played[branch].seconds for branch in row) for row in ticks) / len(ticks)
    return mixed._replace(seconds=lasts, idle=mixed.idle + lasts - mixed.seconds)


def _begins(reader: Reader, computation: str, each: Instruction) -> hlo.Traffic | None:
    """What `each` sends, if it only begins to; the pieces of a TPU's chain of fusions are begun by the first."""
    program = reader.program
    if each.op == "send" or (each.op.endswith("-start") and each.op != "async-start"):
        return hlo.message(program, reader.how, computation, each) if hlo.is_collective(each) else None
    if each.op not in ("async-start", "fusion"):
        return None
    callee = called(each, *CALLS[each.op.removesuffix("-start")])[0]
    if each.op == "fusion" and not hlo.starts_chain(program, callee):
        return None
    found = [inner for inner in program.computations[callee].values() if hlo.is_collective(inner)]
    return hlo.message(program, reader.how, callee, found[0]) if found else None


def _begin(reader: Reader, each: Instruction, message: hlo.Traffic, total: Played, links: dict) -> Played:
    """Put a message on its link behind those that are there, and go on."""
    seconds, link = _seconds(reader, each, message), _link(each, message)
    links[link] = max(total.seconds, links.get(link, 0.0)) + seconds
    sent = sum(message.sent.values())
    return Played(sending=seconds, sent=sent, started=sent, unknown=message.unknown)


def _link(each: Instruction, message: hlo.Traffic) -> tuple:
    """Messages share a link if they go along the same axes; permutes of another direction have one of their own."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", each.attributes)
    return tuple(message.sent), bool(pairs) and int(pairs[1]) < int(pairs[2])


def _awaited(reader: Reader, computation: str, each: Instruction) -> list[Played]:
    """Messages that the core waits for: `each` itself, or what a fusion sends that is no piece of a chain."""
    found, program = [], reader.program
    callees = called(each, "calls") if each.op == "fusion" else ()
    inner = [(name, one) for name in callees for one in program.computations[name].values()]
    for name, one in [(computation, each), *inner]:
        if hlo.is_collective(one) and hlo.CHAINED not in one.attributes:
            message = hlo.message(program, reader.how, name, one)
            seconds, sent = _seconds(reader, one, message), sum(message.sent.values())
            found.append(Played(seconds=seconds, sending=seconds, exposed=seconds, sent=sent, unknown=message.unknown))
    return found


def _seconds(reader: Reader, each: Instruction, message: hlo.Traffic) -> float:
    if reader.rates is None:
        return 0.0
    used = _DIMS.search(each.attributes)
    dims = max(1, used[1].count("1")) if used else 1
    seconds = 0.0
    for (axes, kind), sent in message.sent.items():
        group = 1
        for axis in axes.split("+"):
            group *= reader.how.slices if axis == hlo.SLICES else reader.how.axes.get(axis, 1)
        hops = 1 if kind == "permute" else max(1, group - 1)
        seconds += sent / (reader.rates.link(axes, kind) * dims) + reader.rates.hop * hops
    return seconds


def _prefetch(reader: Reader, each: Instruction, total: Played, links: dict) -> Played:
    """A copy between a chip's two memories, which goes on beside everything else."""
    size = sum(array.entries * (array.bits or 0) / 8 for array in arrays(each.result)[1:2])
    seconds = size / reader.rates.memory if reader.rates else 0.0
    links["memory"] = max(total.seconds, links.get("memory", 0.0)) + seconds
    return Played()


def _ends(program: Program, each: Instruction) -> bool:
    if each.op == "fusion":
        held = program.computations[called(each, "calls")[0]].values()
        return any(f"{hlo.CHAIN_ENDS}Done" in inner.attributes for inner in held)
    return each.op.endswith("-done") and each.op != "send-done"  # what was sent may still be under way


def _ticket(each: Instruction) -> str:
    """By what the end of a transfer knows its beginning: its name, or what a send and its receive have in common."""
    shared = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', each.attributes)
    return shared[1] if shared else each.name


def _wait(program: Program, computation: str, each: Instruction, total: Played, begun: dict) -> Played:
    """Wait for the transfer that `each` ends; it is found by going back over what it reads."""
    held, waiting, seen = program.computations[computation], list(each.operands), set()
    while waiting:
        name = waiting.pop(0)
        source = held.get(name)
        ticket = _ticket(source) if source else name
        if ticket in begun:
            transfer = begun.pop(ticket)
            late = max(0.0, transfer.end - total.seconds)
            beside = transfer.sent if _done(total) > transfer.before else 0.0
            kind = "fetching" if each.op in ("copy-done", "slice-done") else "exposed"
            return Played(seconds=late, beside=beside)._replace(**{kind: late})
        if name not in seen and source and (source.op in _THROUGH or _carries(program, source)):
            waiting += source.operands
        seen.add(name)
    return Played()


def _carries(program: Program, each: Instruction) -> bool:
    """Whether this fusion carries a piece of somebody else's transfer."""
    if each.op != "fusion":
        return False
    held = program.computations[called(each, "calls")[0]].values()
    return any(hlo.CHAINED in inner.attributes for inner in held)


def _instruction(reader: Reader, computation: str, each: Instruction) -> Played:
    """Work on the device itself, and messages that it waits for."""
    found = work(reader.program, computation, each, reader.inside.__getitem__)
    total = _add(Played(flops=found.flops, unknown=found.unknown), *_awaited(reader, computation, each))
    if reader.rates is None:
        return total
    cycles = _CYCLES.search(each.attributes)
    if cycles:
        seconds = int(cycles[1]) / reader.rates.clock
        return _add(total, Played(seconds=seconds, compute=seconds))
    if "tpu_custom_call" in each.attributes:
        known = reader.program.computations[computation]
        shapes = [each.result, *(known[name].result for name in each.operands if name in known)]
        size = sum(array.entries * (array.bits or 0) / 8 for shape in shapes for array in arrays(shape))
        return _add(total, Played(seconds=size / reader.rates.memory, kernels=size / reader.rates.memory))
    return total


def _done(total: Played) -> float:
    """Something that grows with whatever is computed."""
    return total.compute + total.kernels + total.flops


def _add(*parts: Played) -> Played:
    sums = [sum(column) for column in list(zip(*parts, strict=True))[:-1]]
    return Played(*sums, unknown=tuple(dict.fromkeys(doubt for part in parts for doubt in part.unknown)))


def _times(part: Played, times: float) -> Played:
    return Played(*(times * value for value in part[:-1]), unknown=part.unknown)
