"""Groups share the room equally, whatever the order of the offers; within a group every row is kept as often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from perdure.memory import BalancedBuffer, ReservoirBuffer
from perdure.memory.groups import _label
from perdure.types import Example

LEAST_P = 1e-3  # all draws are keyed: what passes once passes always


def rows(**counts: int) -> list[Example]:
    """So many rows of each task."""
    return [Example(str(i), task) for task, count in counts.items() for i in range(count)]


def filled(cls: Any, capacity: int | str, items: Any, seed: int = 0, **settings: Any) -> Any:
    buffer = cls(capacity, seed, **settings)
    buffer.extend(items)
    return buffer


def names(buffer: Any) -> list[tuple[str, str]]:
    return [(row.task, row.key) for row in buffer]


def water_filling(counts: dict[Any, int], capacity: int, rank: Callable[[Any], int]) -> dict[Any, int]:
    """Places are dealt one at a time, in rounds, to groups with rows left, the lowest hash first."""
    shares: Counter[Any] = Counter()
    while capacity and any(shares[group] < counts[group] for group in counts):
        for group in sorted(counts, key=rank):
            if capacity and shares[group] < counts[group]:
                shares[group] += 1
                capacity -= 1
    return dict(shares)


def group_rank(buffer: Any) -> Callable[[Any], int]:
    return lambda group: buffer._group_rank(_label(group))


class EvictsFromFirst(BalancedBuffer):
    """The mutant: whichever group came first gives way."""

    def _evict(self) -> None:
        for group in list(self._groups.values())[1:]:
            group.used -= 1 << 40
        super()._evict()
        for group in self._groups.values():
            group.used %= 1 << 40


class TiesByArrival(BalancedBuffer):
    """The mutant: among groups of one size the one that came first gives way."""

    def _enter(self, label: str, *rest: Any) -> None:
        super()._enter(label, *rest)
        self._groups[label].rank = 0


class SharesByOffers(ReservoirBuffer):
    """The mutant: groups get room in proportion to what they offered."""

    groups = BalancedBuffer.groups
    by = "task"


class FavoursLate(BalancedBuffer):
    """The mutant: as an algorithm R that draws from too few places, later rows enter more often."""

    def _place(self, label: str, name: str) -> int | None:
        place = super()._place(label, name)
        return None if place is None else int(place * 0.95**self._offers)


class WithReplacement(BalancedBuffer):
    def sample(self, k: int) -> list[Any]:
        self.draws += 1
        return Random(self.draws).choices(list(self), k=min(k, len(self)))


class ForgetsThresholds(BalancedBuffer):
    """The mutant: an erasure opens the door to whatever comes next."""

    def erase(self, keys: Any) -> int:
        gone = super().erase(keys)
        self._thresholds.clear()
        return gone


def check_shares(cls: Any) -> None:
    for counts in ({"a": 100, "b": 3, "c": 40}, {"a": 1, "b": 90}, {"a": 7, "b": 7, "c": 7}, {"a": 50}):
        items = rows(**counts)
        for capacity in (1, 2, 10, 13, 200):
            for _ in range(3):
                Random(capacity).shuffle(items)
                found = filled(cls, capacity, items)
                rank = group_rank(BalancedBuffer(1))
                assert found.groups == water_filling(counts, capacity, rank)


def test_the_reference_shares_by_hand() -> None:
    """10 places for 100, 3 and 40 rows: b keeps 3; of the 7 left for a and c the first by hash gets 4."""
    assert water_filling({"a": 100, "b": 3, "c": 40}, 10, "cab".index) == {"a": 3, "b": 3, "c": 4}


def test_groups_share_equally() -> None:
    check_shares(BalancedBuffer)


@pytest.mark.parametrize("mutant", [EvictsFromFirst, TiesByArrival, SharesByOffers])
def test_wrong_shares_are_caught(mutant: Any) -> None:
    with pytest.raises(AssertionError):
        check_shares(mutant)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12),
    st.integers(1, 60),
    st.integers(0, 1000),
)
def test_what_is_held_is_the_brute_force_answer_in_any_order(counts: list[int], capacity: int, seed: int) -> None:
    """Of all rows, those with the smallest (place in the own group, hash of the group)."""
    items = rows(**{f"task {i}": count for i, count in enumerate(counts)})
    buffer = BalancedBuffer(capacity, seed)
    ranked = sorted(items, key=lambda row: buffer._rank(f"{row.task}\0{row.key}"))
    places: Counter[str] = Counter()
    units = []
    for order, row in enumerate(ranked):
        units.append((places[row.task], group_rank(buffer)(row.task), order, row))
        places[row.task] += 1
    kept = sorted(unit[2:] for unit in sorted(units)[:capacity])
    Random(seed).shuffle(items)
    for row in items:
        assert buffer.offer(row) == any(row is held for held in buffer)
        assert len(buffer) <= capacity
    assert names(buffer) == [(row.task, row.key) for _, row in kept]


def test_order_of_offers_does_not_matter() -> None:
    items = rows(a=300, b=20, c=5)
    expected = filled(BalancedBuffer, 31, items)
    drawn = names(expected.sample(9))
    for seed in range(20):
        Random(seed).shuffle(items)
        found = filled(BalancedBuffer, 31, items)
        assert names(found) == names(expected)
        assert names(found.sample(9)) == drawn


def inclusion_p(cls: Any) -> dict[str, float]:
    """p of χ² that each row of a group is kept as often, for groups that offered 20 and 8, and 4 kept of each.

    Σ (O − mp)² · (N−1)/(N·m·p(1−p)) has N − 1 degrees of freedom, p = 4/N, m samples.
    """
    sizes, kept, m = {"a": 20, "b": 8}, Counter[tuple[str, str]](), 2_000
    items = rows(**sizes)
    Random(0).shuffle(items)
    for seed in range(m):
        kept.update(names(filled(cls, 8, items, seed)))
    found = {}
    for task, size in sizes.items():
        p = 4 / size
        squares = sum((kept[task, str(i)] - m * p) ** 2 for i in range(size))
        found[task] = float(chi2.sf(squares * (size - 1) / (size * m * p * (1 - p)), size - 1))
    return found


def test_within_a_group_every_row_is_kept_as_often() -> None:
    assert min(inclusion_p(BalancedBuffer).values()) > LEAST_P


def test_a_favour_for_late_rows_is_caught() -> None:
    assert max(inclusion_p(FavoursLate).values()) < 1e-9


def check_sample(cls: Any) -> None:
    buffer = filled(cls, 10, rows(a=50, b=50))
    count: Counter[tuple[str, str]] = Counter()
    for k in [0, 1, 10, 11] + [3] * 1_000:
        drawn = names(buffer.sample(k))
        assert len(drawn) == len(set(drawn)) == min(k, 10)
        assert set(drawn) <= set(names(buffer))
        count.update(drawn if k == 3 else ())
    # 10 rows, 300 times each: Σ (O − 300)² · 9/(10·1000·0.3·0.7) has 9 degrees of freedom.
    squares = sum((count[name] - 300) ** 2 for name in names(buffer))
    assert chi2.sf(squares * 9 / 2_100, 9) > LEAST_P


def test_sample_is_uniform_and_without_replacement() -> None:
    check_sample(BalancedBuffer)
    with pytest.raises(AssertionError):
        check_sample(WithReplacement)
    assert BalancedBuffer(3).sample(2) == []


def test_an_erasure_does_not_favour_late_rows() -> None:
    """Each task's threshold is the 11th smallest of 100 uniform priorities, 11/101 on average.

    Of 20 late rows of each, 20·11/101 = 2.18 fall below it; without thresholds all 20 places would be taken.
    """

    def held_after(cls: Any) -> float:
        total = 0
        for seed in range(200):
            buffer = filled(cls, 20, rows(a=100, b=100), seed)
            buffer.erase([row.key for row in list(buffer)])
            assert len(buffer) == buffer.used == 0
            buffer.extend(row.but(key=f"late {row.key}") for row in rows(a=20, b=20))
            total += len(buffer)
        return total / 200

    assert held_after(BalancedBuffer) == pytest.approx(2 * 20 * 11 / 101, abs=0.6)
    assert held_after(ForgetsThresholds) == 20


def test_room_made_by_an_erasure_goes_to_a_group_that_gave_up_nothing() -> None:
    buffer = filled(BalancedBuffer, 10, rows(a=100, b=2))
    assert buffer.groups == {"a": 8, "b": 2}
    assert buffer.erase([row.key for row in buffer if row.task == "a"]) >= 8
    buffer.extend(rows(c=30))
    assert buffer.groups["c"] == 10 - len([row for row in buffer if row.task != "c"])


def test_erase_by_key_whatever_the_task() -> None:
    buffer = filled(BalancedBuffer, 10, rows(a=3, b=3))
    assert buffer.erase(["1", "absent"]) == 2
    assert {key for _, key in names(buffer)} == {"0", "2"}
    assert (len(buffer), buffer.used, buffer.groups) == (4, 4, {"a": 2, "b": 2})
    assert buffer.offer(Example("1", "a"))


def test_a_key_offered_again_gets_no_second_draw() -> None:
    items = rows(a=50, b=50)
    once, often = (filled(BalancedBuffer, 10, items) for _ in range(2))
    for _ in range(20):
        often.extend(items[:30])
    assert names(once) == names(often)
    assert (once.seen, often.seen) == (100, 700)


def test_in_bytes_with_rows_of_unequal_size_the_order_can_matter() -> None:
    """10 bytes; task a has 2 and 5 bytes, task b 1 and 5, the small ones first by priority.

    a5, b1, b5: 11 bytes, b is larger (6 to 5) and gives up b5; a2 then fits, 8 bytes. But a2, a5, b1, b5: 13 bytes,
    a is larger (7 to 6) and gives up a5.
    """
    a2, a5 = Example("2", "a", x=torch.zeros(1).byte()), Example("5", "a", x=torch.zeros(4).byte())
    b1, b5 = Example("1", "b"), Example("5", "b", x=torch.zeros(4).byte())

    def small_first(buffer: Any) -> bool:
        return buffer._rank("a\0002") < buffer._rank("a\0005") and buffer._rank("b\0001") < buffer._rank("b\0005")

    seed = next(seed for seed in range(100) if small_first(BalancedBuffer(1, seed)))
    first = filled(BalancedBuffer, "10B", [a5, b1, b5, a2], seed)
    second = filled(BalancedBuffer, "10B", [a2, a5, b1, b5], seed)
    assert set(first) == {a5, b1, a2}
    assert set(second) == {a2, b1, b5}


def test_in_bytes_with_rows_of_one_size_the_order_does_not_matter() -> None:
    items = rows(a=100, b=40, c=5)
    for row in items:
        object.__setattr__(row, "x", torch.zeros(20 - len(row.key)).byte())
    expected = names(filled(BalancedBuffer, 31, items))
    for seed in range(10):
        Random(seed).shuffle(items)
        assert names(filled(BalancedBuffer, "639B", items)) == expected
