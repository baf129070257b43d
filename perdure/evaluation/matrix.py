"""The score matrix R of one metric: grows as tasks arrive, and is written as CSV or plain values."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from perdure.errors import ConfigError, StorageError
from perdure.evaluation import metrics

START = "start"


class ScoreMatrix:
    """Scores of every task after every stage of training; NaN where nothing was measured.

    Row 0 is before training, row t after the t-th stage; a column is added when a task is first scored. In a plain
    stream a stage trains one task, so R is [T+1, T] in the end. Joint training is one stage that trains all of
    them: R is [2, T].

    Args:
        metric: its name.
        higher_is_better: False for a loss or an error.

    Example:
        >>> R = ScoreMatrix("accuracy")
        >>> R.record(0, "a", 0.1)
        >>> R.record(1, "a", 0.9)
        >>> R.values.tolist()
        [[0.1], [0.9]]
    """

    def __init__(self, metric: str, higher_is_better: bool = True) -> None:
        self.metric = metric
        self.higher_is_better = bool(higher_is_better)
        self._cells: dict[str, dict[int, float]] = {}  # task -> row -> value
        self._stages: dict[int, str] = {}  # row -> name
        self._rows = 1

    def __repr__(self) -> str:
        shape = f"[{self._rows}, {len(self._cells)}]"
        return f"ScoreMatrix({self.metric!r}, {shape}, higher_is_better={self.higher_is_better})"

    @property
    def tasks(self) -> list[str]:
        """Names of the columns, in the order in which they were first scored."""
        return list(self._cells)

    @property
    def stages(self) -> list[str]:
        """A name for each row after the first: the one recorded, else the task in that position."""
        tasks = self.tasks
        by_position = {i + 1: task for i, task in enumerate(tasks)}
        return [self._stages.get(row, by_position.get(row, f"stage {row}")) for row in range(1, self._rows)]

    @property
    def values(self) -> metrics.Matrix:
        """R as float64 [rows, T], a copy; row 0 is always there."""
        R = np.full((self._rows, len(self._cells)), np.nan)
        for i, column in enumerate(self._cells.values()):
            for row, value in column.items():
                R[row, i] = value
        return R

    def record(self, row: int, task: str, value: float) -> None:
        """Set one cell; a second value replaces the first (a resumed run measures again).

        Args:
            row: 0 before training, else the number of the stage.
            task: the column, which is added where it is new.
            value: the score, in the metric's units; nan for not measured.

        Raises:
            ConfigError: a row below 0.
        """
        self._reach(row)
        self._cells.setdefault(task, {})[int(row)] = float(value)

    def drop(self, task: str) -> None:
        """Take a column out: a task that was scored and then never trained."""
        self._cells.pop(task, None)

    def record_stage(self, name: str, row: int | None = None) -> int:
        """Name a row by the stage that it follows, a task's name or "joint"; return its number.

        Only needed where a stage is not the task in its position. Without `row` it is the row after the last one.
        """
        row = self._rows if row is None else int(row)
        if row == 0:
            raise ConfigError(f"row 0 is before training and needs no stage, got {name!r}")
        self._reach(row)
        self._stages[row] = name
        return row

    def summary(self, *, counts: ArrayLike | None = None, isolated: ArrayLike | None = None) -> dict[str, Any]:
        """The metrics of this matrix, with the keys of `metrics.summary`.

        Where stages and tasks do not match one to one (joint training, a run cut short), what needs the diagonal
        is NaN, and `pairwise_transfer` None; `average`, `learning` and `per_task` hold what was measured. A lone
        stage that has no task's name trained all tasks, so each is learnt there. `counts` and `isolated` are those
        of `metrics.summary`.
        """
        R, tasks, stages = self.values, self.tasks, self.stages
        if tasks and stages == tasks:
            return metrics.summary(R, self.higher_is_better, tasks=tasks, counts=counts, isolated=isolated)
        row_of = {stage: row for row, stage in enumerate(stages, start=1)}
        if len(stages) == 1 and stages[0] not in tasks:
            row_of = dict.fromkeys(tasks, 1)
        learnt = [float(R[row_of[task], i]) if task in row_of else math.nan for i, task in enumerate(tasks)]
        undefined = dict.fromkeys(
            ("forgetting", "backward_transfer", "forward_transfer", "anytime_average"), math.nan
        )
        return {
            "average": metrics.mean(R[-1]),
            **undefined,
            "learning": metrics.mean(np.array(learnt)),
            "higher_is_better": self.higher_is_better,
            "pairwise_transfer": None,
            "per_task": metrics.per_task(R, learnt, tasks, self.higher_is_better),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for strict JSON; a cell that was not measured is None."""
        return {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "tasks": self.tasks,
            "stages": self.stages,
            "values": json_safe(self.values.tolist()),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> ScoreMatrix:
        """The matrix that `to_dict` described."""
        try:
            matrix = cls(state["metric"], state["higher_is_better"])
            tasks, stages, values = state["tasks"], state["stages"], state["values"]
            if len(values) != len(stages) + 1 or any(len(row) != len(tasks) for row in values):
                raise ValueError(f"values must be {len(stages) + 1} rows of {len(tasks)}")
            for task in tasks:
                matrix._cells[task] = {}
            for row, stage in enumerate(stages, start=1):
                matrix.record_stage(stage, row)
            for row, scores in enumerate(values):
                for task, value in zip(tasks, scores, strict=True):
                    if value is not None:
                        matrix.record(row, task, float(value))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"this is not a score matrix as ScoreMatrix.to_dict writes it: {error!r}") from error
        return matrix

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line a row, `after,<tasks>`; the file is replaced whole or not at all.

        Numbers have all their digits, so that equal runs give equal bytes; a cell that was not measured is empty.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["after", *self.tasks])
        for label, row in zip([START, *self.stages], self.values.tolist(), strict=True):
            writer.writerow([label, *("" if math.isnan(value) else repr(value) for value in row)])
        _replace(Path(path), text.getvalue())

    def _reach(self, row: int) -> None:
        if row < 0:
            raise ConfigError(f"row must be 0 (before training) or the number of a stage, got {row}")
        self._rows = max(self._rows, int(row) + 1)


def json_safe(value: Any) -> Any:
    """A copy that strict JSON can hold, however deeply nested: NaN becomes None, an infinity its name ("inf")."""
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(float(value))
    return value


def _replace(path: Path, text: str) -> None:
    """Write aside, sync, rename: a reader sees the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise StorageError(f"could not write {path}: {error.strerror or error}") from error
