"""Experience replay: a few kept rows of earlier tasks are trained on beside the new ones."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

from perdure.errors import StrategyError, unknown_name
from perdure.memory import Buffer
from perdure.strategies.quota import Unit
from perdure.strategies.rehearsal import Memory, Offer, Ratio, Rehearsal
from perdure.types import TASK, Context, Example

Gradients = Literal["combined", "separate"]
GRADIENTS: tuple[Gradients, ...] = ("combined", "separate")
NOT_NAMED: Mapping[str, float] = MappingProxyType({})


class Replay(Rehearsal):
    """Add `ratio` kept rows for each new row; the memory takes in a task's rows at its end, or a step's after it.

    The loss is the mean over all targets of the step, new and replayed alike; or, with gradients "separate", half
    the mean over the new ones and half that over the replayed ones, whose gradient is the average of the two. Both
    are one where a step has as many replayed targets as new ones. The ratio is exact over every stretch
    of steps: in examples, ⌊ratio·n⌋ rows were replayed after n new ones; in tokens, at most one row more than
    ratio times the new targets. New rows count from the first step of a task that finds rows in the memory.

    Args:
        buffer: what keeps the rows; None makes one of `memory` and `capacity` from the run's seed.
        ratio: replayed rows per new row (or target per target), above 0; or "once": every row once an epoch.
        capacity: rows kept, or a size such as "2MB" or "20000 tokens", where no buffer is given.
        memory: "reservoir", "balanced" (by task), "class-balanced" or "ring" (the newest of each task).
        unit: what `ratio` and `resample` count: "examples", or "tokens", which are targets.
        select: the policy that chooses rows, see `perdure.memory.POLICIES`; None lets the memory's own rule do.
        field: the column that says how difficult a row is.
        resample: the share of the kept rows that `select` chooses anew for each pass; None: rows are chosen once.
        offer: when new rows are offered to the memory: all of a "task" when it ends, or those of a "step" after its
            update, for a stream without tasks.
        gradients: "combined", or "separate".

    Source: Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning" (arXiv:1902.10486).
    """

    name: ClassVar[str] = "replay"
    summary: ClassVar[str] = "kept rows of earlier tasks are trained on beside the new ones"
    needs: ClassVar[str] = "a memory of rows; no extra weights, no task ids"
    cost: ClassVar[str] = "a step has (1 + ratio) times the rows"
    source: ClassVar[str] = "Chaudhry et al. 2019 (arXiv:1902.10486)"

    def __init__(
        self,
        buffer: Buffer | None = None,
        ratio: Ratio = 1.0,
        capacity: int | str = 1000,
        memory: Memory = "reservoir",
        unit: Unit = "examples",
        select: str | None = None,
        field: str = "level",
        resample: float | None = None,
        offer: Offer = "task",
        gradients: Gradients = "combined",
    ) -> None:
        super().__init__(buffer, ratio, capacity, memory, unit, select, field, resample, offer)
        if gradients not in GRADIENTS:
            raise StrategyError(f"{self.name}: {unknown_name('gradients', gradients, GRADIENTS)}")
        self.gradients: Gradients = gradients

    def mix(self, ctx: Context, examples: list[Example]) -> list[Example]:
        """The new rows, followed by what is replayed with them."""
        separate = self.gradients == "separate"
        group = self.name if separate else TASK
        found = [row.but(source=self.name, group=group) for row in self.draw(ctx, examples)]
        # Without replayed rows the new ones are the whole step, and weigh all of it.
        self.weights = {TASK: 0.5, self.name: 0.5} if found and separate else NOT_NAMED
        return [*examples, *found]
