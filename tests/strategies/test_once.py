"""Every row exactly once an epoch, spread evenly: by whole numbers at every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from perdure.memory import ReservoirBuffer
from perdure.strategies import DERpp, Replay
from perdure.strategies.quota import Once
from perdure.types import Example


def rows(count: int) -> list[Example]:
    return [Example(str(i), "t") for i in range(count)]


class FloatRatio(Once):
    """Wrong: m / N as a float, which is below what it stands for where it cannot be held: 1/49 times 49, say."""

    def draw(self, rows_of: Any, num_new: int, held: Any) -> list[Example]:
        found: list[Example] = []
        for _ in range(num_new):
            if not self._passes or self._new == self._num_new:
                self._next_pass(rows_of)
            assert self._rows is not None
            self._new += 1
            due = int(self._new * (len(self._rows) / self._num_new))
            found += self._rows[self._drawn : due]
            self._drawn = due
        return found


class SameOrder(Once):
    """Wrong: every pass goes in the order of the first."""

    def _next_pass(self, rows_of: Any) -> None:
        passes, self._passes = self._passes, 0
        super()._next_pass(rows_of)
        self._passes = passes + 1


class AllAtOnce(Once):
    """Wrong: what an epoch owes comes with its first step."""

    def draw(self, rows_of: Any, num_new: int, held: Any) -> list[Example]:
        first = not self._passes or self._new == self._num_new
        found = super().draw(rows_of, num_new, held)
        assert self._rows is not None
        return list(self._rows) if first else [] if num_new else found


def check_once(cls: type[Once]) -> None:
    """Batches that divide the rows and that do not: the counts at every step, each row once a pass, orders anew."""
    for num_new, num_kept, batch in ((10, 4, 5), (49, 1, 7), (10, 7, 4), (6, 20, 4), (49, 48, 49), (100, 29, 8)):
        counter = cls()
        counter.begin(num_new, 0, "once")
        kept = rows(num_kept)
        orders = set()
        for _ in range(3):
            new, drawn = 0, []
            while new < num_new:
                step = min(batch, num_new - new)
                new += step
                drawn += counter.draw(lambda number, kept=kept: kept, step, ReservoirBuffer(1))  # type: ignore[misc]
                assert len(drawn) == new * num_kept // num_new
            assert Counter(row.key for row in drawn) == Counter(row.key for row in kept)
            orders.add(tuple(row.key for row in drawn))
        assert len(orders) == 3 or num_kept < 7


def test_each_row_comes_exactly_once_a_pass() -> None:
    check_once(Once)


@pytest.mark.parametrize("mutant", [FloatRatio, SameOrder, AllAtOnce])
def test_wrong_passes_are_caught(mutant: type[Once]) -> None:
    with pytest.raises(AssertionError):
        check_once(mutant)


def test_no_row_comes_twice_before_all_came_where_batches_leave_rows_out() -> None:
    """Epochs of 8 of 10 rows, batches of 3 and 5, and one of 25: 7 kept rows, pass after pass."""
    counter = Once()
    counter.begin(10, 0)
    drawn: list[str] = []
    for step in (3, 5, 3, 5, 3, 5, 25, 3, 5):
        drawn += [row.key for row in counter.draw(lambda number: rows(7), step, ReservoirBuffer(1))]
    assert len(drawn) == 57 // 10 * 7 + 57 % 10 * 7 // 10
    for start in range(0, len(drawn), 7):
        part = drawn[start : start + 7]
        assert len(set(part)) == len(part)


def test_a_pass_goes_on_from_its_saved_state() -> None:
    held = ReservoirBuffer(9)
    held.extend(rows(9))
    passes: list[int] = []

    def of_pass(number: int) -> Sequence[Example]:
        passes.append(number)
        return list(held)

    whole, expected = Once(), []
    whole.begin(6, 3, "once")
    for _ in range(12):
        expected.append([row.key for row in whole.draw(of_pass, 2, held)])
    for cut in range(12):
        first, second = Once(), Once()
        first.begin(6, 3, "once")
        second.begin(6, 3, "once")
        found = [[row.key for row in first.draw(of_pass, 2, held)] for _ in range(cut)]
        second.restore(first.state())
        found += [[row.key for row in second.draw(of_pass, 2, held)] for _ in range(12 - cut)]
        assert found == expected
    assert passes[:4] == [1, 2, 3, 4]


@pytest.mark.parametrize("capacity", [3, 7, 10])
@pytest.mark.parametrize("select", [None, "loss_ascending"])
def test_every_kept_row_is_replayed_once_an_epoch(mlp_world: Any, capacity: int, select: str | None) -> None:
    """In training: 10 new rows in batches of 4, 4 and 2, two epochs."""
    learner = mlp_world.learner(Replay(capacity=capacity, ratio="once", select=select))
    epochs: dict[int, list[str]] = {}
    new = replayed = 0
    for index, position, result in mlp_world.train(learner):
        again = [row.key for row in result.examples if row.source == "replay"]
        if index == 0:
            assert not again
            continue
        new += result.rows - len(again)
        replayed += len(again)
        assert replayed == new * capacity // 10
        epochs.setdefault(position.epoch, []).extend(again)
    kept = {row.key for row in learner.strategy.buffer if row.task == "a"}  # type: ignore[attr-defined, union-attr]
    assert len(epochs) == 2
    for keys in epochs.values():
        assert len(keys) == capacity
        assert len(set(keys)) == capacity
        assert kept <= set(keys)


def test_both_draws_of_derpp_go_through_all_rows_in_orders_of_their_own(mlp_world: Any) -> None:
    learner = mlp_world.learner(DERpp(capacity=9, ratio="once", alpha=0.1))
    drawn: dict[str, list[str]] = {"derpp-logits": [], "derpp-rows": []}
    for index, position, result in mlp_world.train(learner):
        if index == 1 and position.epoch == 0:
            for row in result.examples:
                if row.source != "task":
                    drawn[row.group].append(row.key)
    logits, own = drawn.values()
    assert sorted(logits) == sorted(own)
    assert len(set(own)) == 9
    assert logits != own
