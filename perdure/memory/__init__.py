"""Memory: which past examples are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perdure.errors import ConfigError, unknown_name
from perdure.memory.balanced import BalancedBuffer
from perdure.memory.buffer import Buffer
from perdure.memory.ranked import RankedBuffer
from perdure.memory.reservoir import ReservoirBuffer
from perdure.memory.ring import RingBuffer
from perdure.memory.select import POLICIES, order

__all__ = [
    "BUFFERS",
    "POLICIES",
    "BalancedBuffer",
    "Buffer",
    "RankedBuffer",
    "ReservoirBuffer",
    "RingBuffer",
    "load_buffer",
    "make_buffer",
    "order",
]

BUFFERS: dict[str, str] = {
    "reservoir": "a uniform sample of all rows",
    "balanced": "equal room for each task; a uniform sample of its rows",
    "class-balanced": "equal room for each class or answer; a uniform sample of its rows",
    "ring": "equal room for each task; its newest rows",
}
"""What each kind of memory keeps, by its name in settings."""


def make_buffer(kind: str, capacity: int | str, seed: int = 0) -> Buffer:
    """A buffer by its name in `BUFFERS`.

    Args:
        kind: the name.
        capacity: rows kept at most, or a size such as "64KB" or "20000 tokens".
        seed: of everything that is drawn.

    Raises:
        ConfigError: for an unknown kind or a bad capacity.
    """
    match kind:
        case "reservoir":
            return ReservoirBuffer(capacity, seed)
        case "balanced":
            return BalancedBuffer(capacity, seed)
        case "class-balanced":
            return BalancedBuffer(capacity, seed, by="class")
        case "ring":
            return RingBuffer(capacity, seed)
    raise ConfigError(unknown_name("memory", str(kind), BUFFERS))


def load_buffer(state: Mapping[str, Any]) -> Buffer:
    """The buffer that `state_dict` saved, of the right kind; a state without a kind is a reservoir.

    Raises:
        ConfigError: for a kind that does not exist here.
    """
    made: dict[str, type[Buffer]] = {
        cls.kind: cls for cls in (ReservoirBuffer, BalancedBuffer, RingBuffer, RankedBuffer)
    }
    kind = state.get("kind", ReservoirBuffer.kind)
    if kind not in made:
        raise ConfigError(unknown_name("memory", str(kind), made))
    buffer = made[kind](1)
    buffer.load_state_dict(state)
    return buffer
