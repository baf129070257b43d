"""The newest rows of each group: first in, first out."""

from __future__ import annotations

from typing import ClassVar

from perdure.errors import ConfigError
from perdure.memory.groups import GroupedBuffer


class RingBuffer(GroupedBuffer):
    """Share the room equally among groups; within a group keep the newest items.

    What is held depends on the order of the offers: within a group the oldest leaves first. A key that is offered
    again while it is held keeps its place. The order of iteration is that of the offers, oldest first.

    Args:
        capacity: rows, bytes or tokens kept at most, see `Buffer`.
        seed: of the hashes that decide between groups of one size, and of `sample`.
        by: "task", "class", the name of one of `Example.fields`, or None for one ring over everything.

    Source: Lopez-Paz and Ranzato 2017 (arXiv:1706.08840): GEM keeps the last m rows of each task; Chaudhry et al.
    2019 (arXiv:1902.10486): ring buffers.
    """

    kind: ClassVar[str] = "ring"

    def __init__(self, capacity: int | str, seed: int = 0, by: str | None = "task") -> None:
        if by is not None and (not isinstance(by, str) or not by):
            raise ConfigError(f"by must be 'task', 'class', the name of a field, or None for one ring, got {by!r}")
        super().__init__(capacity, seed, by)

    def _place(self, label: str, name: str) -> int:
        return self._offers

    def _names_in_order(self) -> list[str]:
        return [name for _, name in self._places()]
