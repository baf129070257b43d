"""The summary of a run: scores with their direction, by task, and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perdure.config import FORMAT
from perdure.evaluation.matrix import ScoreMatrix
from perdure.evaluation.score import HIGHER_IS_BETTER, MAIN
from perdure.storage import plain, write_json


def main_metric(matrices: Mapping[str, ScoreMatrix]) -> str:
    """The metric that stands for a run: exact match of a language model where it was measured, R² of a regression,
    else the loss.

    Also where it is 0 throughout, so that equal recipes are told of by equal metrics. results.json states it, and
    the tables and the page take it from there.
    """
    known = (*MAIN["regression"], *MAIN["causal_lm"])
    return next((name for name in known if name in matrices), "loss")


def new_matrix(metric: str) -> ScoreMatrix:
    """An empty matrix of a metric whose direction is known."""
    return ScoreMatrix(metric, HIGHER_IS_BETTER[metric])


def write_scores(folder: Path, matrices: Mapping[str, ScoreMatrix], main: str) -> None:
    """One CSV a metric: scores.csv for the main one, scores_<metric>.csv for the others; older ones are removed."""
    files = {"scores.csv" if name == main else f"scores_{name}.csv": matrix for name, matrix in matrices.items()}
    for path in folder.glob("scores*.csv"):
        if path.name not in files:
            path.unlink()
    for name, matrix in files.items():
        matrix.to_csv(folder / name)


def write_results(
    folder: Path,
    facts: Mapping[str, Any],
    matrices: Mapping[str, ScoreMatrix],
    main: str,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """results.json; returns what was written. `beside` holds more values of metrics, by metric."""
    results = summarise(facts, matrices, main, beside)
    write_json(folder / "results.json", results)
    return results


def summarise(
    facts: Mapping[str, Any],
    matrices: Mapping[str, ScoreMatrix],
    main: str,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What results.json holds."""
    more = beside or {}
    results: dict[str, Any] = plain(
        {
            "format": FORMAT,
            **facts,
            "main_metric": main,
            "metrics": {name: {**matrix.summary(), **more.get(name, {})} for name, matrix in matrices.items()},
            "scores": {name: matrix.to_dict() for name, matrix in matrices.items()},
        }
    )
    return results
