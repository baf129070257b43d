"""What the outside world is told while a model is trained: experiment trackers, and functions of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Callback:
    """Told of everything, decides nothing: plain values come in, and what is returned is ignored.

    Override what is wanted. `event` hands each event to the method `on_<name>` where there is one, so that
    `def on_evaluation(self, row, task, metrics, **rest)` is enough to see every score.

    Events, with the values that metrics.jsonl holds for them: "task" (a task begins), "step" (an optimizer step),
    "epoch" (an epoch ends), "evaluation" (a task was scored), "skipped" (a step was left out), "drift" (how far the
    weights moved in a task), "task_end".
    """

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Training begins, or goes on.

        Args:
            facts: settings, strategy, seed, tasks, as plain values.
        """

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        """Something happened.

        Args:
            name: of the event.
            values: what metrics.jsonl holds for it; plain, with None for nan.
        """
        method = getattr(self, f"on_{name}", None)
        if method is not None:
            method(**values)

    def end(self, results: Mapping[str, Any], files: Sequence[Path] = ()) -> None:
        """Training ended.

        Args:
            results: what results.json holds.
            files: those that were written.
        """
