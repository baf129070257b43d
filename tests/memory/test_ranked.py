"""What was offered first stays longest: shares and prefixes against brute force."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
import torch

from perdure.errors import ConfigError
from perdure.memory import RankedBuffer, load_buffer
from perdure.memory.size import weigh
from perdure.types import Example

from .test_balanced import group_rank, rows, water_filling


def held(buffer: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in buffer:
        found.setdefault(row.task, []).append(row.key)
    return found


def check_shares(cls: Any) -> None:
    """Tasks one after another, or row by row in turn: of each the first rows, as many as its share."""
    for counts in ({"a": 100, "b": 3, "c": 40}, {"a": 1, "b": 90}, {"a": 7, "b": 7, "c": 7}, {"a": 50}):
        offers = rows(**counts)
        for capacity in (1, 2, 10, 13, 200):
            for items in (offers, sorted(offers, key=lambda row: int(row.key))):
                buffer = cls(capacity)
                seen: Counter[str] = Counter()
                for row in items:
                    seen[row.task] += 1
                    assert buffer.offer(row) == any(row is kept for kept in buffer)
                    assert len(buffer) <= capacity
                    expected = water_filling(seen, capacity, group_rank(buffer))
                    assert {task: len(keys) for task, keys in held(buffer).items()} == expected
                assert held(buffer) == {task: [str(i) for i in range(n)] for task, n in expected.items()}, (
                    "a prefix, and iteration in the order of the offers"
                )


def sized(seed: int) -> list[Example]:
    """Rows of 1 to 9 learnt tokens, and of unequal bytes."""
    draw = Random(seed)
    return [
        Example(f"{i:02}", "abc"[i // 20], y=torch.ones(draw.randrange(2, 11), dtype=torch.int64))
        for i in range(60)
    ]


def check_prefixes(cls: Any) -> None:
    """In bytes and in tokens, after every offer: a prefix of each task's offers, and never above the size."""
    for seed in range(6):
        for capacity in ("300B", "40 tokens", "7 tokens"):
            buffer = cls(capacity, seed)
            offered: dict[str, list[str]] = {}
            for row in sized(seed):
                buffer.offer(row)
                if weigh(row, buffer.unit) <= buffer.limit:
                    offered.setdefault(row.task, []).append(row.key)
                assert buffer.used == sum(weigh(kept, buffer.unit) for kept in buffer) <= buffer.limit
                for task in offered.keys() - held(buffer).keys():
                    offered[task] = []  # its only row was too large for its share, and is passed over
                for task, keys in held(buffer).items():
                    assert keys == offered[task][: len(keys)]


class KeepsLast(RankedBuffer):
    def _place(self, label: str, name: str) -> int | None:
        return self._offers


class OpensAgain(RankedBuffer):
    """The mutant: goes on past the row that does not fit, and takes a smaller one that the policy put behind it."""

    def _evicted(self, label: str, place: int) -> None:
        pass


class OneOrder(RankedBuffer):
    """The mutant: tasks do not share, the first has everything."""

    def _place(self, label: str, name: str) -> int | None:
        return super()._place("", name)

    def _enter(self, label: str, *rest: Any) -> None:
        super()._enter("", *rest)


def test_each_task_has_a_prefix_as_long_as_its_share() -> None:
    check_shares(RankedBuffer)
    check_prefixes(RankedBuffer)


@pytest.mark.parametrize("mutant", [KeepsLast, OneOrder])
def test_wrong_shares_are_caught(mutant: Any) -> None:
    with pytest.raises(AssertionError):
        check_shares(mutant)


@pytest.mark.parametrize("mutant", [KeepsLast, OpensAgain])
def test_wrong_prefixes_are_caught(mutant: Any) -> None:
    with pytest.raises(AssertionError):
        check_prefixes(mutant)


def test_an_erasure_opens_no_door() -> None:
    buffer = RankedBuffer(4)
    buffer.extend(rows(a=10))
    assert buffer.erase(["1", "9"]) == 1
    assert held(buffer) == {"a": ["0", "2", "3"]}
    assert not buffer.offer(Example("late", "a"))
    assert buffer.offer(Example("late", "b"))


def test_goes_on_from_a_saved_state() -> None:
    items = sized(1)
    for cut in range(0, 60, 7):
        through, resumed = RankedBuffer("40 tokens", 2), RankedBuffer("40 tokens", 2)
        for i, row in enumerate(items):
            if i == cut:
                resumed = load_buffer(resumed.state_dict())  # type: ignore[assignment]
            assert through.offer(row) == resumed.offer(row)
            assert held(through) == held(resumed)
            assert [r.key for r in through.sample(2)] == [r.key for r in resumed.sample(2)]


def test_by_is_a_name() -> None:
    with pytest.raises(ConfigError, match="by must be"):
        RankedBuffer(3, by="")
