"""What a policy chose first stays longest: a prefix of each task's order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from perdure.errors import ConfigError
from perdure.memory.groups import GroupedBuffer
from perdure.types import Example


class RankedBuffer(GroupedBuffer):
    """Share the room equally among groups; within a group keep the items that were offered first.

    Offered in the order of a policy (`perdure.memory.order`), what is held of each group is a prefix of that order,
    in bytes and tokens too: a group that had to give up an item takes none that is offered later, also after an
    erasure. Only an item larger than the whole memory is passed over. The order of iteration is that of the offers.

    Args:
        capacity: rows, bytes or tokens kept at most, see `Buffer`.
        seed: of the hashes that decide between groups of one size, and of `sample`.
        by: "task", "class" or the name of one of `Example.fields`.
    """

    kind: ClassVar[str] = "ranked"

    def __init__(self, capacity: int | str, seed: int = 0, by: str = "task") -> None:
        if not isinstance(by, str) or not by:
            raise ConfigError(f"by must be 'task', 'class' or the name of a field, got {by!r}")
        super().__init__(capacity, seed, by)
        self._closed: set[str] = set()

    def _place(self, label: str, name: str) -> int | None:
        return None if label in self._closed else -self._offers

    def _evicted(self, label: str, place: int) -> None:
        if label in self._groups:  # a row that is too large for its group's room is passed over, not the group
            self._closed.add(label)

    def _names_in_order(self) -> list[str]:
        return [name for _, name in reversed(self._places())]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values. Only examples can be saved."""
        return {**super().state_dict(), "closed": sorted(self._closed)}

    def _restore(self, state: Mapping[str, Any], items: list[Example]) -> None:
        super()._restore(state, items)
        self._closed = set(state["closed"])
