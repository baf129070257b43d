"""The score matrices of a run and the probe's scores: which cell a measurement belongs to, and which are filled."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from perdure.evaluation.matrix import ScoreMatrix
from perdure.storage import plain
from perdure.training.plan import Plan
from perdure.training.results import new_matrix
from perdure.types import Task


class RunScores:
    """What a run has measured after each of its stages.

    Joint and isolated runs have one row after the first: everything was trained once.

    Args:
        plan: of the run.

    Attributes:
        matrices: R by metric.
        probe: the general probe's value after each row, by metric; None where it was not measured.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.matrices: dict[str, ScoreMatrix] = {}
        self.probe: dict[str, list[float | None]] = {}

    def row(self, stage: int) -> int:
        """The row of what is measured after so many stages."""
        return min(stage, 1) if self.plan.mode != "sequential" else stage

    def scored_after(self, stage: int) -> Sequence[Task]:
        """The tasks that are scored after a stage, counted from 0."""
        return [self.plan.stages[stage]] if self.plan.mode == "isolated" else self.plan.stream.evaluations

    def wants_probe(self, stage: int) -> bool:
        """Whether the probe is scored after so many stages, and was not yet."""
        row = self.row(stage)
        measured = any(row < len(column) and column[row] is not None for column in self.probe.values())
        return bool(self.plan.probe) and (self.plan.mode != "isolated" or stage == 0) and not measured

    def measured(self, row: int, task: str) -> bool:
        """Whether a task has any score in a row."""
        for matrix in self.matrices.values():
            if task in matrix.tasks and row < len(matrix.values):
                value = matrix.values[row, matrix.tasks.index(task)]
                if value == value:
                    return True
        return False

    def record(self, row: int, task: str, found: Mapping[str, float]) -> None:
        """Fill a cell of each metric's matrix."""
        for metric, value in found.items():
            matrix = self.matrices.setdefault(metric, new_matrix(metric))
            # A task without this metric (plain text, no held-out rows) has a column too, or a later task would
            # stand in its position and take over its row.
            for other in self.plan.stream.evaluations:
                if other.name not in matrix.tasks:
                    matrix.record(0, other.name, math.nan)
            matrix.record(row, task, value)
            if row and self.plan.mode != "sequential":
                matrix.record_stage(self.plan.mode, row)

    def record_probe(self, row: int, found: Mapping[str, float]) -> None:
        """Fill the probe's cell of each metric."""
        for metric, value in found.items():
            column = self.probe.setdefault(metric, [])
            column.extend([None] * (row + 1 - len(column)))
            column[row] = value

    def forget(self, tasks: Collection[str]) -> None:
        """Drop what was measured of these tasks."""
        for matrix in self.matrices.values():
            for task in tasks:
                matrix.drop(task)

    def line(self, stage: int) -> str | None:
        """What was found after so many stages, in one line; None where no task has held-out rows."""
        matrix = next((self.matrices[m] for m in ("exact_match", "rmse", "loss") if m in self.matrices), None)
        row = self.row(stage)
        if matrix is None or row >= len(matrix.values):
            return None
        scores = "  ".join(
            f"{task} {value:.2f}"
            for task, value in zip(matrix.tasks, matrix.values[row], strict=True)
            if value == value
        )
        told = ", task told" if self.plan.strategy.wants_task_ids else ""
        return f"{matrix.metric.replace('_', ' ')}{told}: {scores}"

    def state_dict(self) -> dict[str, Any]:
        """Matrices and probe, as plain values."""
        return {
            "matrices": {metric: matrix.to_dict() for metric, matrix in self.matrices.items()},
            "probe": plain(self.probe),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.matrices = {metric: ScoreMatrix.from_dict(saved) for metric, saved in state["matrices"].items()}
        self.probe = state["probe"]
