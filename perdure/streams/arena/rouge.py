"""ROUGE-L: how much of a summary stands in the reference in the same order."""

from __future__ import annotations

from collections.abc import Sequence

from perdure.streams.arena.item import normalise


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of normalised words; 0 where either has none.

    With n common words in order, precision is n / words of `text`, recall n / words of `reference`.

    Source: Lin, 2004, ROUGE: A Package for Automatic Evaluation of Summaries; precision and recall weigh alike.
    """
    given, wanted = normalise(text).split(), normalise(reference).split()
    common = longest_common_subsequence(given, wanted)
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """How many words two texts have in common in the same order, gaps allowed; O(len(first) · len(second))."""
    row = [0] * (len(second) + 1)
    for word in first:
        above = row
        row = [0]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
    return row[-1]
