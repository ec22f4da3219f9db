"""Rows of words as aligned text."""

from collections.abc import Sequence


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """A line for `head` and one per row, each column as wide as its longest word.

    Args:
        head: names of the columns.
        rows: a word per column each.
        right: names of the columns that are aligned right, as numbers are.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(row):
        pairs = zip(head, row, widths, strict=True)
        return "  ".join(word.rjust(width) if name in right else word.ljust(width) for name, word, width in pairs)

    return "\n".join(line(row).rstrip() for row in (head, *rows))
