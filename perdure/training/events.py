"""What a trainer tells: every event as a line of metrics.jsonl, and to callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perdure.callbacks import Callback
from perdure.errors import ConfigError
from perdure.storage import plain
from perdure.tracking import MetricsLog


class Events:
    """The events of a training. Each is in the log before any callback is told of it.

    Args:
        log: the path of metrics.jsonl; None writes nothing.
        callbacks: who is told.

    Raises:
        ConfigError: a callback is none.
    """

    def __init__(self, log: Path | None, callbacks: Sequence[Callback]) -> None:
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise ConfigError(f"callbacks must be perdure.callbacks.Callback objects, got {callback!r}")
        self._path = log
        self._log: MetricsLog | None = None
        self._log_size = 0
        self._waiting = list(callbacks)  # for their `begin`
        self._begun: list[Callback] = []
        self._untold: list[tuple[str, dict[str, Any]]] = []

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Let callbacks begin that have not yet; the first error of one of them is raised at once."""
        while self._waiting:
            self._waiting[0].begin(plain(facts))
            self._begun.append(self._waiting.pop(0))

    def write(self, name: str, **values: Any) -> None:
        """Write an event to the log; callbacks wait until `tell`."""
        if self._path is not None:
            if self._log is None:
                self._log = MetricsLog(self._path, self._log_size)
            self._log.write(name, **values)
        if self._begun:
            self._untold.append((name, values))

    def tell(self) -> None:
        """Tell callbacks what was written since the last time.

        All of them hear all of it; then the first error is raised.
        """
        events, self._untold = self._untold, []
        self._all([lambda c, n=name, v=values: c.event(n, plain(v)) for name, values in events])

    def forget(self) -> None:
        """Leave untold what is written and was not told yet."""
        self._untold = []

    def end(self, results: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Let callbacks end that have begun, each once; then the first error is raised."""
        try:
            self._all([lambda c: c.end(results, files)])
        finally:
            self._begun = []

    def rest(self) -> None:
        """Close the log until the next event."""
        if self._log is not None:
            self._log.close()
            self._log_size, self._log = self._log.size, None

    def _all(self, calls: Sequence[Callable[..., None]]) -> None:
        errors: list[Exception] = []
        for call in calls:
            for callback in self._begun:
                try:
                    call(callback)
                except Exception as error:
                    errors.append(error)
        if errors:
            raise errors[0]
