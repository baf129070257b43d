"""The loop over one task: phases, epochs, batches, in an order that follows from keys alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from perdure.order import arrange
from perdure.training.learner import Learner, StepResult
from perdure.types import Example, Phase


@dataclass(frozen=True, slots=True)
class Position:
    """Where in a task the loop stands: `batch` batches of this epoch of this phase are done."""

    phase: int = 0
    epoch: int = 0
    batch: int = 0


class Source(Protocol):
    """Where the batches of a task come from."""

    def __len__(self) -> int:
        """Batches an epoch."""

    def batches(self, phase: int, epoch: int) -> Iterator[Sequence[Example]]:
        """The batches of one epoch, the same at every call."""


class KeyedSource:
    """Batches of examples in keyed order: a new uniform order each epoch, the same on every machine.

    Args:
        examples: the task's rows.
        batch_size: rows a batch; the last one of an epoch may be smaller.
        seed: of the order.
        name: the task's name, so that tasks with the same rows differ.
        shuffle: False keeps the rows' own order.
        drop_last: leave out a last batch that is not full.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        name: str,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self._context: tuple[Any, ...] = (seed, "order", name)
        self._shuffle = shuffle
        self._drop_last = drop_last

    def __len__(self) -> int:
        rows = len(self.examples)
        return rows // self.batch_size if self._drop_last else -(-rows // self.batch_size)

    def batches(self, phase: int, epoch: int) -> Iterator[Sequence[Example]]:
        """The batches of one epoch."""
        rows: Sequence[Example] = self.examples
        if self._shuffle:
            rows = arrange(rows, *self._context, phase, epoch, key=lambda row: f"{row.task}\0{row.key}")
        for index in range(len(self)):
            yield rows[index * self.batch_size : (index + 1) * self.batch_size]


def total_steps(source: Source, phases: Sequence[Phase]) -> int:
    """Optimizer steps of a whole task."""
    return len(source) * sum(phase.epochs for phase in phases)


def fit(
    learner: Learner,
    source: Source,
    phases: Sequence[Phase],
    start: Position | None = None,
    epoch_ended: Callable[[int, int], bool] | None = None,
) -> Iterator[tuple[Position, StepResult]]:
    """Train on one task from a position; yield after every step where the loop stands now.

    Between two steps all state is in the learner and the position, so that a run can be saved and taken up at any
    yield.

    Args:
        learner: what is trained.
        source: of the batches.
        phases: of the task.
        start: where to go on.
        epoch_ended: told (phase, epoch) when an epoch's last step was taken up; True ends the phase there. It may
            change the learner's state.
    """
    start = start or Position()
    for p in range(start.phase, len(phases)):
        for e in range(start.epoch if p == start.phase else 0, phases[p].epochs):
            done = start.batch if (p, e) == (start.phase, start.epoch) else 0
            for b, rows in enumerate(source.batches(p, e)):
                if b >= done:
                    yield Position(p, e, b + 1), learner.step(rows)
            if epoch_ended is not None and epoch_ended(p, e):
                break
        learner.end_phase(phases[p])
