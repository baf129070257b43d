"""JSON read with its place in mind: a wrong or missing key is named with its file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perdure.errors import RunError

KINDS = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}


@dataclass(frozen=True, slots=True)
class Node:
    """A value of a JSON file and the key under which it stands, "" for the whole."""

    file: Path
    key: str
    value: Any

    def at(self, name: str) -> Node:
        """What stands under a key that must be there.

        Raises:
            RunError: the key is missing, or this is no object.
        """
        if not isinstance(self.value, Mapping):
            raise self.wrong("an object")
        if name not in self.value:
            raise RunError(f"{self.file}: the key {self._below(name)} is missing; run `perdure arena` again")
        return self.get(name)

    def get(self, name: str) -> Node:
        """What stands under a key that may be missing or null; null also below null."""
        if self.value is not None and not isinstance(self.value, Mapping):
            raise self.wrong("an object")
        return Node(self.file, self._below(name), (self.value or {}).get(name))

    def items(self) -> list[tuple[str, Node]]:
        """The entries of an object; none of null."""
        if self.value is not None and not isinstance(self.value, Mapping):
            raise self.wrong("an object")
        return [(str(key), self.get(key)) for key in self.value or {}]

    def entries(self) -> list[Node]:
        """The entries of a list."""
        if not isinstance(self.value, list | tuple):
            raise self.wrong("a list")
        return [Node(self.file, f"{self.key}[{i}]", value) for i, value in enumerate(self.value)]

    def text(self) -> str:
        """A text that is not empty."""
        if not isinstance(self.value, str) or not self.value:
            raise self.wrong("text")
        return self.value

    def whole(self) -> int:
        """A whole number, 0 or more."""
        if not isinstance(self.value, int) or isinstance(self.value, bool) or self.value < 0:
            raise self.wrong("a whole number, 0 or more")
        return self.value

    def number(self) -> float:
        """A finite number."""
        found = self.number_or_nan()
        if math.isnan(found):
            raise self.wrong("a number")
        return found

    def number_or_nan(self) -> float:
        """A finite number, or NaN for null."""
        if self.value is None:
            return math.nan
        if not isinstance(self.value, int | float) or isinstance(self.value, bool) or not math.isfinite(self.value):
            raise self.wrong("a number or null")
        return float(self.value)

    def share_or_nan(self) -> float:
        """A share of one, or NaN for null."""
        found = self.number_or_nan()
        if found < 0 or found > 1:
            raise self.wrong("a share from 0 to 1")
        return found

    def wrong(self, wanted: str) -> RunError:
        """The error that says what should stand here."""
        got = KINDS.get(type(self.value)) or f"{self.value!s:.40}"
        return RunError(f"{self.file}: {self.key or 'the file'} must be {wanted}, got {got}")

    def _below(self, name: str) -> str:
        return f"{self.key}.{name}" if self.key else name


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        RunError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RunError(f"{path}: not JSON that can be read: {reason}") from error
    if not isinstance(content, dict):
        raise Node(path, "", content).wrong("a JSON object")
    return content


def read_objects(path: Path) -> tuple[dict[str, Any], ...]:
    """The objects of a file with one a line; lines that a killed run left half written are passed over."""
    if not path.is_file():
        return ()
    found = []
    for line in path.read_text("utf-8", "replace").split("\n"):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            found.append(event)
    return tuple(found)
