"""What an arena run measured, as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

UNKNOWN = math.nan


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval; NaN where it was not measured, `n` seeds where it is a mean over them."""

    value: float = UNKNOWN
    low: float = UNKNOWN
    high: float = UNKNOWN
    n: int = 1

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return math.isfinite(self.value)

    @property
    def bounded(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals share a point; true where either has none, since then nothing is shown."""
        if not (self.bounded and other.bounded):
            return True
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True, slots=True)
class Moments:
    """One score of the held-out rows: before the first episode, at the end, and at its best."""

    initial: Estimate = Estimate()
    final: Estimate = Estimate()
    best: Estimate = Estimate()

    @property
    def gain(self) -> float:
        """From the first to the last, as a share of one."""
        return self.final.value - self.initial.value


@dataclass(frozen=True, slots=True)
class Split:
    """What a gain of exact match is made of, row by row, in shares of all rows; NaN where it was not measured.

    Args:
        known: rows that were right before training in some reading: as asked, stated, or in pretraining's wording.
        elicited: rows that are right at the end and were not as they were asked, though known: elicitation of the
            format.
        learnt: rows that are right at the end and were in no reading before: learning.
        lost: rows that were right before, as they were asked, and are not at the end.
    """

    known: float = UNKNOWN
    elicited: float = UNKNOWN
    learnt: float = UNKNOWN
    lost: float = UNKNOWN


@dataclass(frozen=True, slots=True)
class Scores:
    """What was measured on some held-out rows.

    Args:
        rows: how many rows.
        exact: the strict score, exact match.
        stated: the lenient score: the right answer stands in the text, by written rules.
        plain: exact match of the same rows in the wording of pretraining; unknown where there is none.
        split: what the gain of exact match is made of.
    """

    rows: int
    exact: Moments
    stated: Moments
    plain: Moments
    split: Split = Split()


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of learning: its episodes and what the held-out exact match gained over them."""

    name: str
    begin: int
    end: int
    gain: float


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation on the held-out rows and, where it was made, on the general probe."""

    episode: int
    exact: Estimate
    stated: float
    kinds: Mapping[str, float]
    probe: float


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode of the log: 1 or 0 for an answer that was right or wrong, NaN for one not asked for."""

    number: int
    kind: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class ArenaRun:
    """A finished arena run.

    Args:
        path: its folder.
        name: what figures and tables call it.
        results: all of results.json.
        scores: over all held-out rows.
        kinds: of each kind's held-out rows, in the run's order of kinds.
        phases: of learning, in order; one to three.
        history: every evaluation, in order of episodes.
        probe: before and after, by metric, of the general probe; empty where none was scored.
        trainable: trained parameters.
        total: all parameters.
        seconds_per_episode: the median, without evaluation.
        adapted: of a meta-learner: exact match after adapting to a few rows of each kind.
        inferred: of a method that is told each row's kind: exact match where it infers the kind.
        log: every episode, in order; empty where metrics.jsonl is gone.
        config: the settings in config.yaml; empty where it is gone.
    """

    path: Path
    name: str
    results: Mapping[str, Any]
    scores: Scores
    kinds: Mapping[str, Scores]
    phases: tuple[Phase, ...]
    history: tuple[Point, ...]
    probe: Mapping[str, tuple[float, float]]
    trainable: int
    total: int
    seconds_per_episode: float
    adapted: Moments = Moments()
    inferred: Moments = Moments()
    log: tuple[Episode, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """How it learns: lora, soft-prompt, full, multi-lora, reptile or maml."""
        return str(self.results["method"])

    @property
    def model(self) -> str:
        """What it started from, as it was named."""
        return str(self.results["model"])

    @property
    def seed(self) -> int:
        """The seed of all its draws."""
        return int(self.results["seed"])

    @property
    def episodes(self) -> int:
        """How many episodes it learnt from or passed."""
        return int(self.results["episodes"])

    def blocks(self) -> list[tuple[str, int, int]]:
        """Drift blocks as kind, first and last episode; empty where the stream does not drift in blocks."""
        found: list[tuple[str, int, int]] = []
        for episode in self.log if self.results.get("drift") == "blocks" else ():
            if found and found[-1][0] == episode.kind:
                found[-1] = (episode.kind, found[-1][1], episode.number)
            else:
                found.append((episode.kind, episode.number, episode.number))
        return found

    def probe_change(self) -> tuple[str, float]:
        """The metric that stands for the general probe, and its change; empty and NaN where there is none."""
        for metric in ("exact_match", "loss"):
            if metric in self.probe and not any(map(math.isnan, self.probe[metric])):
                before, after = self.probe[metric]
                return metric, after - before
        return "", UNKNOWN
