"""A ring keeps the newest rows of each group, and the groups share the room equally."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.errors import ConfigError
from perdure.memory import RingBuffer
from perdure.memory.groups import _label
from perdure.types import Example


def filled(capacity: int, items: Any, cls: Any = RingBuffer, **settings: Any) -> Any:
    buffer = cls(capacity, **settings)
    buffer.extend(items)
    return buffer


def rows(tasks: str) -> list[Example]:
    return [Example(str(i), task) for i, task in enumerate(tasks)]


def names(buffer: Any) -> list[str]:
    return [row.key for row in buffer]


def newest(items: list[Example], capacity: int, buffer: Any) -> list[str]:
    """Places are dealt in rounds, the lowest hash first; each group fills its own from its end."""
    groups = defaultdict(list)
    for row in items:
        groups[row.task].append(row)
    order = sorted(groups, key=lambda task: buffer._group_rank(_label(task)))
    shares: Counter[str] = Counter()
    for _ in range(len(items)):
        for task in order:
            if shares.total() < capacity and shares[task] < len(groups[task]):
                shares[task] += 1
    return sorted((row.key for task in groups for row in groups[task][-shares[task] or len(items) :]), key=int)


class KeepsOldest(RingBuffer):
    """The mutant: last in, first out."""

    def _place(self, label: str, name: str) -> int:
        return -super()._place(label, name)


class EvictsFromSmallest(RingBuffer):
    """The mutant: the wrong group gives way."""

    def _evict(self) -> None:
        for group in self._groups.values():
            group.used *= -1
        super()._evict()
        for group in self._groups.values():
            group.used = len(group.heap)


class Renews(RingBuffer):
    """The mutant: a key that is offered again becomes the newest."""

    def offer(self, item: Any) -> bool:
        self.erase([item.key])
        return super().offer(item)


def check(cls: Any, tasks: str, capacity: int) -> None:
    items = rows(tasks)
    buffer = cls(capacity)
    for i, row in enumerate(items):
        held = buffer.offer(row)
        assert names(buffer) == newest(items[: i + 1], capacity, buffer)
        assert held == (row.key in names(buffer))


@settings(max_examples=60, deadline=None)
@given(st.text("abcde", max_size=60), st.integers(1, 12))
def test_the_newest_of_each_task_are_held_after_every_offer(tasks: str, capacity: int) -> None:
    check(RingBuffer, tasks, capacity)


@pytest.mark.parametrize("mutant", [KeepsOldest, EvictsFromSmallest])
def test_wrong_rings_are_caught(mutant: Any) -> None:
    with pytest.raises(AssertionError):
        check(mutant, "aaaabbbbabababcc", 5)


def test_tasks_one_after_the_other_by_hand() -> None:
    """6 places: all for the first task, then 3 and 3, then 2 each: GEM's last rows of each task."""
    items = rows("aaaaaaaabbbbbbbbcccccccc")
    assert names(filled(6, items[:8])) == ["2", "3", "4", "5", "6", "7"]
    assert names(filled(6, items[:16])) == ["5", "6", "7", "13", "14", "15"]
    assert names(filled(6, items)) == ["6", "7", "14", "15", "22", "23"]


def test_one_ring_over_all_is_a_deque() -> None:
    items = rows("".join(Random(0).choices("abc", k=100)))
    buffer, expected = RingBuffer(7, by=None), deque[str](maxlen=7)
    for row in items:
        assert buffer.offer(row)
        expected.append(row.key)
        assert names(buffer) == list(expected)
    assert buffer.groups == {None: 7}


def test_items_without_a_key_go_through_a_ring() -> None:
    assert list(filled(3, "abcabc", by=None)) == ["a", "b", "c"]
    assert list(filled(3, [1, 1, 2, 2, 2])) == [2, 2, 2]


def check_repeats(cls: Any) -> None:
    buffer = filled(3, rows("aaa"), cls)
    assert buffer.offer(Example("0", "a"))
    buffer.offer(Example("9", "a"))
    assert names(buffer) == ["1", "2", "9"]
    assert buffer.seen == 5
    assert buffer.offer(Example("0", "a"))
    assert names(buffer) == ["2", "9", "0"]


def test_a_held_key_keeps_its_place_and_one_that_left_may_return() -> None:
    check_repeats(RingBuffer)
    with pytest.raises(AssertionError):
        check_repeats(Renews)


def test_what_is_erased_makes_room() -> None:
    buffer = filled(4, rows("aaaabbbb"))
    assert names(buffer) == ["2", "3", "6", "7"]
    assert buffer.erase(["3", "7", "absent"]) == 2
    assert (names(buffer), buffer.used, buffer.groups) == (["2", "6"], 2, {"a": 1, "b": 1})
    buffer.extend(Example(f"1{i}", "a") for i in range(4))
    assert names(buffer) == ["6", "11", "12", "13"]
    assert buffer.erase(["6"]) == 1
    assert buffer.groups == {"a": 3}


def test_draws_follow_from_seed_number_and_what_is_held() -> None:
    one, other = (filled(10, rows("ab" * 50)) for _ in range(2))
    assert names(one.sample(4)) == names(other.sample(4))
    assert sorted(names(one.sample(99)), key=int) == names(one)
    assert names(one.sample(4)) != names(other.sample(4))
    assert one.draws == 3


@pytest.mark.parametrize("by", ["", 3, True])
def test_what_is_no_group_is_refused(by: Any) -> None:
    with pytest.raises(ConfigError, match=r"by must be .* or None for one ring, got"):
        RingBuffer(3, by=by)
