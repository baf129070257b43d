"""What all memories share: their size, offers and draws, erasure, saving. Knows no rule of what to keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import Any, ClassVar

from perdure.errors import ConfigError
from perdure.memory.pack import pack, unpack
from perdure.memory.size import parse_size, weigh
from perdure.order import priority
from perdure.types import Example


class Buffer(ABC):
    """Holds some of the items that were offered to it.

    An item with a `key` (an `Example`; its task counts too) is known by it: the same key offered again changes
    nothing while it is held. Any other item counts by its offer number.

    Args:
        capacity: what is held at most: a number of rows, or a size such as `"64KB"` or `"20000 tokens"` (see
            `perdure.memory.size`). A size in bytes takes `Example` items only.
        seed: of everything that is drawn.

    Attributes:
        unit: what the capacity counts: "rows", "bytes" or "tokens", which are learnt tokens.
        limit: the capacity as a number of these.
        used: how many of these are held; never above `limit`.
        draws: how many times `sample` was called; the next draw follows from it.
        refused: how many offers were larger than the whole capacity, in bytes or tokens.

    Raises:
        ConfigError: for a capacity that is none.
    """

    kind: ClassVar[str]

    def __init__(self, capacity: int | str, seed: int = 0) -> None:
        self.limit, self.unit = parse_size(capacity)
        self.capacity = self.limit if self.unit == "rows" else capacity
        self.seed = seed
        self.used = 0
        self.draws = 0
        self.refused = 0
        self._items: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._ordered: list[Any] | None = None
        self._offers = 0

    @abstractmethod
    def offer(self, item: Any) -> bool:
        """Consider one item; return whether it is held now."""

    @abstractmethod
    def _names_in_order(self) -> list[str]:
        """Names of what is held, in the order of `__iter__`."""

    @abstractmethod
    def _erased(self, names: set[str]) -> None:
        """Take these names out of whatever decides who leaves next; they are still held."""

    @abstractmethod
    def _restore(self, state: Mapping[str, Any], items: list[Example]) -> None:
        """Begin anew with the settings of a saved state, and hold its items, which come in order."""

    @property
    def seen(self) -> int:
        """How many offers were made, repeats included."""
        return self._offers

    def extend(self, items: Iterable[Any]) -> None:
        """Offer several items."""
        for item in items:
            self.offer(item)

    def sample(self, k: int, among: Sequence[Any] | None = None) -> list[Any]:
        """Draw min(k, len) items uniformly without replacement.

        A draw follows from the seed, the number of draws so far and what is drawn from, and from nothing else.

        Args:
            k: how many.
            among: drawn from these instead, a selection of what is held.
        """
        held = self._in_order() if among is None else among
        draw = Random(priority(self.seed, "sample", self.draws, key=""))
        self.draws += 1
        return draw.sample(held, min(k, len(held)))

    def erase(self, keys: Iterable[str]) -> int:
        """Drop the examples with these keys, whatever their task; return how many were held."""
        wanted = set(keys)
        gone = {name for name, item in self._items.items() if getattr(item, "key", name) in wanted}
        if gone:
            self._erased(gone)
            for name in gone:
                self._drop(name)
        return len(gone)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values. Only examples can be saved."""
        held = self._in_order()
        if not all(isinstance(item, Example) for item in held):
            raise ConfigError("only a buffer of Example items can be saved; wrap them in perdure.types.Example")
        return {
            "kind": self.kind,
            "capacity": self.capacity,
            "seed": self.seed,
            "offers": self._offers,
            "draws": self.draws,
            "refused": self.refused,
            "items": pack(held),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the buffer that was saved, its settings included.

        Raises:
            ConfigError: where the state is of another kind of buffer.
        """
        # A state without a kind is from the time when there was one kind.
        kind = state.get("kind", "reservoir")
        if kind != self.kind:
            raise ConfigError(
                f"this state is of a {kind!r} buffer and cannot go into a {self.kind!r} buffer; "
                "perdure.memory.load_buffer(state) makes the right one"
            )
        self._restore(state, unpack(state["items"]))
        self._offers = int(state["offers"])
        self.draws = int(state["draws"])
        self.refused = int(state.get("refused", 0))

    def _size(self, item: Any) -> int:
        return weigh(item, self.unit)

    def _hold(self, name: str, item: Any, size: int) -> None:
        self._items[name] = item
        self._sizes[name] = size
        self.used += size
        self._ordered = None

    def _drop(self, name: str) -> None:
        del self._items[name]
        self.used -= self._sizes.pop(name)
        self._ordered = None

    def _in_order(self) -> list[Any]:
        if self._ordered is None:
            self._ordered = [self._items[name] for name in self._names_in_order()]
        return self._ordered

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._in_order())


def name_of(item: Any) -> str | None:
    """What an item with a key is known by: task and key; None without a key."""
    key = getattr(item, "key", None)
    return None if key is None else f"{getattr(item, 'task', '')}\0{key}"
