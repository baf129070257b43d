"""Reads what a run on reactions leaves beside its results: predictions, calibration, losses by epoch, matrices."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perdure.errors import RunError
from perdure.report.read import Scores

FORMAT = 1
HELD_OUT, TRAINED, CALIBRATION = "predictions_held_out.csv", "predictions_training.csv", "calibration.json"
LOSSES = "epoch_losses_task_*.csv"
NUMBERS = ("true", "predicted", "std", "lower", "upper", "calibration")
COLUMNS = ("key", "task", *NUMBERS)
EPOCH = ("epoch", "training_loss", "held_out_loss", "held_out_rmse", "held_out_r2")
METHODS = {"mc-dropout": "MC dropout", "ensemble": "an ensemble of heads", "none": "residuals alone"}


@dataclass(frozen=True, slots=True)
class Predictions:
    """True and predicted yields of n rows as fractions, [n] each; NaN where there is no interval.

    `sets_width` marks the rows that set the intervals' width, which say nothing of how good these are.
    """

    tasks: tuple[str, ...]
    task: NDArray[np.int64]  # [n], index into tasks
    true: NDArray[np.float64]
    predicted: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    sets_width: NDArray[np.bool_]

    def of(self, task: int) -> Predictions:
        """The rows of one task."""
        rows = self.task == task
        return Predictions(
            (self.tasks[task],), np.zeros(rows.sum(), np.int64), self.true[rows], self.predicted[rows],
            self.lower[rows], self.upper[rows], self.sets_width[rows],
        )  # fmt: skip

    def rmse(self) -> float:
        """Root mean squared error over all rows."""
        return math.sqrt(np.mean((self.predicted - self.true) ** 2))

    def r2(self) -> float:
        """1 − Σ(y − p)² / Σ(y − ȳ)² over all rows; NaN where the true values do not differ."""
        spread = float(np.sum((self.true - self.true.mean()) ** 2))
        return 1 - float(np.sum((self.predicted - self.true) ** 2)) / spread if spread > 0 else math.nan

    def coverage(self) -> tuple[float, int]:
        """Share of the rows that did not set the intervals' width which lie inside, and how many these are."""
        tested = ~self.sets_width & np.isfinite(self.lower) & np.isfinite(self.upper)
        inside = (self.lower <= self.true) & (self.true <= self.upper)
        return (float(inside[tested].mean()) if tested.any() else math.nan), int(tested.sum())


@dataclass(frozen=True, slots=True)
class Calibration:
    """Coverage by nominal level on `rows` rows that did not set the intervals; `raw` is empty without a std."""

    method: str
    levels: tuple[float, ...]
    raw: tuple[float, ...]
    observed: tuple[float, ...]
    rows: int


@dataclass(frozen=True, slots=True)
class Losses:
    """A stage's losses by epoch; `values` are by column name, NaN where nothing was measured."""

    stage: int
    values: Mapping[str, tuple[float, ...]]


def read_predictions(path: Path) -> Predictions | None:
    """A predictions_*.csv; None where there is none, or no row in it.

    Raises:
        RunError: it is not as perdure writes it; the message names file and line.
    """
    lines = _lines(path, COLUMNS)
    if not lines:
        return None
    found: dict[str, list[float]] = {name: [] for name in NUMBERS}
    tasks: dict[str, int] = {}
    task = []
    for line, row in lines:
        task.append(tasks.setdefault(row["task"], len(tasks)))
        for name in NUMBERS:
            value = _number(path, line, name, row[name])
            if name in ("true", "predicted") and not math.isfinite(value):
                raise _wrong(path, f"line {line}: {name} must be a number, got {row[name]!r}")
            if name == "calibration" and value not in (0, 1):
                raise _wrong(path, f"line {line}: calibration must be 0 or 1, got {row[name]!r}")
            found[name].append(value)
    arrays = {name: np.array(values, np.float64) for name, values in found.items()}
    return Predictions(
        tuple(tasks), np.array(task, np.int64), arrays["true"], arrays["predicted"], arrays["lower"],
        arrays["upper"], arrays["calibration"] == 1,
    )  # fmt: skip


