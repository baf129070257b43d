"""Runs whose strategy is told tasks: what they score told, and what they score when they infer the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from perdure.report.read import INFERRED, Run, same

TOLD, GUESSED, EITHER = "task told", "task inferred", "task told or inferred"


def apart(runs: Sequence[Run], metric: str) -> list[Run]:
    """The runs that have a metric; one that is told tasks stands twice, by the names "x (task told)" and inferred.

    The second holds inferred scores under the names of the told ones.
    """
    out: list[Run] = []
    for run in runs:
        if metric not in run.scores:
            continue
        out.append(replace(run, name=f"{run.name} ({TOLD})") if run.told else run)
        if metric + INFERRED in run.scores:
            out.append(inferred(run))
    return out


def apart_where_they_differ(runs: Sequence[Run], metric: str) -> list[Run]:
    """As `apart`, but a run whose inferred scores are the told ones stands once: a figure has nothing to add."""
    out: list[Run] = []
    for run in runs:
        other = run.scores.get(metric + INFERRED)
        if other is not None and metric in run.scores and same(run.scores[metric], other):
            out.append(replace(run, name=f"{run.name} ({EITHER})"))
        else:
            out += apart([run], metric)
    return out


def inferred(run: Run) -> Run:
    """The run as it scores without being told tasks."""

    def own(metric: str) -> str:
        return metric.removesuffix(INFERRED)

    found = {own(metric): table for metric, table in run.scores.items() if metric.endswith(INFERRED)}
    return replace(
        run,
        name=f"{run.name} ({GUESSED})",
        scores={metric: replace(table, metric=metric) for metric, table in found.items()},
        summaries={own(m): summary for m, summary in run.summaries.items() if m.endswith(INFERRED)},
        evaluations=tuple(
            {**event, "metrics": {own(m): x for m, x in event["metrics"].items() if m.endswith(INFERRED)}}
            for event in run.evaluations
        ),
    )


def told_metrics(run: Run) -> list[str]:
    """The metrics that have a place of their own; inferred ones stand beside those that they belong to."""
    return [m for m in run.scores if not (m.endswith(INFERRED) and m.removesuffix(INFERRED) in run.scores)]
