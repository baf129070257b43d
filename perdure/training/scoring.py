"""Held-out rows of the tasks so far, and the score matrices that they fill."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from perdure.evaluation.matrix import ScoreMatrix
from perdure.evaluation.score import HIGHER_IS_BETTER, INFERRED, MAIN
from perdure.memory.pack import pack, unpack
from perdure.models.adapters import moving
from perdure.training.events import Events
from perdure.training.learner import Learner
from perdure.types import Example


class Scoring:
    """R of a stream whose tasks come one at a time.

    Args:
        learner: whose model is scored; its weights now are those that the stream begins with.
        events: told of every score.

    Attributes:
        matrices: R by metric.
        tasks: names of those that were trained.
        initial: parameters that were trainable when the stream began, and buffers, on the CPU.
    """

    def __init__(self, learner: Learner, events: Events) -> None:
        self.matrices: dict[str, ScoreMatrix] = {}
        self.tasks: list[str] = []
        self._learner = learner
        self._events = events
        self._rows: dict[str, list[Example]] = {}
        # Row 0 of a task that arrives later is scored with them.
        self.initial = {name: value.detach().cpu().clone() for name, value in moving(learner.model).items()}

    @property
    def main(self) -> ScoreMatrix:
        """R of the objective's main metric."""
        metrics = MAIN[self._learner.objective]
        return next((self.matrices[m] for m in metrics if m in self.matrices), self._new_matrix(metrics[-1]))

    def before(self, name: str, rows: list[Example]) -> dict[str, float]:
        """Fill what a task's column holds before it is trained: the row of now, and row 0."""
        self._rows[name] = rows
        found = self._learner.score_both(rows)
        self._record(len(self.tasks), name, found)
        if self.tasks:
            self._record(0, name, self._at_the_start(rows))
        return found

    def after(self, name: str) -> dict[str, float]:
        """A task was trained: fill a row, and return the task's own scores; empty if it has no held-out rows."""
        self.tasks.append(name)
        row = len(self.tasks)
        for matrix in self.matrices.values():
            if name not in matrix.tasks:
                matrix.record(row, name, math.nan)
        found: dict[str, float] = {}
        for other, rows in self._rows.items():
            values = self._learner.score_both(rows)
            self._record(row, other, values)
            if other == name:
                found = values
        return found

    def drop(self, name: str) -> None:
        """A task's training failed: R keeps those that were trained."""
        self._rows.pop(name, None)
        for matrix in self.matrices.values():
            matrix.drop(name)

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {
            "tasks": self.tasks,
            "matrices": {metric: matrix.to_dict() for metric, matrix in self.matrices.items()},
            "evaluations": {name: pack(rows) for name, rows in self._rows.items()},
            "initial": self.initial,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what was saved."""
        self.tasks = list(state["tasks"])
        self.matrices = {metric: ScoreMatrix.from_dict(saved) for metric, saved in state["matrices"].items()}
        self._rows = {name: unpack(rows) for name, rows in state["evaluations"].items()}
        self.initial = dict(state["initial"])

    def _at_the_start(self, rows: list[Example]) -> dict[str, float]:
        """Scores of the model that the stream began with, which knew nothing of the strategy."""
        own: dict[str, Tensor] = {**dict(self._learner.model.named_parameters())}
        own.update(self._learner.model.named_buffers())
        changed = any(name not in own or own[name].shape != value.shape for name, value in self.initial.items())
        if changed or self._learner.strategy.adds_to_forward:
            return {}  # the strategy has put something else in its place: that model is no more
        now = {name: own[name].detach().clone() for name in self.initial}
        with torch.no_grad():
            try:
                for name, value in self.initial.items():
                    own[name].copy_(value)
                found = self._learner.score(rows, plain=True)
            finally:
                for name, value in now.items():
                    own[name].copy_(value)
        if self._learner.infers:  # there were no tasks to tell apart
            found |= {metric + INFERRED: value for metric, value in found.items()}
        return found

    def _new_matrix(self, metric: str) -> ScoreMatrix:
        """An empty matrix with a column for every task so far, so that R stays [T+1, T]."""
        matrix = ScoreMatrix(metric, HIGHER_IS_BETTER[metric])
        for i, task in enumerate(self.tasks, start=1):
            matrix.record(i, task, math.nan)
        return matrix

    def _record(self, row: int, task: str, values: Mapping[str, float]) -> None:
        if not values:
            return
        for metric, value in values.items():
            if metric not in self.matrices:
                self.matrices[metric] = self._new_matrix(metric)
            self.matrices[metric].record(row, task, value)
        self._events.write("evaluation", step=self._learner.steps, row=row, task=task, metrics=dict(values))
