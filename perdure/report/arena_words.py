"""Numbers of arena runs in words: scores with intervals, what is elicitation and what is learning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from perdure.report import words
from perdure.report.arena_pool import Group
from perdure.report.arena_run import ArenaRun, Estimate, Moments, Scores

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


@dataclass(frozen=True, slots=True)
class Split:
    """A gain of exact match, in shares of one, as what was there before and what came by learning.

    Args:
        known: what was answered before training in the best reading: as asked, stated, or in pretraining's wording.
        elicited: the part of the gain up to `known`: elicitation of the format.
        learnt: the part above it: learning. Rates are compared, not rows, so neither part is a bound.
    """

    known: float
    elicited: float
    learnt: float


def split(initial: float, final: float, before: Iterable[float]) -> Split:
    """Part a gain at the best of the scores `before` training; those that are NaN are left out.

    Below that score a model may only have learnt how an answer is to look. What is above it, it answered in no
    reading before. Both are bounds: some answers may have been learnt while others were lost.
    """
    known = max([initial, *(x for x in before if math.isfinite(x))])
    return Split(known, max(0.0, min(final, known) - initial), max(0.0, final - known))


def split_kind(scores: Scores) -> Split:
    """The split of one kind's gain."""
    exact = scores.exact
    return split(exact.initial.value, exact.final.value, [scores.stated.initial.value, scores.plain.initial.value])


def split_run(run: ArenaRun) -> Split:
    """The split of the gain over all held-out rows.

    A kind that has no wording of pretraining counts with its own best score in that reading, so that all readings
    are over the same rows.
    """
    kinds = list(run.kinds.values())
    rows = sum(scores.rows for scores in kinds)
    plain = [
        split_kind(scores).known if math.isnan(scores.plain.initial.value) else scores.plain.initial.value
        for scores in kinds
    ]
    reworded = sum(x * scores.rows for x, scores in zip(plain, kinds, strict=True)) / rows if rows else math.nan
    exact, stated = run.scores.exact, run.scores.stated
    return split(exact.initial.value, exact.final.value, [stated.initial.value, reworded])


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
    known, elicited, learnt = (
        group.value(lambda run, key=key: getattr(split_run(run), key)).value  # type: ignore[misc]
        for key in ("known", "elicited", "learnt")
    )
    return (
        f"Of the gain of {unsigned(gain)} points {unsigned(elicited)} go up to what could be answered before, "
        f"in the best reading ({words.value(SHARE, known)}): elicitation of the format. "
        f"{unsigned(learnt)} lie above it: learning. "
        "Rates are compared, not rows, so neither is a bound."
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
