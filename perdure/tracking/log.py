"""The append-only log of a run: one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perdure.storage import guarded, plain


class MetricsLog:
    """Append events to a metrics.jsonl.

    Args:
        path: the file.
        size: bytes to keep of what is there (a checkpoint's position); later lines belong to steps that will be
            taken again.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path = path
        with guarded(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            self._file.truncate(size)
            self._file.seek(0, 2)
        self.size = self._file.tell()

    def write(self, event: str, **values: Any) -> None:
        """Append one event; a refused write leaves no torn line behind."""
        line = json.dumps(plain({"event": event, **values}), allow_nan=False).encode() + b"\n"
        with guarded(self.path):
            try:
                self._file.write(line)
                self._file.flush()
            except OSError:
                self._abandon()
                raise
        self.size += len(line)

    def sync(self) -> None:
        """Flush to disk: what is written so far outlives a power cut. A log that was removed is put back."""
        with guarded(self.path):
            if not self.path.exists():
                self._file.seek(0)
                text = self._file.read()
                self._file.close()
                self._file = self.path.open("a+b")
                self._file.write(text)
                self._file.flush()
            os.fsync(self._file.fileno())

    def _abandon(self) -> None:
        # What the buffered writer still holds would be written again on close: leave it to the raw file alone.
        raw = self._file.detach()
        raw.truncate(self.size)
        self._file = raw  # type: ignore[assignment]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def find_mark(path: Path, name: str) -> tuple[int, Mapping[str, Any]] | None:
    """Where the log stood at the checkpoint of that name: bytes up to its mark, and the mark; None without one."""
    if not path.is_file():
        return None
    found, end = None, 0
    for line in path.read_bytes().splitlines(keepends=True):
        end += len(line)
        if b'"checkpoint"' not in line:
            continue
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if event.get("event") == "checkpoint" and event.get("name") == name:
            found = end, event
    return found


def read_events(path: Path) -> list[Mapping[str, Any]]:
    """All whole lines of a metrics.jsonl; a torn last line is left out."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_bytes().split(b"\n"):
        try:
            events.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [event for event in events if isinstance(event, dict)]
