"""What a score matrix says about a stream: average, forgetting, transfer. Knows numpy and nothing else.

R is [T+1, T]: row 0 before any training, row i after the i-th task; column i is the i-th task. Any array-like does:
nested lists, numpy, a torch tensor. A cell that was not measured is NaN; it is left out of every mean, never
counted as zero, and a mean over nothing is NaN. Tasks are numbered from 1 in the formulas, as in the literature.

Averages are in the metric's own units and direction. Differences are turned for a loss or an error
(`higher_is_better=False`), so that forgetting is positive whenever something was lost, transfer is positive when it
helped, and intransigence is positive when the stream learnt less than training alone.

Sources: Lopez-Paz and Ranzato 2017 (backward and forward transfer); Chaudhry et al. 2018 (forgetting and
intransigence). Pairwise transfer is the plain difference of rows, of which both transfers are means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from perdure.errors import ConfigError

Matrix = NDArray[np.float64]


def average(R: ArrayLike, *, higher_is_better: bool = True) -> float:
    """Mean over tasks of the last row: mean_i R[T, i]. Every task weighs the same (macro)."""
    return mean(_matrix(R)[-1])


def micro_average(R: ArrayLike, counts: ArrayLike, *, higher_is_better: bool = True) -> float:
    """Mean over rows of data: Σ_i n_i R[T, i] / Σ_i n_i, over the tasks that were measured.

    Args:
        R: the scores, [T+1, T].
        counts: n, how many evaluation rows each task has, [T].
        higher_is_better: accepted for uniformity; an average has no sign to turn.
    """
    last = _matrix(R)[-1]
    weights = _vector(counts, len(last), "counts")
    if np.any(weights < 0):
        raise ConfigError(f"counts must not be negative, got {weights.tolist()}")
    measured = ~np.isnan(last) & (weights > 0)
    if not measured.any():
        return float("nan")
    return float(np.dot(last[measured], weights[measured]) / weights[measured].sum())


def backward_transfer(R: ArrayLike, *, higher_is_better: bool = True) -> float:
    """What later tasks did to earlier ones: Σ_{i<T} (R[T, i] − R[i, i]) / (T − 1).

    Negative when they were forgotten; NaN for one task, which has no later one.
    """
    R = _matrix(R)
    return mean(_difference(R[-1, :-1], _learnt(R)[:-1], higher_is_better))


def forgetting(R: ArrayLike, *, higher_is_better: bool = True) -> float:
    """How far below its best each earlier task ended: mean_{i<T} ( max_{1≤t<T} R[t, i] − R[T, i] ).

    The best counts from row 1, so also rows before task i was trained. For a loss it is the minimum, and the
    difference turns. Negative when the last task improved the others; NaN for one task.
    """
    return mean(_forgotten(_matrix(R), higher_is_better)[:-1])


def forward_transfer(R: ArrayLike, *, higher_is_better: bool = True) -> float:
    """What earlier tasks gave a task before its own training: mean_{i>1} ( R[i−1, i] − R[0, i] ).

    NaN for one task.
    """
    R = _matrix(R)
    just_before = np.diagonal(R)[1:]  # [T-1]: row i-1 in column i, for i = 2..T
    return mean(_difference(just_before, R[0, 1:], higher_is_better))


def pairwise_transfer(R: ArrayLike, *, higher_is_better: bool = True) -> Matrix:
    """What training each task did to each: R[t, i] − R[t−1, i] in row t and column i.

    Above the diagonal it is what a task gave later ones before their own training; the diagonal is what a task
    learnt in its own; below it is what later training did to it. Column i sums to R[T, i] − R[0, i]. The columns'
    sums below the diagonal, the last left out, average to the backward transfer; those above it, the first left
    out, to the forward transfer.

    Returns:
        [T, T]: row 0 is the first task's training, there being no row before it.
    """
    R = _matrix(R)
    return _difference(R[1:], R[:-1], higher_is_better)


def intransigence(R: ArrayLike, isolated: ArrayLike, *, higher_is_better: bool = True) -> float:
    """What the stream cost at learning: mean_i ( isolated_i − R[i, i] ).

    Args:
        R: the scores, [T+1, T].
        isolated: the score of each task when trained alone, [T].
        higher_is_better: False for a loss or an error.
    """
    R = _matrix(R)
    alone = _vector(isolated, R.shape[1], "isolated")
    return mean(_difference(alone, _learnt(R), higher_is_better))


def learning_accuracy(R: ArrayLike, *, higher_is_better: bool = True) -> float:
    """How well each task was learnt when it was trained: mean_i R[i, i]."""
    return mean(_learnt(_matrix(R)))


def anytime_average(R: ArrayLike, *, higher_is_better: bool = True) -> float:
    """How good the model was along the way: mean over t = 1..T of mean_{i≤t} R[t, i]."""
    R = _matrix(R)
    return mean(np.array([mean(R[t, :t]) for t in range(1, len(R))]))


def summary(
    R: ArrayLike,
    higher_is_better: bool = True,
    *,
    tasks: Sequence[str] | None = None,
    counts: ArrayLike | None = None,
    isolated: ArrayLike | None = None,
) -> dict[str, Any]:
    """All of it in one mapping, as `results.json` holds it (pass it through `matrix.json_safe` for strict JSON).

    Args:
        R: the scores, [T+1, T].
        higher_is_better: False for a loss or an error.
        tasks: names of the columns; "task 1", "task 2" ... by default.
        counts: evaluation rows of each task; adds `micro_average`.
        isolated: score of each task trained alone; adds `intransigence`.

    Returns:
        `average, forgetting, backward_transfer, forward_transfer, learning, anytime_average, higher_is_better`,
        `pairwise_transfer` (a list of rows) and `per_task`, which maps a name to `before` (row 0), `learnt` (after
        its own training), `final` (last row), `best` (over rows 1..T) and `forgetting` (NaN for the last task).
    """
    R = _matrix(R)
    names = [f"task {i + 1}" for i in range(R.shape[1])] if tasks is None else list(tasks)
    if len(names) != R.shape[1] or len(set(names)) != len(names):
        raise ConfigError(f"tasks must be {R.shape[1]} different names, one a column of R, got {names}")
    sign = {"higher_is_better": higher_is_better}
    out: dict[str, Any] = {
        "average": average(R),
        "forgetting": forgetting(R, **sign),
        "backward_transfer": backward_transfer(R, **sign),
        "forward_transfer": forward_transfer(R, **sign),
        "learning": learning_accuracy(R),
        "anytime_average": anytime_average(R),
        "higher_is_better": bool(higher_is_better),
        "pairwise_transfer": pairwise_transfer(R, **sign).tolist(),
        "per_task": per_task(R, _learnt(R), names, higher_is_better),
    }
    for name, value in zip(names, _forgotten(R, higher_is_better), strict=True):
        out["per_task"][name]["forgetting"] = float(value)
    if counts is not None:
        out["micro_average"] = micro_average(R, counts)
    if isolated is not None:
        out["intransigence"] = intransigence(R, isolated, **sign)
    return out


def per_task(
    R: Matrix, learnt: Sequence[float] | Matrix, tasks: Sequence[str], higher_is_better: bool
) -> dict[str, dict[str, float]]:
    """`before`, `learnt`, `final` and `best` of each column of R, whatever number of rows it has."""
    best = _best(R[1:], higher_is_better)
    return {
        name: {
            "before": float(R[0, i]),
            "learnt": float(learnt[i]),
            "final": float(R[-1, i]),
            "best": float(best[i]),
        }
        for i, name in enumerate(tasks)
    }


def mean(values: Matrix) -> float:
    """Mean over the measured values, NaN over none."""
    measured = values[~np.isnan(values)]
    with np.errstate(invalid="ignore"):
        return float(measured.mean()) if measured.size else float("nan")


def _matrix(R: ArrayLike) -> Matrix:
    """R as float64 [T+1, T], or an error that names the shape wanted."""
    array = _array(R, "R")
    if array.ndim != 2 or array.shape[1] < 1 or array.shape[0] != array.shape[1] + 1:
        raise ConfigError(
            f"R must have shape [T+1, T] with T >= 1, row 0 before training and one row after each task, "
            f"got shape {list(array.shape)}"
        )
    return array


def _vector(values: ArrayLike, length: int, name: str) -> Matrix:
    """One value a task as float64 [T], or an error that names the argument."""
    array = _array(values, name)
    if array.shape != (length,):
        raise ConfigError(f"{name} must hold one value a task, shape [{length}], got shape {list(array.shape)}")
    return array


def _array(values: Any, name: str) -> Matrix:
    # A torch tensor may want gradients, live on a GPU or be bfloat16: none of which numpy takes.
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must be an array of numbers, rows of equal length: {error}") from error


def _learnt(R: Matrix) -> Matrix:
    """R[i, i] of the formulas: each task's score after its own training, [T]."""
    return np.diagonal(R[1:])


def _forgotten(R: Matrix, higher_is_better: bool) -> Matrix:
    """Best of rows 1..T-1 minus the last row, [T]; NaN for the last task, whose training that row ends."""
    lost = _difference(_best(R[1:-1], higher_is_better), R[-1], higher_is_better)
    lost[-1] = np.nan
    return lost


def _best(rows: Matrix, higher_is_better: bool) -> Matrix:
    """Best measured value of each column, NaN where there is none; [rows, T] -> [T]."""
    # fmax and fmin skip NaN, and give it back where nothing else is there, without a warning.
    reduce = np.fmax if higher_is_better else np.fmin
    return reduce.reduce(rows, axis=0, initial=np.nan)


def _difference(a: Matrix, b: Matrix, higher_is_better: bool) -> Matrix:
    """How much better a is than b, elementwise; inf against inf is unknown, hence NaN."""
    with np.errstate(invalid="ignore"):
        return a - b if higher_is_better else b - a
