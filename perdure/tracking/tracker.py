"""What all trackers share: events become points, gather, and are sent beside the training, which never waits."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from perdure.callbacks import Callback
from perdure.errors import ConfigError
from perdure.tracking.log import read_events

SECONDS, POINTS = 5.0, 500  # what gathers before it is sent
PAUSE = 30.0  # seconds after a first failure before the next attempt; doubled by each further one
# Facts that say where, or how far, and not what is done.
NO_PARAMETERS = {"folder", "log", "name", "settings", "finished", "steps", "seconds", "tasks", "stages", "probe"}


@dataclass(frozen=True, slots=True)
class Point:
    """What is known at one step.

    Attributes:
        step: optimizer steps so far.
        scalars: values by name; finite.
        stage: number of the stage, from 1; 0 before the first.
        task: the stage's name.
        time: seconds since 1970.
    """

    step: int
    scalars: Mapping[str, float]
    stage: int
    task: str
    time: float


class Tracker(Callback):
    """A callback that hands what it is told to an experiment tracker.

    Failures after `check` are told of once and do not raise: what could not be sent waits and is tried again, the
    last time at the end. A run that goes on has its log read first, so that nothing is missing.

    Facts it knows: "name", "folder" (of the run), "log" (the run's metrics.jsonl, where the run may be going on);
    everything else in them is a parameter.

    Args:
        say: tells a person where to look and what went wrong; None raises Python warnings for the latter.

    Raises:
        ConfigError: the extra is not installed.
    """

    name: ClassVar[str]

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        if importlib.util.find_spec(self.name) is None:
            raise ConfigError(f'{self.name} is not installed; it is an extra: pip install "perdure[{self.name}]"')
        self._tell = say
        self._facts: Mapping[str, Any] = {}
        self._running = False
        self._stage, self._task = 0, ""
        self._waiting: list[Point] = []
        self._under_way: list[Point] = []
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failing = False
        self._sent_at = 0.0
        self._retry_at, self._pause = 0.0, PAUSE

    # What each tracker does in its own way

    def check(self, folder: Path | None = None) -> None:
        """Find out, before anything heavy is done, whether there is something to send to.

        Raises:
            ConfigError: there is not.
        """

    @abstractmethod
    def _open(self, facts: Mapping[str, Any]) -> str:
        """Take the run up; returns how to look at it."""

    @abstractmethod
    def _send(self, points: list[Point]) -> None:
        """Send the points, and remove from the list those that were sent."""

    @abstractmethod
    def _finish(self, results: Mapping[str, Any], files: Sequence[tuple[Path, str]]) -> None:
        """Send the summary and the files, each with its name in the run."""

    @abstractmethod
    def _close(self, status: str) -> None:
        """Let go of the run: "FINISHED", "FAILED" or "KILLED"."""

    # Callback

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Take the run up, and send what its log already holds."""
        first = not self._facts
        self._facts = {**self._facts, **facts}
        if self._running:
            return
        note = self._open(self._facts)
        self._running, self._sent_at = True, time.monotonic()
        if first:
            if self._tell is not None and note:
                self._tell(f"{self.name}: {note}")
            if "log" in facts:
                for event in read_events(Path(facts["log"])):
                    self._gather(str(event.get("event")), event)
                self._flush(wait=True)

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        """Gather what an event says; now and then send what has gathered."""
        if not self._running:  # after an end: training goes on
            self.begin(self._facts)
        self._gather(name, values)
        if len(self._waiting) >= POINTS or time.monotonic() - self._sent_at >= SECONDS:
            self._flush()

    def end(self, results: Mapping[str, Any], files: Sequence[Path] = ()) -> None:
        """Send what is left, the summary and the files."""
        if not self._running:
            return
        folder = self._facts.get("folder")
        try:
            self._flush(wait=True)
            if self._waiting:
                return  # told of already
            self._finish(results, [(path, _name(path, folder)) for path in files])
        except Exception as error:
            self._failed(error)
        finally:
            self._let_go("FINISHED" if results.get("finished", True) else "FAILED")

    def stop(self, status: str = "FAILED") -> None:
        """Training stopped before its end: send what is left."""
        if self._running:
            self._flush(wait=True)
            self._let_go(status)

    # Gathering and sending

    def _gather(self, name: str, values: Mapping[str, Any]) -> None:
        self._stage = int(values.get("stage", self._stage))
        if name in ("task", "step") and "task" in values:
            self._task = str(values["task"])
        scalars = dict(_scalars(name, values))
        if scalars:
            step = int(values.get("step") or 0)
            self._waiting.append(Point(step, scalars, self._stage, self._task, time.time()))

    def _flush(self, wait: bool = False) -> None:
        """Send what has gathered: in a thread of its own, or at once and to the end."""
        if self._thread is not None:
            if self._thread.is_alive() and not wait:
                return  # what gathers meanwhile goes next time
            self._thread.join()
            self._thread = None
            self._collect()
        if not self._waiting or (self._failing and not wait and time.monotonic() < self._retry_at):
            return
        self._sent_at = time.monotonic()
        self._under_way, self._waiting = self._waiting, []
        if wait:
            self._deliver()
            self._collect()
        else:
            self._thread = threading.Thread(target=self._deliver, name=f"perdure-{self.name}", daemon=True)
            self._thread.start()

    def _deliver(self) -> None:
        try:
            self._send(self._under_way)
        except Exception as error:
            self._error = error

    def _collect(self) -> None:
        error, self._error = self._error, None
        self._waiting[:0], self._under_way = self._under_way, []
        if error is not None:
            self._failed(error)
        elif self._failing:
            self._failing, self._pause = False, PAUSE

    def _failed(self, error: Exception) -> None:
        if not self._failing:
            text = f"{self.name}: {reason(error)}; the run goes on, and what is not sent yet is tried again later"
            if self._tell is not None:
                self._tell(f"warning: {text}")
            else:
                warnings.warn(text, stacklevel=2)
        self._failing = True
        self._retry_at, self._pause = time.monotonic() + self._pause, 2 * self._pause

    def _let_go(self, status: str) -> None:
        self._running = False
        try:
            self._close(status)
        except Exception as error:
            self._failed(error)


def reason(error: BaseException) -> str:
    """An error's first line, cut to what fits a message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:200] + " ..."


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys; lists without mappings stay whole, as JSON; what is unset is left out."""
    if isinstance(value, Mapping):
        inner = {str(key): part for key, part in value.items()}
    elif isinstance(value, list | tuple) and any(isinstance(part, Mapping | list | tuple) for part in value):
        inner = {str(i): part for i, part in enumerate(value)}
    elif isinstance(value, list | tuple):
        return {prefix: json.dumps(list(value), ensure_ascii=False, default=str)} if value else {}
    else:
        return {} if value is None else {prefix: value}
    found: dict[str, Any] = {}
    for key, part in inner.items():
        found |= flat(part, f"{prefix}.{key}" if prefix else key)
    return found


def parameters(facts: Mapping[str, Any]) -> dict[str, Any]:
    """All that the facts say of how the model is trained: settings by their own keys, then the rest."""
    rest = {key: value for key, value in facts.items() if key not in NO_PARAMETERS}
    return flat(facts.get("settings") or {}) | flat(rest)


def summary(results: Mapping[str, Any]) -> dict[str, float]:
    """The figures of results.json that stand for the whole run, as "summary/<metric>/<figure>"."""
    found = {f"summary/{key}": results[key] for key in ("seconds", "steps", "memory") if key in results}
    for metric, figures in (results.get("metrics") or {}).items():
        found |= {f"summary/{metric}/{key}": value for key, value in figures.items()}
    return {key: float(value) for key, value in found.items() if _is_number(value)}


def _scalars(name: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What an event measured, by the name under which it is tracked."""
    found: dict[str, Any] = {}
    if name in ("step", "epoch"):
        group = "train" if name == "step" else "epoch"
        found = {f"{group}/{key}": value for key, value in values.items() if key not in ("step", "stage")}
        found |= {f"{group}/{metric}": value for metric, value in (values.get("metrics") or {}).items()}
    elif name == "evaluation":
        found = {f"{metric}/{values.get('task')}": value for metric, value in values.get("metrics", {}).items()}
    elif name == "probe":
        found = {f"probe/{metric}": value for metric, value in values.get("metrics", {}).items()}
    elif name == "skipped":
        found = {"train/skipped": 1}
    for key, value in found.items():
        if _is_number(value):
            yield key, float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0


def _name(path: Path, folder: Any) -> str:
    """A file's name in the run: its path below the folder, or its own."""
    if folder is not None and path.resolve().is_relative_to(Path(folder).resolve()):
        return path.resolve().relative_to(Path(folder).resolve()).as_posix()
    return path.name
