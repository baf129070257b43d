"""What is told of a run while it runs: its own log, and experiment trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from perdure.errors import ConfigError, unknown_name
from perdure.tracking.log import MetricsLog, find_mark, read_events
from perdure.tracking.mlflow import MLflow
from perdure.tracking.state import forget, untracked
from perdure.tracking.tensorboard import TensorBoard
from perdure.tracking.tracker import Tracker

__all__ = [
    "TRACKERS",
    "MLflow",
    "MetricsLog",
    "TensorBoard",
    "Tracker",
    "build",
    "find_mark",
    "forget",
    "read_events",
    "untracked",
]

TRACKERS: dict[str, type[MLflow] | type[TensorBoard]] = {"mlflow": MLflow, "tensorboard": TensorBoard}
"""The trackers by the names that `--track` takes."""


def build(
    names: Iterable[str], folder: Path | None = None, say: Callable[[str], None] | None = None
) -> tuple[Tracker, ...]:
    """The trackers of these names, each once, ready to begin.

    Args:
        names: keys of `TRACKERS`.
        folder: the run's folder, which need not exist yet.
        say: tells a person where to look and what went wrong; None raises Python warnings for the latter.

    Raises:
        ConfigError: an unknown name, an extra that is not installed, or a store that cannot be reached.
    """
    chosen = tuple(dict.fromkeys(names))
    for name in chosen:
        if name not in TRACKERS:
            raise ConfigError(f"--track: {unknown_name('tracker', name, TRACKERS)}")
    trackers = tuple(TRACKERS[name](say=say) for name in chosen)
    for tracker in trackers:
        tracker.check(folder)
    return trackers
