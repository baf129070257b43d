"""Memories whose room is shared equally among groups of rows: tasks, classes, values of a field."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any

from perdure.errors import ConfigError
from perdure.memory.buffer import Buffer, name_of
from perdure.order import fingerprint, prioritiser
from perdure.types import IGNORE, Example


@dataclass(slots=True)
class _Group:
    rank: int
    used: int = 0
    # The top leaves next.
    heap: list[tuple[int, str]] = field(default_factory=list)


class GroupedBuffer(Buffer):
    """Shares its capacity equally among groups; the room that small groups leave goes to the others.

    When it overflows, the largest group gives up an item, among groups of one size the one with the highest keyed
    hash. With a capacity in rows the sizes then depend only on how many distinct rows each group offered. With a
    capacity in bytes or tokens the largest group is the one with the most of them.

    Finding the largest group takes time in proportion to the number of groups held.

    Args:
        capacity: rows, bytes or tokens kept at most, see `Buffer`.
        seed: of priorities, hashes and `sample`.
        by: what makes a group: "task", "class" (see `class_of`), the name of one of `Example.fields`, or None for
            one group of everything.
    """

    def __init__(self, capacity: int | str, seed: int = 0, by: str | None = "task") -> None:
        super().__init__(capacity, seed)
        self.by = by
        self._group_rank = prioritiser(seed, "group")
        self._groups: dict[str, _Group] = {}

    @abstractmethod
    def _place(self, label: str, name: str) -> int | None:
        """Where a new item stands in its group, the lowest leaving first; None: it may not enter."""

    def _evicted(self, label: str, place: int) -> None:
        """Take note of an item that had to leave its group."""

    def offer(self, item: Any) -> bool:
        """Consider one item; return whether it is held now.

        Raises:
            ConfigError: for an item of which the group cannot be told.
        """
        label = _label(group_of(item, self.by))
        name = name_of(item) or f"#{self._offers}"
        self._offers += 1
        if name in self._items:
            return True
        size = self._size(item)
        if size > self.limit:
            self.refused += 1
            return False
        place = self._place(label, name)
        if place is None:
            return False
        self._enter(label, place, name, item, size)
        while self.used > self.limit:
            self._evict()
        return name in self._items

    @property
    def groups(self) -> dict[Hashable, int]:
        """How many rows of each group are held; groups without any are left out."""
        counts: dict[Hashable, int] = {}
        for item in self:
            group = group_of(item, self.by)
            counts[group] = counts.get(group, 0) + 1
        return counts

    def _enter(self, label: str, place: int, name: str, item: Any, size: int) -> None:
        group = self._groups.get(label)
        if group is None:
            group = self._groups[label] = _Group(self._group_rank(label))
        heappush(group.heap, (place, name))
        group.used += size
        self._hold(name, item, size)

    def _evict(self) -> None:
        label, group = max(self._groups.items(), key=lambda entry: (entry[1].used, entry[1].rank))
        place, name = heappop(group.heap)
        group.used -= self._sizes[name]
        self._drop(name)
        if not group.heap:
            del self._groups[label]
        self._evicted(label, place)

    def _erased(self, names: set[str]) -> None:
        for label, group in list(self._groups.items()):
            group.used -= sum(self._sizes[name] for _, name in group.heap if name in names)
            group.heap = [entry for entry in group.heap if entry[1] not in names]
            heapify(group.heap)
            if not group.heap:
                del self._groups[label]

    def _places(self) -> list[tuple[int, str]]:
        return sorted(entry for group in self._groups.values() for entry in group.heap)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values. Only examples can be saved."""
        return {**super().state_dict(), "by": self.by}

    def _restore(self, state: Mapping[str, Any], items: list[Example]) -> None:
        self.__init__(state["capacity"], int(state["seed"]), state["by"])  # type: ignore[misc]
        for i, item in enumerate(items):
            # A ring needs its items in the order in which they came, below all offers to come.
            self._offers = int(state["offers"]) - len(items) + i + 1
            label, name = _label(group_of(item, self.by)), str(name_of(item))
            place = self._place(label, name)
            assert place is not None
            self._enter(label, place, name, item, self._size(item))


def group_of(item: Any, by: str | None) -> Hashable:
    """The group of an item by "task", "class", the name of a field, or None (all are one group).

    Raises:
        ConfigError: where the item has no such class or field.
    """
    if by is None:
        return None
    if by == "task":
        return getattr(item, "task", "")
    if by == "class":
        return class_of(item)
    fields = getattr(item, "fields", {})
    if by not in fields:
        raise ConfigError(
            f"by={by!r}: the row {getattr(item, 'key', item)!r} has no field {by!r}; its fields are "
            f"{', '.join(map(str, fields)) or 'none'}. Other choices: 'task', 'class'"
        )
    value: Hashable = fields[by]
    return value if isinstance(value, str | int | float | None) else _text(value)


def class_of(item: Any) -> Hashable:
    """The class of an example: what is to be answered.

    An int for a scalar integer y; for text the learnt segments together, without white space at the ends; for a
    causal-LM example that has token ids alone, the tuple of its learnt tokens (y != -100).

    Raises:
        ConfigError: for numbers to be predicted, and for examples without a target.
    """
    y = getattr(item, "y", None)
    if y is not None and (y.is_floating_point() or y.is_complex()):
        raise ConfigError(
            f"by='class': the row {item.key!r} has a target of type {str(y.dtype).removeprefix('torch.')}, and "
            "numbers to be predicted have no classes; use by='task'"
        )
    if y is not None and y.ndim == 0:
        return int(y)
    learnt = [segment.text for segment in getattr(item, "segments", ()) if segment.learn]
    if learnt:
        return "".join(learnt).strip()
    if y is None:
        raise ConfigError(
            f"by='class': the row {getattr(item, 'key', item)!r} has neither y nor text to learn; use by='task'"
        )
    return tuple(token for token in y.reshape(-1).tolist() if token != IGNORE)


def _label(group: Hashable) -> str:
    # States hold a threshold for groups of which nothing is held any more. A class can be a row's text, which must
    # be gone once the row is erased.
    return fingerprint(_text(group))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