def read_calibration(path: Path) -> Calibration | None:
    """A calibration.json; None where there is none, or nothing was measured.

    Raises:
        RunError: it is not as perdure writes it, or of a newer format.
    """
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(_text(path))
        if found["format"] > FORMAT:
            raise _wrong(path, f"has format {found['format']}, this perdure reads up to {FORMAT}; update perdure")
        columns = [
            tuple(math.nan if x is None else float(x) for x in found.get(name) or ())
            for name in ("levels", "observed_raw", "observed")
        ]
        out = Calibration(str(found["method"]), columns[0], columns[1], columns[2], int(found["rows"]))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _wrong(path, f"is not as perdure writes it ({error!r})") from error
    if len(out.observed) != len(out.levels) or len(out.raw) not in (0, len(out.levels)):
        raise _wrong(
            path, f"has {len(out.levels)} levels, {len(out.raw)} observed_raw, {len(out.observed)} observed"
        )
    if not all(0 < level < 1 for level in out.levels):
        raise _wrong(path, f"levels must lie between 0 and 1, got {list(out.levels)}")
    return out if out.levels and out.rows > 0 else None


def read_losses(folder: Path) -> list[Losses]:
    """The epoch_losses_task_*.csv of a run in order of the stages; those without a row are left out.

    Raises:
        RunError: one of them is not as perdure writes it.
    """
    out = []
    for path in folder.glob(LOSSES):
        stage = path.stem.rpartition("_")[2]
        if not stage.isdecimal():
            raise _wrong(path, "its name must end with the number of a stage, as in epoch_losses_task_01.csv")
        lines = _lines(path, EPOCH)
        if lines:
            columns = {name: tuple(_number(path, i, name, row[name]) for i, row in lines) for name in EPOCH}
            out.append(Losses(int(stage), columns))
    return sorted(out, key=lambda losses: losses.stage)


def read_matrix(path: Path, metric: str, higher_is_better: bool) -> Scores | None:
    """A score matrix from its CSV; None where there is none.

    Raises:
        RunError: it is not as perdure writes it.
    """
    if not path.is_file():
        return None
    rows = list(csv.reader(_text(path).splitlines()))
    if len(rows) < 2 or rows[0][:1] != ["after"] or rows[1][:1] != ["start"]:
        raise _wrong(path, "must begin with 'after' and the tasks' names, and a row 'start' below that")
    for line, row in enumerate(rows[1:], 2):
        if len(row) != len(rows[0]):
            raise _wrong(path, f"line {line}: must have {len(rows[0])} cells, got {len(row)}")
    values = tuple(
        tuple(_number(path, line, task, cell) for task, cell in zip(rows[0][1:], row[1:], strict=True))
        for line, row in enumerate(rows[1:], 2)
    )
    return Scores(metric, higher_is_better, tuple(rows[0][1:]), tuple(row[0] for row in rows[2:]), values)


def _lines(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Number and cells of each row; nothing where there is no file."""
    if not path.is_file():
        return []
    reader = csv.DictReader(_text(path).splitlines())
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise _wrong(path, f"has no column {missing[0]!r}; it needs {', '.join(columns)}")
    out = []
    for row in reader:
        if None in row or None in row.values():
            raise _wrong(path, f"line {reader.line_num}: must have {len(reader.fieldnames or ())} cells")
        out.append((reader.line_num, row))
    return out


def _number(path: Path, line: int, name: str, text: str) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError:
        raise _wrong(path, f"line {line}: {name} must be a number or empty, got {text!r}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(path, f"cannot be read ({error})") from error


def _wrong(path: Path, what: str) -> RunError:
    return RunError(f"{path}: {what}. Without the file its figure is left out; resuming the run writes it again")
