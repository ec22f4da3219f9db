"""Which devices talk to each other in a collective of a compiled program, and along which mesh axes."""

import re
from collections import defaultdict
from math import prod

from jaxpar.report.hlo_text import Instruction, Program

_LISTS = re.compile(r"(replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")


def label(groups: list[list[int]], axes: dict[str, int], kind: str) -> str:
    """The axes along which members of a group differ; `?` if the groups are not just those that these axes make."""
    digits, devices = _digits(axes), prod(axes.values())
    varied = []
    for name, (stride, size) in digits.items():
        if any(len({member // stride % size for member in group}) > 1 for group in groups):
            varied.append(name)
    if kind == "permute":
        return "+".join(varied) if max(map(max, groups)) < devices else "?"
    expected = _groups_along(devices, [digits[name] for name in varied])
    return "+".join(varied) if set(map(frozenset, groups)) == set(map(frozenset, expected)) else "?"


def groups(program: Program, instruction: Instruction) -> list[list[int]] | None:
    """Devices that talk to each other: replica groups, or the pairs of a permute; None if they cannot be read.

    Groups are printed as `{{0,1},{2,3}}` (`{}`: all devices in one), as `[2,2]<=[4]` with an optional transpose
    `T(1,0)`, or as `mesh['a'=2,'b'=2] {'b'}`, where `'b':(2)4` would be a part of an axis.
    """
    lists, iota, mesh = (way.search(instruction.attributes) for way in (_LISTS, _IOTA, _MESH))
    if lists:
        groups = [list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", lists[2])]
        if not groups and lists[1] == "replica_groups":
            return [list(range(program.replicas * program.partitions))]
    elif iota:
        ids, size = _transposed(iota[2]), int(iota[1].split(",")[-1])
        groups = [ids[first : first + size] for first in range(0, len(ids), size)]
    elif mesh:
        groups = _mesh_groups(*mesh.groups())
    else:
        return None
    return _as_devices(program, instruction, groups)


def _as_devices(program: Program, instruction: Instruction, groups: list[list[int]]) -> list[list[int]]:
    """Groups that, by the rules of XLA, may be printed in numbers of replicas or of partitions, in those of devices."""
    replicas, partitions = range(program.replicas), range(program.partitions)
    if "use_global_device_ids=true" in instruction.attributes:
        return groups
    if "channel_id=" not in instruction.attributes:
        return [[replica * len(partitions) + own for replica in group] for own in partitions for group in groups]
    if instruction.op.startswith(("all-to-all", "collective-")):
        return [[own * len(partitions) + partition for partition in group] for own in replicas for group in groups]
    return [[replica * len(partitions) + each for replica in group for each in partitions] for group in groups]


def _mesh_groups(mesh: str, ids: str | None, chosen: str) -> list[list[int]]:
    axes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", mesh)}
    digits = []
    for name, before, part in re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", chosen):
        stride, size = _digits(axes)[name]
        digits.append((stride * size // (int(before) * int(part)), int(part)) if part else (stride, size))
    groups = _groups_along(prod(axes.values()), digits)
    if ids is None:
        return groups
    devices = _transposed(ids) if ids.startswith("[") else list(map(int, re.findall(r"\d+", ids)))
    return [[devices[place] for place in group] for group in groups]


def _transposed(text: str) -> list[int]:
    """`[2,4]T(1,0)`: 0 to 7 as a 2 by 4 array, transposed, flat."""
    dims, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    digits = list(_digits(dict(enumerate(map(int, dims.split(","))))).values())
    ids = [0]
    for stride, size in [digits[int(dim)] for dim in order.split(",")] if order else digits:
        ids = [first + step * stride for first in ids for step in range(size)]
    return ids


def _digits(axes: dict) -> dict:
    """(stride, size) of each axis in the number of a device, for axes from major to minor."""
    sizes = list(axes.values())
    return {name: (prod(sizes[place + 1 :]), size) for place, (name, size) in enumerate(axes.items())}


def _groups_along(devices: int, digits: list[tuple[int, int]]) -> list[list[int]]:
    """All devices, in groups whose members differ in nothing but the digits of these (stride, size)."""
    groups = defaultdict(list)
    for device in range(devices):
        groups[device - sum(device // stride % size * stride for stride, size in digits)].append(device)
    return list(groups.values())
