"""Counts of a run: rows, targets and replays in all, and how often each row of a stage was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from perdure.training.learner import StepResult
from perdure.types import TASK


class Tally:
    """What the steps of a run came to.

    Attributes:
        seconds: of training; not part of the state, since equal runs have equal checkpoints.
        skipped: steps that were left out.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.skipped = 0
        self._totals = {"rows": 0, "targets": 0, "replayed_rows": 0, "replayed_targets": 0}
        self._seen: dict[str, list[int]] = {}

    def count(self, result: StepResult, step: int, first: bool) -> None:
        """Count a step.

        Args:
            result: what it did.
            step: its number.
            first: whether it was in the first stage, where there is nothing to replay: its rows would only thin the
                shares.
        """
        self.skipped += result.skipped is not None
        if not first:
            self._totals["rows"] += result.rows
            self._totals["targets"] += result.targets
        self._totals["replayed_rows"] += result.replayed_rows
        self._totals["replayed_targets"] += result.replayed_targets
        if not (result.skipped or result.overflow):
            self._see(result, step)

    def _see(self, result: StepResult, step: int) -> None:
        for example in result.examples:
            name = f"{example.task}\0{example.key}"
            counts = self._seen.setdefault(name, [0, 0, step, 0])
            counts[0 if example.source == TASK else 1] += 1
            counts[3] = step

    def end_stage(self) -> str:
        """A line for each row of the stage: task, key, times trained on and replayed, first step and last step."""
        lines = [json.dumps([*name.split("\0"), *counts]) + "\n" for name, counts in sorted(self._seen.items())]
        self._seen = {}
        return "".join(lines)

    def replay(self) -> dict[str, Any] | None:
        """What was replayed, and its shares from the second stage on; None where nothing was."""
        totals = self._totals
        if not totals["replayed_rows"]:
            return None
        return {
            "rows": totals["replayed_rows"],
            "row_share": totals["replayed_rows"] / totals["rows"],
            "targets": totals["replayed_targets"],
            "target_share": totals["replayed_targets"] / totals["targets"],
        }

    def state_dict(self) -> dict[str, Any]:
        """All but the seconds."""
        return {"totals": {"skipped": self.skipped, **self._totals}, "seen": self._seen}

    def load_totals(self, state: Mapping[str, Any]) -> None:
        """Take up the counts, but not which rows were seen."""
        totals = dict(state["totals"])
        self.skipped = totals.pop("skipped")
        self._totals |= totals

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what was saved."""
        self.load_totals(state)
        self._seen = state["seen"]
