"""How blocks of memory, each needed for a while, are laid out beside each other."""

from itertools import accumulate
from typing import NamedTuple


class Block(NamedTuple):
    """A piece of memory: its bytes, the first moment at which it is needed, the first after it, and who made it."""

    size: int
    born: int
    dead: int
    name: str


def without_guests(blocks: list[Block], places: dict[int, tuple]) -> list[Block]:
    """The blocks but for those that lie where a copied argument lay, until the result that takes its place is made.

    XLA lays out the largest first; in an argument's place never two lie at once, however small.
    """
    places, stay = sorted(places.values(), key=lambda place: place[0]), []
    for block in sorted(blocks, key=lambda block: -block.size):
        for size, taken in places:
            if size >= block.size and all(block.dead <= born or dead <= block.born for born, dead in taken):
                taken.append((block.born, block.dead))
                break
        else:
            stay.append(block)
    return stay


def packed(blocks: list[Block]) -> int:
    """Bytes of the memory in which all blocks lie.

    XLA lays out the largest first, of those the longest lived, each in the smallest gap that is free all its life.
    """
    laid: list[tuple[int, int, int, int]] = []
    total = 0
    for block in sorted(blocks, key=lambda block: (-block.size, block.born - block.dead)):
        near = sorted((at, end) for at, end, born, dead in laid if born < block.dead and block.born < dead)
        best, best_gap, top = None, None, 0
        for at, end in near:
            gap = at - top
            if gap >= block.size and (best is None or gap < best_gap):
                best, best_gap = top, gap
            top = max(top, end)
        place = top if best is None else best
        laid.append((place, place + block.size, block.born, block.dead))
        total = max(total, place + block.size)
    return total


def fullest(blocks: list[Block]) -> int:
    """The moment at which most is there."""
    return -max(((size, -when) for when, size in _sizes(blocks)), default=(0, 0))[1]


def beyond(blocks: list[Block], near: int) -> list[Block]:
    """The blocks that find no room in a small memory of so many bytes, in which the shortest lived are laid first."""
    laid: list[Block] = []
    stay = []
    for block in sorted(blocks, key=lambda block: (block.dead - block.born, block.born)):
        beside = [one for one in laid if one.born < block.dead and block.born < one.dead]
        if block.size + max((size for _, size in _sizes(beside)), default=0) <= near:
            laid.append(block)
        else:
            stay.append(block)
    return stay


def _sizes(blocks: list[Block]) -> list[tuple[int, int]]:
    """(moment, bytes that are there from then on) of each change."""
    changes = sorted([(one.born, one.size) for one in blocks] + [(one.dead, -one.size) for one in blocks])
    return list(zip((when for when, _ in changes), accumulate(more for _, more in changes), strict=True))
