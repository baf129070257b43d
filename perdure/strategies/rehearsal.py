"""What strategies with a memory of rows share: the memory, and which of its rows go into every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from perdure.errors import ConfigError, StrategyError
from perdure.memory import Buffer, RankedBuffer, ReservoirBuffer, load_buffer, make_buffer
from perdure.memory.buffer import name_of
from perdure.memory.groups import class_of
from perdure.memory.size import weigh
from perdure.models.objectives import count_targets
from perdure.strategies.base import Strategy
from perdure.strategies.measure import Measure, checked, row_losses
from perdure.strategies.quota import Once, Quota, Unit
from perdure.strategies.selection import LEARNT, Selection, Selector
from perdure.strategies.settings import FIELD, OFFERS, check_rehearsal
from perdure.types import TASK, Batch, Context, Example, Objective, Output

Memory = Literal["reservoir", "balanced", "class-balanced", "ring"]
Ratio = float | Literal["once"]
Offer = Literal["task", "step"]


class Rehearsal(Strategy):
    """A strategy with a memory that takes in a task's rows when the task ends, or a step's after the step.

    Args:
        buffer: what keeps the rows; None makes one of `memory` and `capacity` from the run's seed.
        ratio: drawn per new row (or token), above 0; "once": every row once for each pass over the task's new rows.
        capacity: rows kept, or a size such as "2MB" or "20000 tokens".
        memory: "reservoir", "balanced" (by task), "class-balanced" or "ring" (the newest of each task).
        unit: what `ratio` and `resample` count: "examples", or "tokens", which are targets.
        select: the policy that chooses rows, see `perdure.memory.POLICIES`; None lets the memory's own rule do.
        field: the column that says how difficult a row is.
        resample: the share of the kept rows of each task that `select` chooses anew for each pass; None: rows are
            chosen once, when their task ends.
        offer: when new rows are offered to the memory: all of a "task" when it ends, or those of a "step" after its
            update, so that a stream without tasks is replayed too.
        quotas: how many separate draws a step takes.

    Attributes:
        measure_losses: (context, rows) -> the loss of each row by `name_of`, under the model as it is.
    """

    wants_outputs = False

    def __init__(
        self,
        buffer: Buffer | None,
        ratio: Ratio,
        capacity: int | str,
        memory: Memory,
        unit: Unit,
        select: str | None = None,
        field: str = FIELD,
        resample: float | None = None,
        offer: Offer = OFFERS[0],
        quotas: int = 1,
    ) -> None:
        check_rehearsal(self.name, buffer, ratio, capacity, memory, unit, select, field, resample, offer)
        self._selector = None if select is None else Selector(self.name, select, field, resample, unit)
        self.buffer = buffer
        self.ratio = ratio
        self.capacity = capacity if buffer is None else buffer.capacity
        self.memory = memory if buffer is None else buffer.kind
        self.unit = unit
        self.select = select
        self.field = field
        self.resample = resample
        self.offer: Offer = offer
        self.measure_losses: Measure = row_losses
        self._selection = Selection(quotas)
        self._quotas = [Once() if ratio == "once" else Quota(float(ratio), unit) for _ in range(quotas)]
        self._new: list[Example] = []  # of the step under way, in their own order, which a ring keeps by

    @property
    def needs_boundaries(self) -> bool:
        """Not if rows are offered after their step."""
        return self.offer == "task"

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
        rows = ctx.task.train
        if self.buffer is None:
            self.buffer = (
                RankedBuffer(self.capacity, ctx.seed)
                if self.select is not None and self.resample is None
                else make_buffer(self.memory, self.capacity, ctx.seed)
            )
        for i, quota in enumerate(self._quotas):
            quota.begin(len(rows), ctx.seed, "once", ctx.task.name, i)
        self._selection.begin()
        self._refuse_what_holds_nothing(self.buffer, rows)
        if getattr(self.buffer, "by", None) == "class" and rows:
            try:
                class_of(rows[0])
            except ConfigError as error:  # now, and not when the task has been trained
                raise StrategyError(f"{self.name}: {error}") from error
        if self._selector is not None:
            self._selector.check(rows, ctx.index == 0)
            self._selector.check_held(self.buffer)

    def _refuse_what_holds_nothing(self, buffer: Buffer, rows: Sequence[Example]) -> None:
        if buffer.unit != "rows" and rows:
            smallest = min(weigh(row, buffer.unit) for row in rows)
            if smallest > buffer.limit:
                raise StrategyError(
                    f"{self.name}: a memory of {buffer.capacity} holds no row of task {rows[0].task!r}, of which "
                    f"the smallest takes {smallest:,} {buffer.unit}; give a larger capacity"
                )

    def draw(self, ctx: Context, examples: Sequence[Example], quota: int = 0) -> list[Example]:
        """Kept rows for a step with these rows; none before there are any."""
        held = self.buffer
        self._new = new = [example for example in examples if example.source == TASK]
        if not held:
            return []

        def choose(number: int) -> list[Example]:
            assert self._selector is not None
            return self._selector.choose(ctx, held, self.measure_losses, number)

        def of_pass(number: int) -> list[Example]:
            return list(held) if self.resample is None else self._selection.at(number, held, choose)

        counter = self._quotas[quota]
        if isinstance(counter, Once):
            return counter.draw(of_pass, len(new), held)

        def count(row: Example) -> int:
            return count_targets(row, ctx.objective)

        if self.resample is None:
            return counter.draw(held.sample, new, count)
        among = self._selection.current(quota, held, choose)
        found = counter.draw(lambda k: held.sample(k, among), new, count)
        self._selection.count(quota, len(found))
        return found

    def bookmark(self) -> Any:
        """The counts, what is chosen, and the number of draws."""
        counts = [quota.state() for quota in self._quotas]
        return counts, self._selection.state(), self.buffer.draws if self.buffer is not None else 0

    def turn_back(self, bookmark: Any) -> None:
        """Count and choose as before."""
        counts, selection, draws = bookmark
        for quota, state in zip(self._quotas, counts, strict=True):
            quota.restore(state)
        self._selection.restore(selection)
        if self.buffer is not None:
            self.buffer.draws = draws

    def after_step(self, ctx: Context, batches: Sequence[Batch], outputs: Sequence[Output]) -> None:
        """Offer the step's new rows to the memory, if they are offered by step."""
        if self.offer == "step":
            self._offer(ctx, self._new)

    def after_task(self, ctx: Context) -> None:
        """Offer the task's rows to the memory, in the policy's order where it says which stay."""
        if self.offer == "task":
            self._offer(ctx, ctx.task.train)

    def _offer(self, ctx: Context, rows: Sequence[Example]) -> None:
        assert self.buffer is not None
        if self._selector is not None and self.resample is None:
            limit = self.buffer.limit if self.buffer.unit == "rows" else None
            rows = self._selector.order(ctx, rows, self.measure_losses, limit=limit)
        elif self._selector is not None and self._selector.wants_learnt and rows:
            losses = checked(self.name, rows, self.measure_losses(ctx, rows))
            rows = [row.but(extras={**row.extras, LEARNT: losses[str(name_of(row))]}) for row in rows]
        self.buffer.extend(self.remembered(ctx, rows))
        if self._selector is not None and self.offer == "step":
            self._selection.keep_to(self.buffer)

    def remembered(self, ctx: Context, rows: Sequence[Example]) -> Iterable[Example]:
        """The rows as they are kept."""
        return rows

    def kept(self) -> int:
        """Rows in the memory."""
        return 0 if self.buffer is None else len(self.buffer)

    def state_dict(self) -> dict[str, Any]:
        """The memory, the counts, and what is chosen."""
        return {
            "buffer": None if self.buffer is None else self.buffer.state_dict(),
            "counts": [quota.state() for quota in self._quotas],
            "selection": self._selection.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the memory, the counts, and what is chosen."""
        saved = state["buffer"]
        if (
            self.buffer is not None
            and saved is not None
            and saved.get("kind", ReservoirBuffer.kind) == self.buffer.kind
        ):
            self.buffer.load_state_dict(saved)  # a buffer of the user's own stays the object that it is
        else:
            self.buffer = None if saved is None else load_buffer(saved)
        # Older states name the two counts, and choose nothing.
        found = state["counts"] if "counts" in state else [[state["new_rows"], state["owed"]]]
        for quota, counts in zip(self._quotas, found, strict=True):
            quota.restore(counts)
        self._selection.begin()
        if "selection" in state:
            self._selection.restore(state["selection"])
