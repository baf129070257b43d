"""Tables of lessons on nano, from the cells that there are."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.study_report import interval
from perdure.evaluation.intervals import wilson

Result = dict[str, Any]
# How a reason not to keep a lesson begins -> its column.
REASONS = {
    "it was not learnt": "not learnt",
    "it breaks": "earlier answers",
    "other wordings": "other wordings",
    "the probe": "probe",
}


def lessons(found: Mapping[str, Sequence[Result]]) -> str:
    """A line for each way of teaching: what was kept, what is still right, what it cost."""
    lines = [
        "| run | seeds | kept | not learnt | refused by the gate | right at the end, of those taught, % "
        "| of those kept, % | probe before | after | change | KL from the base | seconds a lesson |",
        "|---|" + "---:|" * 11,
    ]
    parts: list[tuple[Callable[[Result], float], float, int]] = [
        (lambda r: sum(one["kept"] for one in r["lessons"]), 1, 1),
        (lambda r: sum(not one["learnt"] for one in r["lessons"]), 1, 1),
        (lambda r: sum(one["learnt"] and not one["kept"] for one in r["lessons"]), 1, 1),
        (lambda r: statistics.mean(one["right"] for one in r["lessons"]), 100, 1),
        (lambda r: statistics.mean(one["right"] for one in r["lessons"] if one["kept"]), 100, 1),
        (lambda r: r["probe"][0], 100, 1),
        (lambda r: r["probe"][1], 100, 1),
        (lambda r: r["probe"][1] - r["probe"][0], 100, 1),
        (lambda r: r["kl"], 1, 3),
    ]
    for name, results in found.items():
        cells = [spread([scale * part(one) for one in results], digits) for part, scale, digits in parts]
        median = statistics.median(one["seconds"] for result in results for one in result["lessons"])
        lines.append(f"| {name} | {len(results)} | " + " | ".join(cells) + f" | {median:.2f} |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± half the 95 % interval; the value itself where all are equal."""
    middle, half = interval(values)
    return f"{middle:.{digits}f}" + (f" ± {half:.{digits}f}" if half > 0 else "")


def seconds(found: Sequence[Result]) -> str:
    """How long a lesson takes, by the clock."""
    taken = [one["seconds"] for result in found for one in result["lessons"]]
    if not taken:
        return ""
    return (
        f"a lesson, gate and files included: median {statistics.median(taken):.2f} s, 95th percentile "
        f"{np.quantile(taken, 0.95):.2f} s ({len(taken)} lessons, {found[0]['threads']} thread)"
    )


def caught(found: Sequence[Result]) -> str:
    """What of the drawn lessons was not kept, and why; a lesson may have several reasons."""
    lines = [
        "| lesson | draws | not kept | 95 % interval, % | learnt | steps | " + " | ".join(REASONS.values()) + " |"
    ]
    lines.append("|---|" + "---:|" * (5 + len(REASONS)))
    for sort in found[0]["drawn"] if found else ():
        drawn = [one for result in found for one in result["drawn"][sort]]
        refused = [one for one in drawn if not one["kept"]]
        low, high = wilson(len(refused), len(drawn))
        cells = [str(len(drawn)), str(len(refused)), f"{100 * low:.1f} to {100 * high:.1f}"]
        cells += [
            str(sum(one["learnt"] for one in drawn)),
            f"{statistics.median(one['steps'] for one in drawn):.0f}",
        ]
        cells += [str(sum(reason in one["why"] for one in refused)) for reason in REASONS.values()]
        lines.append(f"| {sort} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
