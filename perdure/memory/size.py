"""How large a memory may be, in rows, bytes or tokens, and how much of it a row takes."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from numbers import Integral
from typing import Any, Literal

from torch import Tensor

from perdure.errors import ConfigError
from perdure.types import IGNORE, Example

Unit = Literal["rows", "bytes", "tokens"]
_TOKENS = "tokens"
_UNITS = {"b": 1, _TOKENS: 1} | {
    f"{letter}{infix}b": base**power
    for power, letter in enumerate("kmgt", 1)
    for infix, base in (("", 1000), ("i", 1024))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)", re.ASCII | re.IGNORECASE)


def parse_size(capacity: int | str) -> tuple[int, Unit]:
    """A capacity as a number and its unit: rows for an int, bytes or tokens for a string.

    A string is a number and one of B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024) or
    tokens, in any case, with or without a space: `"64KB"`, `"2 MB"`, `"1.5MiB"`, `"20000 tokens"`. What is left of
    a byte or a token is cut off.

    Raises:
        ConfigError: for anything else, or less than one row, byte or token.
    """
    limit: int
    unit: Unit
    if isinstance(capacity, Integral) and not isinstance(capacity, bool):
        limit, unit = int(capacity), "rows"
    else:
        found = _SIZE.fullmatch(capacity.strip()) if isinstance(capacity, str) else None
        if found is None or found[2].lower() not in _UNITS:
            raise ConfigError(
                "capacity must be a whole number of rows such as 1000, or a size such as '64KB', '2 MB', '1MiB' "
                f"or '20000 tokens' (in a run also a share of the rows such as '5%'), got {capacity!r}"
            )
        name = found[2].lower()
        limit, unit = int(Fraction(found[1]) * _UNITS[name]), "tokens" if name == _TOKENS else "bytes"
    if limit < 1:
        one = {"rows": "", "bytes": " byte", "tokens": " token"}[unit]
        raise ConfigError(f"capacity must be at least 1{one}, got {capacity!r}")
    return limit, unit


def weigh(item: Any, unit: Unit) -> int:
    """How much of a memory of this unit an item takes: 1, its bytes, or its learnt tokens, which count 1 at least.

    Raises:
        ConfigError: for bytes of anything but an `Example`.
    """
    if unit == "rows":
        return 1
    return nbytes(item) if unit == "bytes" else max(1, count_tokens(item))


def count_tokens(item: Any) -> int:
    """Learnt tokens of a causal-LM row, by its labels y, int64 [T]; an item without token labels counts 1."""
    y = getattr(item, "y", None)
    if not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point():
        return 1
    return int((y[1:] != IGNORE).sum())


def nbytes(item: Any) -> int:
    """Bytes that an example takes in a memory.

    The sum of the elements of its tensors (x, y, extras), of its segments' text and its key in UTF-8, and of its
    fields, and of extras that are no tensors, as JSON. What Python adds to this is not counted.

    Raises:
        ConfigError: for anything but an `Example`.
    """
    if not isinstance(item, Example):
        raise ConfigError(
            f"only Example items have a size in bytes, got {type(item).__name__}; give the capacity in rows, or "
            "wrap the items in perdure.types.Example"
        )
    total = _text(item.key) + sum(_text(segment.text) for segment in item.segments)
    for value in (item.x, item.y):
        if value is not None:
            total += value.nbytes
    for value in item.extras.values():
        total += value.nbytes if isinstance(value, Tensor) else _text(json.dumps(value, default=str))
    if item.fields:
        total += _text(json.dumps(dict(item.fields), ensure_ascii=False, default=str))
    return total


def _text(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
