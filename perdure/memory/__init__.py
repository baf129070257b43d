"""Memory: which past examples are kept."""

from perdure.memory.reservoir import ReservoirBuffer

__all__ = ["ReservoirBuffer"]
