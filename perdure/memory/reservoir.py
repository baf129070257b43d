"""A reservoir: a uniform sample of everything offered, kept by keyed priority."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from heapq import heappop, heappush
from typing import Any, ClassVar

from perdure.errors import ConfigError
from perdure.memory.buffer import Buffer, name_of
from perdure.order import SPAN, prioritiser
from perdure.types import Example


class ReservoirBuffer(Buffer):
    """Keep the items with the smallest keyed priorities, out of all that were offered.

    The sample is uniform over distinct keys, does not depend on the order of the offers, and costs O(log capacity)
    an offer. Two buffers of one seed that saw two halves of a stream hold together what one buffer would. An item
    with a key gets one draw, however often it is offered.

    With a capacity in bytes or tokens the items are taken by priority up to the first that does not fit. That one
    is more often a large one than a small one, so that large rows are kept a little less often.

    Args:
        capacity: rows, bytes or tokens kept at most, see `Buffer`.
        seed: of the priorities and of `sample`.
    """

    kind: ClassVar[str] = "reservoir"

    def __init__(self, capacity: int | str, seed: int = 0) -> None:
        super().__init__(capacity, seed)
        self._rank = prioritiser(seed, "reservoir")
        # A max-heap by negated priority: its top is the item that leaves next.
        self._heap: list[tuple[int, str]] = []
        self._threshold = SPAN

    def offer(self, item: Any) -> bool:
        """Consider one item; return whether it is held now."""
        name = name_of(item) or f"#{self._offers}"
        self._offers += 1
        if name in self._items:
            return True
        size = self._size(item)
        if size > self.limit:
            self.refused += 1
            return False
        rank = self._rank(name)
        if rank >= self._threshold:
            return False
        heappush(self._heap, (-rank, name))
        self._hold(name, item, size)
        self._shrink()
        return name in self._items

    def erase(self, keys: Iterable[str]) -> int:
        """Drop the examples with these keys, whatever their task; return how many were held.

        The threshold stays, so that later offers are not favoured by the room that is made.
        """
        return super().erase(keys)

    def merge(self, other: ReservoirBuffer) -> None:
        """Take in another buffer of the same seed; both halves of a stream together equal one pass over it."""
        if other.seed != self.seed:
            raise ConfigError(f"only buffers of one seed can be merged, got seeds {self.seed} and {other.seed}")
        if any("\0" not in name for name in (*self._items, *other._items)):
            raise ConfigError("only items with a key can be merged: offer numbers of two buffers do not compare")
        sizes = {name: self._size(item) for name, item in other._items.items() if name not in self._items}
        self._offers += other._offers
        self.refused += other.refused
        self._threshold = min(self._threshold, other._threshold)
        for name, size in sizes.items():
            if size > self.limit:
                self.refused += 1
                continue
            heappush(self._heap, (-self._rank(name), name))
            self._hold(name, other._items[name], size)
        while self._heap and -self._heap[0][0] >= self._threshold:
            self._drop(heappop(self._heap)[1])
        self._shrink()

    def _shrink(self) -> None:
        while self.used > self.limit:
            worst, evicted = heappop(self._heap)
            self._drop(evicted)
            # Nothing at or above a priority that once had to leave may enter later, even after an erasure made
            # room: else rows that arrive late would be favoured.
            self._threshold = -worst

    def _names_in_order(self) -> list[str]:
        # Rank order is canonical: it does not depend on the order of the offers.
        return [name for _, name in sorted(self._heap, reverse=True)]

    def _erased(self, names: set[str]) -> None:
        self._heap = sorted(entry for entry in self._heap if entry[1] not in names)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values. Only examples can be saved."""
        return {**super().state_dict(), "threshold": str(self._threshold)}

    def _restore(self, state: Mapping[str, Any], items: list[Example]) -> None:
        self.__init__(state["capacity"], int(state["seed"]))  # type: ignore[misc]
        for item in items:
            name = str(name_of(item))
            self._hold(name, item, self._size(item))
            heappush(self._heap, (-self._rank(name), name))
        self._threshold = int(state["threshold"])
