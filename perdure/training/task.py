"""One task's training for a script: every step and epoch told of, and stopped early where that is asked for."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

from perdure.training.events import Events
from perdure.training.learner import Learner, StepResult
from perdure.training.loop import Position, Source, fit
from perdure.training.stopping import Stopper
from perdure.types import Phase, Task


class TaskTraining:
    """Train on one task, from `Learner.begin_task` to before `Learner.end_task`.

    Args:
        learner: what is trained.
        events: who is told.
        task: held-out rows are scored after every epoch if there is a `stopper` or `score_epochs`.
        stage: the task's number, from 1.
        stopper: ends phases early; None for all epochs.
        score_epochs: whether to score epochs without a stopper too.

    Attributes:
        seconds: that steps took.
        phases: for each phase how many epochs it had, and how many of them are kept.
    """

    def __init__(
        self, learner: Learner, events: Events, task: Task, stage: int, stopper: Stopper | None, score_epochs: bool
    ) -> None:
        self.seconds = 0.0
        self.phases: list[dict[str, Any]] = []
        self._learner = learner
        self._events = events
        self._task = task
        self._stage = stage
        self._stopper = stopper
        self._scores_epochs = bool(task.evaluation) and (stopper is not None or score_epochs)
        self._losses: list[float] = []
        self._clock = 0.0

    def run(self, source: Source, phases: list[Phase]) -> None:
        """All phases."""

        def epoch_ended(p: int, epoch: int) -> bool:
            return self._epoch_ended(phases[p], epoch)

        self._clock = time.perf_counter()
        for position, result in fit(self._learner, source, phases, epoch_ended=epoch_ended):
            if result.skipped:
                warnings.warn(result.skipped, stacklevel=4)  # the line that called `train_task`
                self._write("skipped", reason=result.skipped)
            else:
                self._write_step(position, result, time.perf_counter() - self._clock)
            self._tell()

    def _epoch_ended(self, phase: Phase, epoch: int) -> bool:
        """Score, tell, and say whether the phase ends here."""
        learner, stopper = self._learner, self._stopper
        step, last = learner.steps, epoch + 1 == phase.epochs
        scores = learner.score(self._task.evaluation) if self._scores_epochs else {}
        stop, kept = last, epoch
        if stopper is not None:
            stop = stopper.epoch_ended(epoch, scores, last)
            kept = stopper.kept(epoch) if stop else epoch
        if stop:
            self.phases.append({"phase": phase.name, "epochs": epoch + 1, "kept": kept + 1})
        self._events.write(
            "epoch",
            step=step,
            task=self._task.name,
            stage=self._stage,
            phase=phase.name,
            epoch=epoch,
            train_loss=sum(self._losses) / len(self._losses) if self._losses else math.nan,
            metrics=scores,
            best=None if stopper is None else stopper.best,
            back_to=None if kept == epoch else learner.steps,
        )
        self._losses = []
        self._tell()
        return stop

    def _write_step(self, position: Position, result: StepResult, seconds: float) -> None:
        self._losses.append(result.loss)
        self.seconds += seconds
        self._write(
            "step",
            stage=self._stage,
            epoch=position.epoch,
            loss=result.loss,
            lr=result.lr,
            tokens=result.tokens,
            tokens_per_second=round(result.tokens / max(seconds, 1e-9), 1),
            gradient_norm=result.gradient_norm,
            replayed=result.replayed_rows,
            **result.logged,
        )

    def _write(self, event: str, **values: Any) -> None:
        self._events.write(event, step=self._learner.steps, task=self._task.name, **values)

    def _tell(self) -> None:
        self._events.tell()
        self._clock = time.perf_counter()  # what callbacks and scores take is not the steps'
