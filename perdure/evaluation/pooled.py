"""R², RMSE and MAE over all rows of several tasks at once, from what was measured of each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def pooled(rmse: Sequence[float], mae: Sequence[float], truths: Sequence[NDArray[np.floating]]) -> dict[str, float]:
    """The metrics over all rows of the tasks together, which is not the mean of the tasks' own.

    SSE = Σ nᵢ·RMSEᵢ²; R² = 1 − SSE / Σ (y − ȳ)², with ȳ the mean of all rows: 0 for who foretells that mean.

    Args:
        rmse: of each task's rows, [K].
        mae: the same.
        truths: the true values of each task's rows, K arrays of n₁, …, n_K.

    Returns:
        "r2", "rmse" and "mae"; nan where there are no rows, or no spread to explain.
    """
    counts = [len(values) for values in truths]
    rows = sum(counts)
    if not rows:
        return dict.fromkeys(("r2", "rmse", "mae"), math.nan)
    error = math.fsum(n * value * value for n, value in zip(counts, rmse, strict=True))
    spread = float(np.sum(np.square((every := np.concatenate(truths).astype(np.float64)) - every.mean())))
    return {
        "r2": 1 - error / spread if spread > 0 else math.nan,
        "rmse": math.sqrt(error / rows),
        "mae": math.fsum(n * value for n, value in zip(counts, mae, strict=True)) / rows,
    }
