"""Experience replay: a few kept rows of earlier tasks are trained on beside the new ones."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

from perdure.errors import StrategyError
from perdure.memory import ReservoirBuffer
from perdure.strategies.base import Strategy
from perdure.types import TASK, Context, Example


class Replay(Strategy):
    """Add `ratio` kept rows for each new row; the memory takes in a task's rows when the task ends.

    The loss is the mean over all targets of the step, new and replayed alike. With a fractional ratio the number of
    replayed rows is exact over every stretch of steps, to within one row: after n new rows ⌊ratio·n⌋ were replayed.

    Args:
        buffer: what keeps the rows; None makes a reservoir of `capacity` rows from the run's seed.
        ratio: replayed rows per new row, above 0.
        capacity: rows kept, where no buffer is given.

    Source: Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning" (arXiv:1902.10486).
    """

    name: ClassVar[str] = "replay"
    summary: ClassVar[str] = "kept rows of earlier tasks are trained on beside the new ones (needs a memory)"

    def __init__(self, buffer: ReservoirBuffer | None = None, ratio: float = 1.0, capacity: int = 1000) -> None:
        if not ratio > 0 or ratio == float("inf"):
            raise StrategyError(
                f"replay: ratio (replayed rows per new row) must be positive and finite, got {ratio}"
            )
        if not isinstance(capacity, int):
            raise StrategyError(
                f"replay: capacity must be a whole number of rows, got {capacity!r}; a share needs a run, "
                "which knows how many rows there are"
            )
        if capacity < 1:
            raise StrategyError(f"replay: capacity must be at least 1 row, got {capacity}")
        self.buffer = buffer
        self.ratio = ratio
        self.capacity = capacity
        # 0.29 as a float times 100 is below 29; the decimal that was written is meant.
        self._exact_ratio = Fraction(repr(float(ratio)))
        self._new_rows = 0
        self._owed = 0

    def prepare(self, ctx: Context) -> None:
        """Make the memory on the first task; count rows afresh on each."""
        if self.buffer is None:
            self.buffer = ReservoirBuffer(self.capacity, seed=ctx.seed)
        self._new_rows = self._owed = 0

    def mix(self, ctx: Context, examples: list[Example]) -> list[Example]:
        """The new rows, followed by what is replayed with them."""
        if not self.buffer:
            return examples
        self._new_rows += sum(example.source == TASK for example in examples)
        total = int(self._exact_ratio * self._new_rows)
        wanted, self._owed = total - self._owed, total
        replayed: list[Example] = []
        while wanted > 0:
            # A memory smaller than what one step wants is gone through more than once.
            drawn = self.buffer.sample(wanted)
            replayed += [example.but(source=self.name) for example in drawn]
            wanted -= len(drawn)
        return [*examples, *replayed]

    def bookmark(self) -> tuple[int, int, int]:
        """The row counts and the number of draws."""
        return self._new_rows, self._owed, self.buffer.draws if self.buffer is not None else 0

    def turn_back(self, bookmark: tuple[int, int, int]) -> None:
        """Count as before."""
        self._new_rows, self._owed, draws = bookmark
        if self.buffer is not None:
            self.buffer.draws = draws

    def after_task(self, ctx: Context) -> None:
        """Offer the task's rows to the memory."""
        assert self.buffer is not None
        self.buffer.extend(ctx.task.train)

    def state_dict(self) -> dict[str, Any]:
        """The memory and the row counts."""
        return {
            "buffer": None if self.buffer is None else self.buffer.state_dict(),
            "new_rows": self._new_rows,
            "owed": self._owed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the memory and the row counts."""
        if state["buffer"] is not None:
            if self.buffer is None:
                self.buffer = ReservoirBuffer(self.capacity)
            self.buffer.load_state_dict(state["buffer"])
        self._new_rows, self._owed = state["new_rows"], state["owed"]
