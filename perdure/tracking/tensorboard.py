"""TensorBoard: scalars, scores as tables and pictures, hyper-parameters, in event files."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perdure.tracking.state import EVENTS
from perdure.tracking.tracker import Point, Tracker, parameters, summary

SUFFIX = ".perdure"


class TensorBoard(Tracker):
    """Track in TensorBoard: scalars by step, R as text, the plots as images, parameters and summary as hparams.

    A run that goes on writes its files anew from its log, so that no step stands in them twice.

    Args:
        folder: for the event files, one for each training; None takes `tensorboard/` in the run's folder, and
            where there is no such folder, a new one below `tensorboard/` here.
        say: tells a person where to look and what went wrong; None raises Python warnings for the latter.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    name = "tensorboard"

    def __init__(self, folder: str | Path | None = None, say: Callable[[str], None] | None = None) -> None:
        super().__init__(say)
        self._folder = None if folder is None else Path(folder)
        self._writer: Any = None

    def _open(self, facts: Mapping[str, Any]) -> str:
        from torch.utils.tensorboard import SummaryWriter

        folder = self._folder
        if folder is None and "folder" in facts:
            folder = Path(facts["folder"]) / EVENTS
            for path in folder.glob(f"*{SUFFIX}"):
                path.unlink()
        elif folder is None:
            folder = Path(EVENTS) / f"{facts.get('name', 'training')}-{time.strftime('%Y%m%d-%H%M%S')}"
        self._folder = folder
        self._writer = SummaryWriter(str(folder), filename_suffix=SUFFIX)
        self._writer.add_text("parameters", _table(["parameter", "value"], parameters(facts).items()))
        return f"look at it with: tensorboard --logdir {folder}"

    def _send(self, points: list[Point]) -> None:
        while points:
            point = points[0]
            for name, value in point.scalars.items():
                self._writer.add_scalar(name, value, point.step, point.time)
            del points[0]
        self._writer.flush()

    def _finish(self, results: Mapping[str, Any], files: Sequence[tuple[Path, str]]) -> None:
        from torch.utils.tensorboard.summary import hparams

        steps, figures = int(results.get("steps") or 0), summary(results)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, steps)
        for metric, matrix in (results.get("scores") or {}).items():
            self._writer.add_text(f"scores/{metric}", _matrix(matrix), steps)
        for path, name in files:
            if path.suffix == ".png":
                self._writer.add_image(name.removesuffix(".png"), _pixels(path), steps, dataformats="HWC")
        chosen = {
            key: value if isinstance(value, bool | int | float) else str(value)
            for key, value in parameters(self._facts).items()
        }
        # SummaryWriter.add_hparams would put them into a run of their own.
        for part in hparams(chosen, figures):
            self._writer.file_writer.add_summary(part)
        self._writer.flush()

    def _close(self, status: str) -> None:
        self._writer.close()


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _matrix(matrix: Mapping[str, Any]) -> str:
    """R as a table: a line before training and one after each stage; "–" where nothing was measured."""
    tasks, stages = matrix["tasks"], matrix.get("stages") or matrix["tasks"]
    rows = []
    for i, row in enumerate(matrix["values"]):
        name = "before training" if i == 0 else f"after {stages[i - 1]}" if i <= len(stages) else f"row {i}"
        rows.append([name, *("–" if value is None or value != value else f"{value:.4f}" for value in row)])
    return _table(["", *tasks], rows)


def _pixels(path: Path) -> Any:
    """A picture as [H, W, 3] bytes."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
