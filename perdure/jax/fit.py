"""Train a regressor through a stream of tasks, step by step, so that it can be taken up at any step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from perdure.jax.learner import Learner
from perdure.jax.rows import RowTask, epoch_batches, merged
from perdure.jax.telling import Position, StepResult


def train(
    learner: Learner,
    tasks: Sequence[RowTask],
    start: Position | None = None,
    task_ended: Callable[[int], None] | None = None,
) -> Iterator[tuple[Position, StepResult]]:
    """Train through the tasks from a position; yield after every step where the training stands now.

    Between two steps all state is in the learner and the position, so that it can be saved at any yield.

    Args:
        learner: what is trained.
        tasks: in order; joint training makes one of them.
        start: where to go on.
        task_ended: told the number of a task when its last step was taken up.
    """
    settings, start = learner.settings, start or Position()
    if settings.strategy == "joint":
        tasks = merged(tasks)
    for t in range(start.task, len(tasks)):
        task, here = tasks[t], start if t == start.task else Position(t)
        batches = -(-len(task.rows) // settings.batch_size)
        learner.begin_task(tasks[:t], task, here.epoch * batches + here.batch)
        for e in range(here.epoch, settings.epochs):
            done = here.batch if e == here.epoch else 0
            for b, rows in enumerate(epoch_batches(task, settings.batch_size, settings.seed, e)):
                if b >= done:
                    yield Position(t, e, b + 1), learner.step(rows)
        learner.end_task(task)
        if task_ended is not None:
            task_ended(t)
