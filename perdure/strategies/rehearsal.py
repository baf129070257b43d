"""What strategies with a memory of rows share: the memory, and an exact share of its rows in every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

from torch import nn

from perdure.errors import ConfigError, StrategyError
from perdure.memory import Buffer, ReservoirBuffer, load_buffer, make_buffer
from perdure.memory.groups import class_of
from perdure.memory.size import nbytes
from perdure.models.objectives import count_targets
from perdure.strategies.base import Strategy
from perdure.types import TASK, Context, Example, Objective

Memory = Literal["reservoir", "balanced", "class-balanced", "ring"]
Unit = Literal["examples", "tokens"]


class Quota:
    """How much of the memory goes into each step, so that the sum over steps is exact.

    In examples, ⌊ratio · n⌋ rows were drawn after n new ones. In tokens (targets), rows are drawn as long as fewer
    than ratio · n targets were, so that the sum is at most one row ahead; no row is passed over for its length.

    Args:
        ratio: above 0; counts as the decimal that is written.
        unit: "examples" or "tokens".
    """

    def __init__(self, ratio: float, unit: Unit = "examples") -> None:
        # 0.29 as a float times 100 is below 29; the decimal that was written is meant.
        self._ratio = Fraction(repr(float(ratio)))
        self._unit = unit
        self.new = 0
        self.drawn = 0

    def draw(self, buffer: Buffer, new: Sequence[Example], count: Callable[[Example], int]) -> list[Example]:
        """What goes with these new rows.

        Args:
            buffer: drawn from; a memory smaller than what one step wants is gone through more than once.
            new: new rows of a step.
            count: how many targets a row holds.
        """
        rows: list[Example] = []
        if self._unit == "examples":
            self.new += len(new)
            while len(rows) < int(self._ratio * self.new) - self.drawn:
                rows += buffer.sample(int(self._ratio * self.new) - self.drawn - len(rows))
            self.drawn += len(rows)
            return rows
        self.new += sum(map(count, new))
        while self.drawn < self._ratio * self.new:
            for row in buffer.sample(max(len(new), 1)):
                if self.drawn >= self._ratio * self.new:
                    break
                rows.append(row)
                self.drawn += max(count(row), 1)  # a row that teaches nothing must not be drawn without end
        return rows

    def state(self) -> list[int]:
        """The two counts."""
        return [self.new, self.drawn]

    def restore(self, state: Sequence[int]) -> None:
        """Count as then."""
        self.new, self.drawn = state


class Rehearsal(Strategy):
    """A strategy with a memory that takes in a task's rows when the task ends.

    Args:
        buffer: what keeps the rows; None makes one of `memory` and `capacity` from the run's seed.
        ratio: drawn per new row (or token), above 0.
        capacity: rows kept, or a size such as "2MB".
        memory: "reservoir", "balanced" (by task), "class-balanced" or "ring" (the newest of each task).
        unit: what `ratio` counts: "examples", or "tokens", which are targets.
        quotas: how many separate draws a step takes.
    """

    def __init__(
        self,
        buffer: Buffer | None,
        ratio: float,
        capacity: int | str,
        memory: Memory,
        unit: Unit,
        quotas: int = 1,
    ) -> None:
        name = self.name
        if not ratio > 0 or ratio == float("inf"):
            raise StrategyError(
                f"{name}: ratio (replayed rows per new row) must be positive and finite, got {ratio}"
            )
        if isinstance(capacity, bool) or not isinstance(capacity, int | str) or str(capacity).strip().endswith("%"):
            raise StrategyError(
                f'{name}: capacity must be a whole number of rows or a size such as "2MB", got {capacity!r}; a '
                "share needs a run, which knows how many rows there are"
            )
        if isinstance(capacity, int) and capacity < 1:
            raise StrategyError(f"{name}: capacity must be at least 1 row, got {capacity}")
        if unit not in ("examples", "tokens"):
            raise StrategyError(f'{name}: unit must be "examples" or "tokens", got {unit!r}')
        try:
            make_buffer(memory, capacity, 0)
        except ConfigError as error:  # before any training
            raise StrategyError(f"{name}: {error}") from error
        self.buffer = buffer
        self.ratio = ratio
        self.capacity = capacity if buffer is None else buffer.capacity
        self.memory = memory if buffer is None else buffer.kind
        self.unit = unit
        self._quotas = [Quota(ratio, unit) for _ in range(quotas)]

    def check(self, model: nn.Module, objective: Objective) -> None:
        """A regression has no classes to balance."""
        by = self.memory if self.buffer is None else getattr(self.buffer, "by", None)
        if objective == "regression" and by in ("class-balanced", "class"):
            raise StrategyError(
                f"{self.name}: a class-balanced memory needs classes, and a regression has none; use memory "
                '"balanced"'
            )

    def prepare(self, ctx: Context) -> None:
        """Make the memory on the first task; count afresh on each."""
        if self.buffer is None:
            self.buffer = make_buffer(self.memory, self.capacity, ctx.seed)
        for quota in self._quotas:
            quota.restore((0, 0))
        self._refuse_what_holds_nothing(self.buffer, ctx.task.train)
        if getattr(self.buffer, "by", None) == "class" and ctx.task.train:
            try:
                class_of(ctx.task.train[0])
            except ConfigError as error:  # now, and not when the task has been trained
                raise StrategyError(f"{self.name}: {error}") from error

    def _refuse_what_holds_nothing(self, buffer: Buffer, rows: Sequence[Example]) -> None:
        if isinstance(buffer.capacity, str) and rows:
            smallest = min(map(nbytes, rows))
            if smallest > buffer.limit:
                raise StrategyError(
                    f"{self.name}: a memory of {buffer.capacity} holds no row of task {rows[0].task!r}, of which "
                    f"the smallest takes {smallest:,} bytes; give a larger capacity"
                )

    def draw(self, ctx: Context, examples: Sequence[Example], quota: int = 0) -> list[Example]:
        """Kept rows for a step with these rows; none before there are any."""
        if not self.buffer:
            return []
        new = [example for example in examples if example.source == TASK]
        return self._quotas[quota].draw(self.buffer, new, lambda row: count_targets(row, ctx.objective))

    def bookmark(self) -> Any:
        """The counts and the number of draws."""
        return [quota.state() for quota in self._quotas], self.buffer.draws if self.buffer is not None else 0

    def turn_back(self, bookmark: Any) -> None:
        """Count as before."""
        counts, draws = bookmark
        for quota, state in zip(self._quotas, counts, strict=True):
            quota.restore(state)
        if self.buffer is not None:
            self.buffer.draws = draws

    def after_task(self, ctx: Context) -> None:
        """Offer the task's rows to the memory."""
        assert self.buffer is not None
        self.buffer.extend(ctx.task.train)

    def kept(self) -> int:
        """Rows in the memory."""
        return 0 if self.buffer is None else len(self.buffer)

    def state_dict(self) -> dict[str, Any]:
        """The memory and the counts."""
        return {
            "buffer": None if self.buffer is None else self.buffer.state_dict(),
            "counts": [quota.state() for quota in self._quotas],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the memory and the counts."""
        saved = state["buffer"]
        if (
            self.buffer is not None
            and saved is not None
            and saved.get("kind", ReservoirBuffer.kind) == self.buffer.kind
        ):
            self.buffer.load_state_dict(saved)  # a buffer of the user's own stays the object that it is
        else:
            self.buffer = None if saved is None else load_buffer(saved)
        # Older states name the two counts.
        found = state["counts"] if "counts" in state else [[state["new_rows"], state["owed"]]]
        for quota, counts in zip(self._quotas, found, strict=True):
            quota.restore(counts)
