"""Rows of token ids with a target, their keyed order, what is replayed of them, and batches of one fixed shape.

Plain Python and numpy; the order is the same as that of the torch backend for the same keys and seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from perdure.errors import DataError
from perdure.order import arrange, take


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        key: what the order follows from; unique within its task.
        ids: its token ids.
        y: its target, 0 to 1.
        task: the name of the task that it belongs to.
    """

    key: str
    ids: tuple[int, ...]
    y: float
    task: str = ""


@dataclass(frozen=True, slots=True)
class RowTask:
    """A task: its name and its training rows."""

    name: str
    rows: tuple[Row, ...]


class Batch(NamedTuple):
    """Rows of one fixed shape, padded on the right and at the end.

    Attributes:
        ids: [B, T], int32.
        mask: [B, T], true where a token is real; a row of padding has one, so that no softmax is over nothing.
        y: [B], float32.
        weight: [B], float32, what each row's loss is multiplied by; 0 for a row of padding.
    """

    # Of numpy here, of JAX within a compiled function.
    ids: Any
    mask: Any
    y: Any
    weight: Any


def collate(rows: Sequence[Row], weights: Sequence[float], size: int, length: int) -> Batch:
    """A batch of `size` rows of `length` tokens.

    Raises:
        DataError: a row is empty, or longer than that.
    """
    assert len(rows) == len(weights) <= size
    ids, mask = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
    y, weight = np.zeros(size, np.float32), np.zeros(size, np.float32)
    mask[:, 0] = True
    for i, row in enumerate(rows):
        if not 0 < len(row.ids) <= length:
            raise DataError(
                f"row {row.key!r} of task {row.task!r} has {len(row.ids)} tokens; batches take 1 to {length} "
                "(length in the settings)"
            )
        ids[i, : len(row.ids)] = row.ids
        mask[i, : len(row.ids)] = True
        y[i] = row.y
    weight[: len(rows)] = weights
    return Batch(ids, mask, y, weight)


def name_of(row: Row) -> str:
    """What the order goes by."""
    return f"{row.task}\0{row.key}"


def epoch_batches(task: RowTask, batch_size: int, seed: int, epoch: int) -> Iterator[Sequence[Row]]:
    """The rows of one epoch in keyed order, `batch_size` at a time; the last ones may be fewer."""
    rows = arrange(task.rows, seed, "order", task.name, 0, epoch, key=name_of)
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]


def merged(tasks: Sequence[RowTask]) -> list[RowTask]:
    """All tasks as one, which is what joint training is."""
    return [RowTask("joint", tuple(row for task in tasks for row in task.rows))]


class Replayed:
    """What is replayed while a task is trained: a function of the earlier tasks, the seed and the draw's number.

    The memory is the `capacity` rows of smallest keyed priority of all earlier ones: a uniform sample of them, and
    the rows that torch's reservoir keeps for the seed. It is drawn from in passes, each in a new keyed order, so
    that rows come up equally often.

    Args:
        earlier: the tasks before, in order.
        capacity: rows kept; None: all.
        seed: of the memory and of the draws.
        task: the name of the task that is trained.
    """

    def __init__(self, earlier: Sequence[RowTask], capacity: int | None, seed: int, task: str) -> None:
        rows = [row for one in earlier for row in one.rows]
        self.memory = rows if capacity is None else take(rows, capacity, seed, "reservoir", key=name_of)
        self._order = lru_cache(2)(lambda number: arrange(self.memory, seed, "replay", task, number, key=name_of))

    def draw(self, start: int, end: int) -> list[Row]:
        """The draws of a task from number `start` to before `end`; none where the memory is empty."""
        if not self.memory:
            return []
        places = (divmod(number, len(self.memory)) for number in range(start, end))
        return [self._order(number)[place] for number, place in places]


def rows_before(step: int, rows: int, batch_size: int) -> int:
    """How many of a task's `rows` were taken, epochs together, before its step of that number (from 0)."""
    epochs, batches = divmod(step, -(-rows // batch_size))
    return epochs * rows + batches * batch_size


def digest(tasks: Sequence[RowTask]) -> str:
    """A hash of the tasks and all of their rows."""
    state = hashlib.sha256()
    for task in tasks:
        state.update(f"\1{task.name}\1".encode())
        for row in task.rows:
            state.update(f"{row.task}\0{row.key}\0{row.ids}\0{row.y!r}\n".encode())
    return state.hexdigest()
