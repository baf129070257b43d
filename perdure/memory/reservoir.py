"""A reservoir: a uniform sample of everything offered, kept by keyed priority."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from heapq import heappop, heappush
from random import Random
from typing import Any

from perdure.errors import ConfigError
from perdure.memory.pack import pack, unpack
from perdure.order import SPAN, prioritiser, priority
from perdure.types import Example


class ReservoirBuffer:
    """Keep the `capacity` items with the smallest keyed priorities, out of all that were offered.

    The sample is uniform over distinct keys, does not depend on the order of the offers, and costs O(log capacity)
    an offer. Two buffers of one seed that saw two halves of a stream hold together what one buffer would.

    An item with a `key` (an `Example`; its task counts too) is known by it: the same key offered again changes
    nothing while it is held, and gets no second draw. Any other item counts by its offer number.

    Args:
        capacity: items kept at most, at least 1.
        seed: of the priorities and of `sample`.

    Attributes:
        draws: how many times `sample` was called; the next draw follows from it.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.seed = seed
        self._rank = prioritiser(seed, "reservoir")
        # A max-heap by negated priority: its top is the item that leaves next.
        self._heap: list[tuple[int, str]] = []
        self._items: dict[str, Any] = {}
        self._ordered: list[Any] | None = None
        self._threshold = SPAN
        self._offers = 0
        self.draws = 0

    @property
    def seen(self) -> int:
        """How many offers were made, repeats included."""
        return self._offers

    def offer(self, item: Any) -> bool:
        """Consider one item; return whether it is held now."""
        name = _name(item) or f"#{self._offers}"
        self._offers += 1
        if name in self._items:
            return True
        rank = self._rank(name)
        if rank >= self._threshold:
            return False
        heappush(self._heap, (-rank, name))
        self._items[name] = item
        self._ordered = None
        if len(self._heap) > self.capacity:
            worst, evicted = heappop(self._heap)
            del self._items[evicted]
            # Nothing at or above a priority that once had to leave may enter later, even after an erasure made
            # room: else rows that arrive late would be favoured.
            self._threshold = -worst
            return evicted != name
        return True

    def extend(self, items: Iterable[Any]) -> None:
        """Offer several items."""
        for item in items:
            self.offer(item)

    def sample(self, k: int) -> list[Any]:
        """Draw min(k, len) items uniformly without replacement.

        A draw follows from the seed, the number of draws so far and what is held, and from nothing else.
        """
        held = self._in_order()
        draw = Random(priority(self.seed, "sample", self.draws, key=""))
        self.draws += 1
        return draw.sample(held, min(k, len(held)))

    def erase(self, keys: Iterable[str]) -> int:
        """Drop the examples with these keys, whatever their task; return how many were held.

        The threshold stays, so that later offers are not favoured by the room that is made.
        """
        wanted = set(keys)
        gone = {name for name, item in self._items.items() if getattr(item, "key", name) in wanted}
        if gone:
            self._heap = sorted(entry for entry in self._heap if entry[1] not in gone)
            for name in gone:
                del self._items[name]
            self._ordered = None
        return len(gone)

    def merge(self, other: ReservoirBuffer) -> None:
        """Take in another buffer of the same seed; both halves of a stream together equal one pass over it."""
        if other.seed != self.seed:
            raise ConfigError(f"only buffers of one seed can be merged, got seeds {self.seed} and {other.seed}")
        if any("\0" not in name for name in (*self._items, *other._items)):
            raise ConfigError("only items with a key can be merged: offer numbers of two buffers do not compare")
        self._offers += other._offers
        self._threshold = min(self._threshold, other._threshold)
        for name, item in other._items.items():
            if name not in self._items:
                heappush(self._heap, (-self._rank(name), name))
                self._items[name] = item
        self._ordered = None
        while self._heap and (len(self._heap) > self.capacity or -self._heap[0][0] >= self._threshold):
            worst, evicted = heappop(self._heap)
            del self._items[evicted]
            self._threshold = min(self._threshold, -worst)

    def _in_order(self) -> list[Any]:
        if self._ordered is None:
            # Rank order is canonical: it does not depend on the order of the offers.
            self._ordered = [self._items[name] for _, name in sorted(self._heap, reverse=True)]
        return self._ordered

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._in_order())

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values. Only examples can be saved."""
        held = self._in_order()
        if not all(isinstance(item, Example) for item in held):
            raise ConfigError("only a buffer of Example items can be saved; wrap them in perdure.types.Example")
        return {
            "capacity": self.capacity,
            "seed": self.seed,
            "threshold": str(self._threshold),
            "offers": self._offers,
            "draws": self.draws,
            "items": pack(held),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the buffer that was saved."""
        self.__init__(int(state["capacity"]), int(state["seed"]))  # type: ignore[misc]
        for item in unpack(state["items"]):
            name = str(_name(item))
            self._items[name] = item
            heappush(self._heap, (-self._rank(name), name))
        self._threshold = int(state["threshold"])
        self._offers = int(state["offers"])
        self.draws = int(state["draws"])


def _name(item: Any) -> str | None:
    key = getattr(item, "key", None)
    return None if key is None else f"{getattr(item, 'task', '')}\0{key}"
