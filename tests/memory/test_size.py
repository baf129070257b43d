"""Sizes are read right, rows are weighed right, and no memory ever holds more bytes than it may."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.errors import ConfigError
from perdure.memory import BalancedBuffer, RankedBuffer, ReservoirBuffer, RingBuffer
from perdure.memory.size import count_tokens, nbytes, parse_size, weigh
from perdure.order import SPAN
from perdure.types import Example, Segment

KINDS = [ReservoirBuffer, BalancedBuffer, RingBuffer, RankedBuffer]


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        (1, (1, "rows")),
        (1000, (1000, "rows")),
        (np.int64(7), (7, "rows")),
        ("64KB", (64_000, "bytes")),
        ("2 MB", (2_000_000, "bytes")),
        ("1MiB", (1_048_576, "bytes")),
        ("500B", (500, "bytes")),
        (" 1.5 kib ", (1536, "bytes")),
        ("0.29MB", (290_000, "bytes")),
        ("3gb", (3 * 10**9, "bytes")),
        ("1TiB", (1 << 40, "bytes")),
        ("20000 tokens", (20_000, "tokens")),
        ("5Tokens", (5, "tokens")),
    ],
)
def test_sizes_are_read(capacity: Any, expected: tuple[int, str]) -> None:
    assert parse_size(capacity) == expected


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize(
    "capacity", ["64XB", "64", "64K", "", "KB", "-1KB", "1e3KB", "1,5MB", "٣KB", 2.5, 2.0, True, None, [1]]
)
def test_what_is_no_size_is_refused(cls: Any, capacity: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"capacity must be a whole number of rows such as 1000, or a size such as"
    ):
        cls(capacity)


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("capacity", [0, -3, "0MB", "0.5B", "0 tokens"])
def test_less_than_one_is_refused(cls: Any, capacity: Any) -> None:
    with pytest.raises(ConfigError, match=rf"capacity must be at least 1( byte| token)?, got {capacity!r}"):
        cls(capacity)


def test_a_row_is_weighed_by_hand() -> None:
    """key 'kü' 3; segments 'a' 1 and '€' 3; x 3·8; y 8; extras 2·4 and `[1, 2]` 6; fields `{"f": "ü"}` 11: 64."""
    row = Example(
        "kü",
        "the task's name is shared and not counted",
        segments=(Segment("a"), Segment("€", learn=True)),
        x=torch.zeros(3, dtype=torch.int64),
        y=torch.tensor(1),
        extras={"logits": torch.zeros(2), "plain": [1, 2]},
        fields={"f": "ü"},
    )
    assert nbytes(row) == 64
    assert nbytes(Example("k")) == 1
    assert nbytes(Example("k", x=torch.zeros(5, dtype=torch.bfloat16))) == 11
    assert nbytes(Example("k", segments=(Segment("\ud800"),))) == 4


@pytest.mark.parametrize("cls", KINDS)
def test_only_examples_have_bytes(cls: Any) -> None:
    with pytest.raises(
        ConfigError, match="only Example items have a size in bytes, got str; give the capacity in ro"
    ):
        cls("1KB").offer("text")


def test_tokens_are_those_that_are_learnt() -> None:
    """Labels are shifted: the first has nothing before it; a row that learns nothing still takes room for one."""
    row = Example("k", y=torch.tensor([5, -100, 6, 7]))
    nothing = row.but(y=torch.full((4,), -100))
    assert (count_tokens(row), count_tokens(nothing), count_tokens(Example("k", y=torch.tensor(3)))) == (2, 0, 1)
    assert (weigh(row, "tokens"), weigh(nothing, "tokens"), weigh("text", "tokens")) == (2, 1, 1)
    assert count_tokens(row.but(y=torch.tensor([0.2, 0.8]))) == 1


@pytest.mark.parametrize("cls", KINDS)
def test_tokens_are_never_exceeded(cls: Any) -> None:
    buffer = cls("12 tokens")
    for i in range(40):
        buffer.offer(Example(str(i), "ab"[i % 2], y=torch.ones(2 + i % 15, dtype=torch.int64)))
        assert buffer.used == sum(len(row.y) - 1 for row in buffer) <= 12
    assert buffer.refused == sum(1 + i % 15 > 12 for i in range(40))


def sized(sizes: list[int], tasks: str = "t") -> list[Example]:
    """Rows that take so many bytes, three at least for the key."""
    return [
        Example(f"{i:03}", tasks[i % len(tasks)], x=torch.zeros(size - 3, dtype=torch.uint8))
        for i, size in enumerate(sizes)
    ]


def longest_prefix(items: list[Example], limit: int, seed: int) -> list[str]:
    rank = ReservoirBuffer(1, seed)._rank
    kept, used = [], 0
    for row in sorted(items, key=lambda row: rank(f"{row.task}\0{row.key}")):
        if nbytes(row) > limit:
            continue
        used += nbytes(row)
        if used > limit:
            break
        kept.append(row.key)
    return kept


class TakesWhatFits(ReservoirBuffer):
    """The mutant: goes on past the row that does not fit, and so prefers small rows that come late."""

    def _shrink(self) -> None:
        super()._shrink()
        self._threshold = SPAN


class EvictsOne(ReservoirBuffer):
    """The mutant: one row leaves for each that enters."""

    def _shrink(self) -> None:
        limit, self.limit = self.limit, max(self.limit, self.used - 1)
        super()._shrink()
        self.limit = limit


class TooLargeClosesTheDoor(ReservoirBuffer):
    """The mutant: a row that can never fit moves the threshold."""

    def offer(self, item: Any) -> bool:
        if nbytes(item) > self.limit:
            self._threshold = min(self._threshold, self._rank(f"{item.task}\0{item.key}"))
        return super().offer(item)


def check_prefix(cls: Any, sizes: list[int], limit: int, seed: int) -> None:
    items = sized(sizes)
    expected = longest_prefix(items, limit, seed)
    for order in range(3):
        Random(order).shuffle(items)
        buffer = cls(f"{limit}B", seed)
        for row in items:
            assert buffer.offer(row) == any(row is held for held in buffer)
            assert buffer.used == sum(map(nbytes, buffer)) <= limit
        assert [row.key for row in buffer] == expected
        assert buffer.refused == sum(size > limit for size in sizes)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(3, 60), max_size=40), st.integers(1, 200), st.integers(0, 99))
def test_a_reservoir_in_bytes_is_the_longest_prefix_that_fits(sizes: list[int], limit: int, seed: int) -> None:
    check_prefix(ReservoirBuffer, sizes, limit, seed)


@pytest.mark.parametrize("mutant", [TakesWhatFits, EvictsOne, TooLargeClosesTheDoor])
def test_wrong_reservoirs_in_bytes_are_caught(mutant: Any) -> None:
    def all_seeds(cls: Any) -> None:
        for seed in range(20):
            check_prefix(cls, [3, 40, 5, 90, 7, 30, 3, 3, 120, 20, 8, 4] * 3, 100, seed)

    all_seeds(ReservoirBuffer)
    with pytest.raises(AssertionError):
        all_seeds(mutant)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.integers(3, 80), st.booleans()), max_size=60),
    st.integers(1, 150),
)
def test_bytes_are_never_exceeded(cls: Any, steps: list[tuple[int, bool]], limit: int) -> None:
    buffer = cls(f"{limit}B")
    refused = 0
    for row, (size, erase) in zip(sized([size for size, _ in steps], "aabc"), steps, strict=True):
        assert buffer.offer(row) == any(row is held for held in buffer)
        refused += size > limit
        if erase and len(buffer):
            assert buffer.erase([next(iter(buffer)).key]) == 1
        assert buffer.used == sum(map(nbytes, buffer)) <= limit
        assert buffer.refused == refused
        if cls is not ReservoirBuffer:
            assert sum(buffer.groups.values()) == len(buffer)
    assert buffer.seen == len(steps)


@pytest.mark.parametrize("cls", KINDS)
def test_a_row_larger_than_everything_changes_nothing(cls: Any) -> None:
    items = sized([10] * 30)
    with_giants, without = cls("100B"), cls("100B")
    for i, row in enumerate(items):
        without.offer(row)
        with_giants.offer(row)
        assert not with_giants.offer(Example(f"giant {i}", "t", x=torch.zeros(100)))
    assert [row.key for row in with_giants] == [row.key for row in without]
    assert (with_giants.refused, with_giants.seen) == (30, 60)
    assert (without.refused, without.used) == (0, 100)


def test_the_group_with_most_bytes_gives_way() -> None:
    """100 bytes hold five rows of 10 in a and two of 20 in b. With 20 more in c, a (50) gives up its oldest."""
    buffer = RingBuffer("100B")
    rows = [*(row.but(task="a") for row in sized([10] * 5)), *(row.but(task="b") for row in sized([20] * 7)[5:])]
    buffer.extend(rows)
    assert buffer.used == 90
    assert buffer.offer(Example("new", "c", x=torch.zeros(17, dtype=torch.uint8)))
    assert (buffer.used, buffer.groups) == (100, {"a": 4, "b": 2, "c": 1})
    assert rows[0] not in list(buffer)


@pytest.mark.parametrize("cut", [0, 30, 60])
def test_two_halves_in_bytes_merged_equal_one_pass(cut: int) -> None:
    items = sized([3 + i * 7 % 50 for i in range(60)])
    one, other, whole = (ReservoirBuffer("200B", 1) for _ in range(3))
    one.extend(items[:cut])
    other.extend(items[cut:])
    one.merge(other)
    whole.extend(items)
    assert list(map(id, one)) == list(map(id, whole))
    assert (one.used, one.seen, one._threshold) == (whole.used, whole.seen, whole._threshold)


def test_a_larger_buffer_merges_into_a_smaller_one() -> None:
    items = sized([40, 3, 3, 50, 8, 8])
    large, small, whole = ReservoirBuffer("1KB"), ReservoirBuffer("30B"), ReservoirBuffer("30B")
    large.extend(items)
    whole.extend(items)
    small.merge(large)
    assert [row.key for row in small] == [row.key for row in whole]
    assert small.refused == whole.refused == 2


def test_the_size_is_saved_as_it_was_written() -> None:
    buffer = ReservoirBuffer("1 KiB")
    buffer.extend(sized([100] * 30 + [2000]))
    state = buffer.state_dict()
    assert json.dumps({key: value for key, value in state.items() if key != "items"})
    again = ReservoirBuffer(1)
    again.load_state_dict(state)
    assert (again.capacity, again.limit, again.used, again.refused) == ("1 KiB", 1024, 1000, 1)
    assert again.sample(10) != []
