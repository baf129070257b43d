"""Equal shares for all groups, and in each group a uniform sample of what it offered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from perdure.errors import ConfigError
from perdure.memory.groups import GroupedBuffer
from perdure.order import SPAN, prioritiser
from perdure.types import Example


class BalancedBuffer(GroupedBuffer):
    """Share the room equally among groups; within a group keep the smallest keyed priorities.

    What is held is, for each group, a uniform sample of its distinct keys. With a capacity in rows it does not
    depend on the order of the offers: it is the first `capacity` of all rows, sorted by their place in their own
    group and then by the group's hash. With a capacity in bytes or tokens and rows of unequal sizes
    another order of the offers can leave other rows; the same order leaves the same.

    A group that had to give up a row takes no row of that priority or above later, also after an erasure, or rows
    that arrive late would be favoured. One number is remembered for each such group.

    Args:
        capacity: rows, bytes or tokens kept at most, see `Buffer`.
        seed: of the priorities and of `sample`.
        by: "task", "class" (see `perdure.memory.groups.class_of`) or the name of one of `Example.fields`.

    Source: the largest class gives way as in Prabhu et al. 2020, "GDumb"; which of its rows, by keyed priority
    in place of a draw.
    """

    kind: ClassVar[str] = "balanced"

    def __init__(self, capacity: int | str, seed: int = 0, by: str = "task") -> None:
        if not isinstance(by, str) or not by:
            raise ConfigError(
                f"by must be 'task', 'class' or the name of a field, got {by!r}; without groups a "
                "balanced buffer is a ReservoirBuffer"
            )
        super().__init__(capacity, seed, by)
        self._rank = prioritiser(seed, "balanced")
        self._thresholds: dict[str, int] = {}

    def _place(self, label: str, name: str) -> int | None:
        rank = self._rank(name)
        return None if rank >= self._thresholds.get(label, SPAN) else -rank

    def _evicted(self, label: str, place: int) -> None:
        self._thresholds[label] = -place

    def _names_in_order(self) -> list[str]:
        return [name for _, name in reversed(self._places())]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values. Only examples can be saved."""
        thresholds = {label: str(self._thresholds[label]) for label in sorted(self._thresholds)}
        return {**super().state_dict(), "thresholds": thresholds}

    def _restore(self, state: Mapping[str, Any], items: list[Example]) -> None:
        super()._restore(state, items)
        self._thresholds = {label: int(value) for label, value in state["thresholds"].items()}
