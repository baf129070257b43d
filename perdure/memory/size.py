"""How large a memory may be, in rows or in bytes, and how many bytes a row takes."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from numbers import Integral
from typing import Any, Literal

from torch import Tensor

from perdure.errors import ConfigError
from perdure.types import Example

Unit = Literal["rows", "bytes"]
_UNITS = {"b": 1} | {
    f"{letter}{infix}b": base**power
    for power, letter in enumerate("kmgt", 1)
    for infix, base in (("", 1000), ("i", 1024))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)", re.ASCII | re.IGNORECASE)


def parse_size(capacity: int | str) -> tuple[int, Unit]:
    """A capacity as a number and its unit: rows for an int, bytes for a string.

    A string is a number and one of B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024), in
    any case, with or without a space: `"64KB"`, `"2 MB"`, `"1.5MiB"`. What is left of a byte is cut off.

    Raises:
        ConfigError: for anything else, or less than one row or byte.
    """
    limit: int
    unit: Unit
    if isinstance(capacity, Integral) and not isinstance(capacity, bool):
        limit, unit = int(capacity), "rows"
    else:
        found = _SIZE.fullmatch(capacity.strip()) if isinstance(capacity, str) else None
        if found is None or found[2].lower() not in _UNITS:
            raise ConfigError(
                "capacity must be a whole number of rows such as 1000, or a size such as '64KB', '2 MB' or '1MiB' "
                f"(in a run also a share of the rows such as '5%'), got {capacity!r}"
            )
        limit, unit = int(Fraction(found[1]) * _UNITS[found[2].lower()]), "bytes"
    if limit < 1:
        raise ConfigError(f"capacity must be at least 1{' byte' if unit == 'bytes' else ''}, got {capacity!r}")
    return limit, unit


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
