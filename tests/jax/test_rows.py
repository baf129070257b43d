"""Order, batches of one shape, and what is replayed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from perdure.errors import ConfigError, DataError, StrategyError
from perdure.jax import FitSettings, Row, RowTask
from perdure.jax.rows import Replayed, collate, digest, epoch_batches, merged


def test_order_is_that_of_the_torch_backend(make_tasks: Any) -> None:
    from perdure.training.loop import KeyedSource
    from perdure.types import Example

    for task in (make_tasks(1, 23)[0], merged(make_tasks(2, 9))[0]):
        theirs = KeyedSource([Example(row.key, row.task) for row in task.rows], 5, 7, task.name)
        for epoch in (0, 1):
            wanted = [[(r.task, r.key) for r in rows] for rows in theirs.batches(0, epoch)]
            assert [[(r.task, r.key) for r in rows] for rows in epoch_batches(task, 5, 7, epoch)] == wanted


def test_a_batch_by_hand() -> None:
    rows = [Row("a", (5, 6, 7), 0.5), Row("b", (8,), 1.0)]
    batch = collate(rows, [0.25, 0.75], 3, 4)
    assert batch.ids.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.mask.tolist() == [[True, True, True, False], [True] + [False] * 3, [True] + [False] * 3]
    assert batch.y.tolist() == [0.5, 1.0, 0.0]
    assert batch.weight.tolist() == [0.25, 0.75, 0.0]
    with pytest.raises(DataError, match="row 'a' of task '' has 3 tokens; batches take 1 to 2"):
        collate(rows, [1, 1], 2, 2)
    with pytest.raises(DataError, match="has 0 tokens"):
        collate([Row("c", (), 0.0)], [1], 2, 2)


def test_memory_and_draws(make_tasks: Any) -> None:
    """12 rows of 3 tasks, 7 kept, 3 a step: every 7 draws are the 7 rows, in an order of their own."""
    tasks = make_tasks(3, 4)
    replayed = Replayed(tasks, 7, 0, "new")
    kept = {(row.task, row.key) for row in replayed.memory}
    assert len(kept) == 7
    steps = [[(r.task, r.key) for r in replayed.draw(3 * step, 3 * step + 3)] for step in range(400)]
    drawn = [row for rows in steps for row in rows]
    passes = [tuple(drawn[i : i + 7]) for i in range(0, 1197, 7)]
    assert all(set(rows) == kept for rows in passes)
    assert len(set(passes)) > 160
    counts = Counter(rows[0] for rows in passes)
    # Of 171 passes each of 7 rows begins 24.4 ± 4.6; four deviations.
    assert all(abs(counts[row] - 24.4) < 18.5 for row in kept)
    assert [(r.task, r.key) for r in Replayed(tasks, 7, 0, "new").draw(903, 906)] == steps[301]
    assert [(r.task, r.key) for r in Replayed(tasks, 7, 1, "new").draw(903, 906)] != steps[301]


def test_the_memory_is_that_of_torchs_reservoir(make_tasks: Any) -> None:
    from perdure.memory import ReservoirBuffer
    from perdure.types import Example

    tasks = make_tasks(3, 9)
    theirs = ReservoirBuffer(8, 5)
    theirs.extend(Example(row.key, row.task) for task in tasks for row in task.rows)
    kept = {(row.task, row.key) for row in theirs}
    assert kept == {(row.task, row.key) for row in Replayed(tasks, 8, 5, "new").memory}


def test_a_memory_keeps_what_it_has_when_tasks_come(make_tasks: Any) -> None:
    """The rows of smallest priority: what stays of two tasks is part of what stayed of one."""
    tasks = make_tasks(2, 10)
    first = set(Replayed(tasks[:1], 6, 0, "t1").memory)
    both = set(Replayed(tasks, 6, 0, "t2").memory)
    assert {row for row in both if row.task == "t0"} <= first


def test_small_memories(make_tasks: Any) -> None:
    assert Replayed([], None, 0, "t0").draw(0, 3) == []
    assert len(Replayed(make_tasks(1, 2), None, 0, "t1").draw(0, 3)) == 3


def test_digest_tells_rows_apart(make_tasks: Any) -> None:
    tasks = make_tasks(2, 3)
    row = tasks[0].rows[0]
    other = [RowTask("t0", (Row(row.key, row.ids, row.y + 1e-9, row.task), *tasks[0].rows[1:])), tasks[1]]
    assert digest(tasks) == digest(make_tasks(2, 3)) != digest(other)


def test_settings_are_checked_together() -> None:
    with pytest.raises(StrategyError, match=r"unknown strategy of the jax backend 'si'.*Known: ewc, joint, replay"):
        FitSettings(strategy="si")
    with pytest.raises(ConfigError) as caught:
        FitSettings(gradient="sum", epochs=0, memory=0, lr=0.0, weight_decay=-1.0, precision="fp16")  # type: ignore[arg-type]
    words = str(caught.value)
    assert "gradient must be one of combined, separate, got 'sum'" in words
    assert "precision must be one of fp32, bf16, got 'fp16'" in words
    assert "epochs must be a whole number of at least 1, got 0" in words
    assert "memory must be a whole number of at least 1, got 0" in words
    assert "lr, eps and clip must be above 0" in words
    assert "weight_decay and ewc_strength must not be negative" in words
    assert np.isclose(FitSettings(strategy="replay", batch_size=6, ratio=0.3).slots, 8)
