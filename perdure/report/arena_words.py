"""Numbers of arena runs in words: scores with intervals, what is elicitation and what is learning."""

from __future__ import annotations

import math
from collections.abc import Callable

from perdure.report import words
from perdure.report.arena_pool import Group
from perdure.report.arena_run import ArenaRun, Estimate, Moments

SHARE = "exact_match"


def score(one: Estimate, *, unit: bool = True) -> str:
    """A share in percent with its interval: "78.0 % (74.1–81.4)"; without the interval where there is none."""
    value = words.value(SHARE, one.value).removesuffix("" if unit else " %")
    return f"{value} ({ends(one)})" if one.known and one.bounded else value


def ends(one: Estimate) -> str:
    """The interval alone, in percent without its sign."""
    low, high = (words.value(SHARE, x).removesuffix(" %") for x in (one.low, one.high))
    return f"{low}–{high}"


def points(x: float) -> str:
    """A difference of shares in points, with its sign and without the unit."""
    return words.value(SHARE, x, signed=True).removesuffix(" pt")


def unsigned(x: float) -> str:
    """A difference of shares in points, without sign and unit."""
    return words.value(SHARE, abs(x)).removesuffix(" %")


def seconds(x: float) -> str:
    """Seconds of an episode with the digits that matter."""
    return "–" if math.isnan(x) else f"{x:.3f}" if x < 1 else f"{x:.1f}"


def reworded(group: Group) -> str:
    """Which kinds the scores in the wording of pretraining are of, where not of all: "4 of 5 kinds"."""
    kinds = group.first.kinds.values()
    found = sum(not math.isnan(scores.plain.initial.value) for scores in kinds)
    return "" if found in (0, len(kinds)) else f"{found} of {len(kinds)} kinds"


def elicitation(group: Group) -> str:
    """A sentence on how much of the gain is elicitation of the format and how much is learning."""
    gain = group.value(lambda run: run.scores.exact.gain).value
    if math.isnan(gain) or gain <= 0:
        return "Exact match did not rise."
    known, elicited, learnt, lost = (
        group.value(lambda run, key=key: getattr(run.scores.split, key)).value  # type: ignore[misc]
        for key in ("known", "elicited", "learnt", "lost")
    )
    if math.isnan(known):
        return "What of the gain is learning was not measured."
    return (
        f"Before training {words.value(SHARE, known)} of the rows were right in some reading. The gain of "
        f"{unsigned(gain)} points: {unsigned(elicited)} are rows known in another reading (elicitation of the "
        f"format), {unsigned(learnt)} rows that were right in none (learning)"
        + (f", less {unsigned(lost)} of rows that were right and are no longer." if lost else ".")
    )


def other_scores(group: Group) -> list[str]:
    """Sentences on scores that only some methods have: adapted to a few rows, or with kinds inferred."""
    out = []
    how = group.first.results.get("adapted") or {}
    for name, of in ADDED.items():
        before, after = (
            group.value(lambda run, of=of, m=m: getattr(of(run), m).value).value  # type: ignore[misc]
            for m in ("initial", "final")
        )
        if not (math.isnan(before) and math.isnan(after)):
            start, end = (words.value(SHARE, x) for x in (before, after))
            text = name.format(shots=how.get("shots", "a few"), steps=how.get("steps", "a few"))
            out.append(f"{text}: {start} before the episodes, {end} after them.")
    return out


ADDED: dict[str, Callable[[ArenaRun], Moments]] = {
    "After adapting to {shots} rows of a kind in {steps} steps": lambda run: run.adapted,
    "The scores are of a model that is told each row's kind; where it infers the kind": lambda run: run.inferred,
}
