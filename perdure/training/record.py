"""What happens in a run: line by line in its log, and to whoever listens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perdure.callbacks import Callback
from perdure.storage import plain
from perdure.tracking import MetricsLog, find_mark


class Record:
    """The log of a run, and its callbacks.

    Args:
        path: of the log.
        callbacks: told of every event.
    """

    def __init__(self, path: Path, callbacks: Sequence[Callback] = ()) -> None:
        self._path = path
        self._callbacks = tuple(callbacks)
        self._log: MetricsLog | None = None

    def open(self, mark: str | None) -> Mapping[str, Any] | None:
        """Take up the log where it stood at a checkpoint: later lines are of steps that will be taken again.

        Args:
            mark: the checkpoint's name; None: the log starts afresh.

        Returns:
            What the checkpoint's own line says; None where there is none.
        """
        found = find_mark(self._path, mark) if mark else None
        self._log = MetricsLog(self._path, found[0] if found else 0)
        return found[1] if found else None

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Tell the callbacks what run this is."""
        for callback in self._callbacks:
            callback.begin(facts)

    def write(self, event: str, **values: Any) -> None:
        """Write an event, and tell it."""
        assert self._log is not None
        self._log.write(event, **values)
        self.tell(event, **values)

    def tell(self, event: str, **values: Any) -> None:
        """Tell an event that is not written."""
        if self._callbacks:
            told = plain(values)
            for callback in self._callbacks:
                callback.event(event, told)

    def sync(self) -> None:
        """Have on disk what was written."""
        assert self._log is not None
        self._log.sync()

    def close(self) -> None:
        """Close the log, if it was opened."""
        if self._log is not None:
            self._log.close()
