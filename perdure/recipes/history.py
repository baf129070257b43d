"""Writes histories, where `perdure.report.history` reads them."""

from __future__ import annotations

from pathlib import Path

from perdure.report.history import History
from perdure.storage import write_json


def write_history(path: Path, history: History) -> None:
    """Replace a history's file in one step; gaps are written as null.

    Raises:
        ValueError: a fact has a name that is taken, or is a list of numbers and would be read as a curve.
        StorageError: the disk refused; an earlier file is intact.
    """
    write_json(path, history.as_json())
