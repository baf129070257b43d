"""Rows in parts that go through the model together, small enough to have room."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from perdure.types import Example

ROWS, TOKENS = 32, 4096


def parts(rows: Sequence[Example]) -> Iterator[list[Example]]:
    """The rows in their order, in parts of up to ROWS of them, and of up to TOKENS with the padding.

    A longer row goes alone.
    """
    part: list[Example] = []
    longest = 0
    for row in rows:
        longest = max(longest, length(row))
        if part and (len(part) == ROWS or longest * (len(part) + 1) > TOKENS):
            yield part
            part, longest = [], length(row)
        part.append(row)
    if part:
        yield part


def length(row: Example) -> int:
    """How long a row is: its tokens, or the first side of its x."""
    return 1 if row.x is None or row.x.dim() == 0 else len(row.x)
