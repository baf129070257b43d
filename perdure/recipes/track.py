"""Trackers of a run: ended with its files, stopped where it stops, and told of a run that is finished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perdure.recipes.show import read_results
from perdure.tracking import Tracker, build
from perdure.training.display import Display
from perdure.training.folder import RunFolder

FILES = ("config.yaml", "results.json", "scores*.csv", "report.html", "plots/*.png")


@contextmanager
def stopped(trackers: Sequence[Tracker]) -> Iterator[None]:
    """Stop the trackers where the block raises: as killed where the run was asked to stop, else as failed."""
    from perdure.training.interrupt import Interrupted

    try:
        yield
    except BaseException as error:
        for tracker in trackers:
            tracker.stop("KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED")
        raise


def end(trackers: Sequence[Tracker], results: Mapping[str, Any], folder: RunFolder) -> None:
    """End the trackers with what the run's folder shows of it."""
    files: list[Path] = [path for pattern in FILES for path in sorted(folder.path.glob(pattern))]
    for tracker in trackers:
        tracker.end(results, files)


def track_finished(folder: RunFolder, names: Sequence[str], display: Display) -> None:
    """Tell trackers of a finished run what they do not know of it yet."""
    if not names:
        return
    from perdure.training.telling import facts_of

    trackers = build(names, folder.path, display.say)
    with folder.locked(), stopped(trackers):
        for tracker in trackers:
            tracker.begin(facts_of(folder, folder.settings(), folder.recorded()))
        end(trackers, read_results(folder.path), folder)
