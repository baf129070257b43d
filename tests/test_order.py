"""Keyed priorities: uniform, independent between contexts, and stable when keys come and go."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from scipy.stats import chi2, chisquare

from perdure.order import SPAN, arrange, prioritiser, priority, take, uniform

LEAST_P = 1e-3  # all draws are keyed, so that a test that passes once passes always


def name(i: int) -> str:
    return str(i)


def test_priority_is_the_keyed_hash_that_saved_runs_rely_on() -> None:
    """blake2b, 8 bytes, of the context as JSON followed by the key."""
    digest = hashlib.blake2b(b'[7, "order", null, true, 0.5]key', digest_size=8).digest()
    assert priority(7, "order", None, True, 0.5, key="key") == int.from_bytes(digest, "big")
    assert prioritiser(7, "order", None, True, 0.5)("key") == int.from_bytes(digest, "big")


@pytest.mark.parametrize("shift", [60, 30, 0], ids=["top bits", "middle bits", "low bits"])
def test_priority_is_uniform(shift: int) -> None:
    """16,000 consecutive keys over 16 bins: 1,000 each, χ² with 15 degrees of freedom."""
    rank = prioritiser(0, "test")
    counts = Counter((rank(name(i)) >> shift) & 15 for i in range(16_000))
    assert chisquare([counts[b] for b in range(16)]).pvalue > LEAST_P
    assert all(0 <= rank(name(i)) < SPAN for i in range(100))


def test_uniform_is_in_zero_one_and_has_mean_a_half() -> None:
    """The mean of 10,000 uniform numbers has standard deviation √(1/12/10⁴) = 0.0029; 4 of them are 0.0116."""
    values = [uniform("u", key=name(i)) for i in range(10_000)]
    assert 0 <= min(values) < max(values) < 1
    assert np.mean(values) == pytest.approx(0.5, abs=0.0116)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, "order"), (1, "order")),
        ((0, "order"), (0, "split")),
        ((0, "order", "a", 0, 1), (0, "order", "a", 1, 0)),
    ],
    ids=["seed", "purpose", "epoch and phase"],
)
def test_contexts_are_independent(first: tuple[object, ...], second: tuple[object, ...]) -> None:
    """Quartile by quartile, 8,000 keys: 500 in each of 16 cells, 9 degrees of freedom for independence."""
    one, other = prioritiser(*first), prioritiser(*second)
    table = np.zeros((4, 4))
    for i in range(8_000):
        table[one(name(i)) >> 62, other(name(i)) >> 62] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    assert chi2.sf(((table - expected) ** 2 / expected).sum(), 9) > LEAST_P


def test_every_permutation_is_as_likely() -> None:
    """4 items in 4,800 contexts: each of 24 permutations 200 times, 23 degrees of freedom."""
    counts = Counter(tuple(arrange("abcd", seed, "p", key=str)) for seed in range(4_800))
    assert chisquare([counts[p] for p in permutations("abcd")]).pvalue > LEAST_P


def test_arrange_is_a_permutation_and_not_the_identity() -> None:
    items = list(range(200))
    arranged = arrange(items, 0, "x", key=name)
    assert sorted(arranged) == items
    assert arranged != items
    assert arranged == arrange(reversed(items), 0, "x", key=name)
    assert arranged != arrange(items, 1, "x", key=name)


def test_removing_a_key_leaves_the_others_in_their_order() -> None:
    arranged = arrange(range(50), 3, "x", key=name)
    for gone in range(50):
        rest = arrange((i for i in range(50) if i != gone), 3, "x", key=name)
        assert rest == [i for i in arranged if i != gone]


def test_equal_keys_keep_their_order() -> None:
    arranged = arrange([("k", i) for i in range(20)], 0, key=lambda item: item[0])
    assert [i for _, i in arranged] == list(range(20))


def test_take_keeps_the_first_of_the_arrangement_in_the_order_given() -> None:
    items = list(range(100))
    first = set(arrange(items, 5, "cap", key=name)[:30])
    assert take(items, 30, 5, "cap", key=name) == [i for i in items if i in first]
    assert take(items, 0, 5, "cap", key=name) == []
    assert take(items, 100, 5, "cap", key=name) == items
    assert take(items, 101, 5, "cap", key=name) == items


def test_a_larger_cap_only_adds() -> None:
    items = list(range(60))
    smaller: set[int] = set()
    for count in range(0, 61, 5):
        larger = set(take(items, count, 1, "cap", key=name))
        assert len(larger) == count
        assert smaller <= larger
        smaller = larger


def test_context_and_key_cannot_be_confused() -> None:
    assert priority("a", key="b") != priority("ab", key="")
    assert priority("a", "b", key="") != priority("a,b", key="")
    assert priority(1, key="") != priority("1", key="")
