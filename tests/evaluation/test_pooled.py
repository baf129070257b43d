"""Metrics over all rows of several tasks, against the rows put together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from perdure.evaluation.pooled import pooled

Array = NDArray[np.float64]


def tasks(seed: int, count: int = 5) -> tuple[list[Array], list[Array]]:
    """True and predicted values of tasks of unequal sizes and unequal means."""
    rng = np.random.default_rng(seed)
    truths = [rng.normal(rng.normal(), 0.3, rng.integers(1, 60)) for _ in range(count)]
    return truths, [true + rng.normal(0.1, 0.4, len(true)) for true in truths]


def of_each(truths: list[Array], predicted: list[Array]) -> tuple[list[float], list[float]]:
    errors = [p - y for y, p in zip(truths, predicted, strict=True)]
    return [float(np.sqrt((e * e).mean())) for e in errors], [float(np.abs(e).mean()) for e in errors]


def together(truths: list[Array], predicted: list[Array]) -> dict[str, float]:
    y, p = np.concatenate(truths), np.concatenate(predicted)
    return {
        "r2": 1 - ((p - y) ** 2).sum() / ((y - y.mean()) ** 2).sum(),
        "rmse": math.sqrt(((p - y) ** 2).mean()),
        "mae": np.abs(p - y).mean(),
    }


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_rows_put_together(seed: int) -> None:
    truths, predicted = tasks(seed)
    assert pooled(*of_each(truths, predicted), truths) == pytest.approx(together(truths, predicted), abs=1e-12)


def test_by_hand() -> None:
    """Rows 0, 1 and 1, 1, 1, foretold as 0, 1 and 1, 1, 0: SSE 1, mean 4/5, spread 4/5: R² −1/4.

    Alone the first task has R² 1 and the second none: its rows do not differ.
    """
    truths = [np.array([0.0, 1.0]), np.array([1.0, 1.0, 1.0])]
    found = pooled([0.0, math.sqrt(1 / 3)], [0.0, 1 / 3], truths)
    assert found == pytest.approx({"r2": -0.25, "rmse": math.sqrt(1 / 5), "mae": 1 / 5})


def test_the_mean_of_the_tasks_is_another_number() -> None:
    """The mutants: means over tasks of their R², RMSE and MAE."""
    truths, predicted = tasks(0)
    found = together(truths, predicted)
    each = [together([y], [p]) for y, p in zip(truths, predicted, strict=True) if len(y) > 1]
    for metric, value in found.items():
        assert abs(np.mean([one[metric] for one in each]) - value) > 1e-3, metric


def test_who_foretells_the_mean_of_all_rows_has_zero() -> None:
    """Not 0 for who foretells each task's own mean: between tasks there is spread to explain."""
    truths, _ = tasks(3)
    mean = np.concatenate(truths).mean()
    level = [np.full(len(y), mean) for y in truths]
    assert pooled(*of_each(truths, level), truths)["r2"] == pytest.approx(0, abs=1e-12)
    own = [np.full(len(y), y.mean()) for y in truths]
    assert pooled(*of_each(truths, own), truths)["r2"] > 0.3


def test_values_of_single_precision_are_summed_in_double() -> None:
    """A float32 sum over 100,000 squares near 10⁸ would be off by thousands."""
    truths = [np.full(50_000, 1e4, np.float32), np.full(50_000, 1e4 + 1, np.float32)]
    assert pooled([0.5, 0.5], [0.5, 0.5], truths)["r2"] == pytest.approx(0.0, abs=1e-9)


def test_one_task_is_its_own() -> None:
    truths, predicted = tasks(7, count=1)
    assert pooled(*of_each(truths, predicted), truths) == pytest.approx(together(truths, predicted), abs=1e-12)


def test_nothing_to_explain_is_nan() -> None:
    assert all(value != value for value in pooled([], [], []).values())
    found = pooled([0.1], [0.1], [np.array([0.5, 0.5])])
    assert math.isnan(found["r2"])
    assert found["rmse"] == pytest.approx(0.1)
