"""The reservoir is a uniform sample of the distinct keys offered, whatever the order and the interruptions."""

from __future__ import annotations

import json
import time
from heapq import heappop, heappush
from itertools import combinations, count
from random import Random
from typing import Any

import pytest
import torch
from scipy.stats import chi2

from perdure.errors import ConfigError
from perdure.memory import ReservoirBuffer
from perdure.order import SPAN
from perdure.types import Example

LEAST_P = 1e-3  # all draws are keyed: what passes once passes always


def rows(number: int, task: str = "t") -> list[Example]:
    return [Example(str(i), task) for i in range(number)]


def keys(buffer: Any) -> set[str]:
    return {item.key for item in buffer}


def filled(capacity: int, items: Any, seed: int = 0) -> ReservoirBuffer:
    buffer = ReservoirBuffer(capacity, seed)
    buffer.extend(items)
    return buffer


def inclusion_p(kept: list[set[int]], number: int, capacity: int) -> float:
    """p of χ² that each of `number` items is kept as often, given m samples of exactly `capacity`.

    The count of one item has variance m·p(1−p) and two have covariance −m·p(1−p)/(N−1), p = k/N, so that
    Σ (O − mp)² · (N−1)/(N·m·p(1−p)) has N − 1 degrees of freedom.
    """
    m, p = len(kept), capacity / number
    squares = sum((sum(i in sample for sample in kept) - m * p) ** 2 for i in range(number))
    statistic = squares * (number - 1) / (number * m * p * (1 - p))
    return float(chi2.sf(statistic, number - 1))


def pair_z(kept: list[set[int]], number: int, capacity: int) -> float:
    """The largest |z| over all pairs, of how often both are kept: expected k(k−1)/(N(N−1)) of m samples."""
    m, p = len(kept), capacity * (capacity - 1) / (number * (number - 1))
    spread = (m * p * (1 - p)) ** 0.5
    return max(
        abs(sum(i in sample and j in sample for sample in kept) - m * p) / spread
        for i, j in combinations(range(number), 2)
    )


def samples(cls: Any, number: int, capacity: int, seeds: int) -> list[set[int]]:
    found = []
    for seed in range(seeds):
        buffer = cls(capacity, seed)
        for row in rows(number):
            buffer.offer(row)
        found.append({int(key) for key in keys(buffer)})
    return found


class AlgorithmR:
    """Vitter's algorithm R; `off_by_one` draws from one place too few, as is seen in the wild."""

    off_by_one = 0

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.items, self.seen, self.rng = capacity, [], 0, Random(seed)

    def offer(self, item: Any) -> None:
        self.seen += 1
        if len(self.items) < self.capacity:
            self.items.append(item)
        elif (place := self.rng.randrange(self.seen - self.off_by_one)) < self.capacity:
            self.items[place] = item

    def __iter__(self) -> Any:
        return iter(self.items)


class OffByOne(AlgorithmR):
    off_by_one = 1


def test_every_item_is_kept_as_often() -> None:
    """20 items, 6 kept, 3,000 seeds: 900 times each."""
    kept = samples(ReservoirBuffer, 20, 6, 3_000)
    assert all(len(sample) == 6 for sample in kept)
    assert inclusion_p(kept, 20, 6) > LEAST_P


def test_every_pair_is_kept_together_as_often() -> None:
    """8 items, 4 kept: each of the 28 pairs in 4·3/(8·7) = 3/14 of samples.

    Of 28 normal deviates the largest passes 4 with a chance of 28 · 6.3e-5 = 0.0018.
    """
    assert pair_z(samples(ReservoirBuffer, 8, 4, 3_000), 8, 4) < 4


def test_the_checks_tell_wrong_reservoirs_apart() -> None:
    """Algorithm R passes; off by one, item k+1 always enters, not with k/(k+1). Blocks pass inclusion only."""
    assert inclusion_p(samples(AlgorithmR, 20, 6, 3_000), 20, 6) > LEAST_P
    assert inclusion_p(samples(OffByOne, 20, 6, 3_000), 20, 6) < 1e-9
    blocks = [set(range(4)) if Random(seed).random() < 0.5 else set(range(4, 8)) for seed in range(3_000)]
    assert inclusion_p(blocks, 8, 4) > LEAST_P
    assert pair_z(blocks, 8, 4) > 4


def test_items_without_a_key_are_uniform_too() -> None:
    """Equal strings are separate offers: 20 of them, 6 kept, by their offer numbers."""
    kept = []
    for seed in range(2_000):
        buffer = ReservoirBuffer(6, seed)
        for i in range(20):
            buffer.offer((i,))
        kept.append({i for (i,) in buffer})
    assert inclusion_p(kept, 20, 6) > LEAST_P
    assert len(filled(10, ["same"] * 5)) == 5


def test_less_than_capacity_keeps_everything() -> None:
    assert keys(filled(10, rows(7))) == {str(i) for i in range(7)}


def test_order_of_offers_does_not_matter() -> None:
    items = rows(300)
    first = filled(20, items)
    Random(1).shuffle(items)
    second = filled(20, items)
    assert [row.key for row in first] == [row.key for row in second]
    assert [row.key for row in first.sample(5)] == [row.key for row in second.sample(5)]


def test_seeds_differ() -> None:
    assert keys(filled(20, rows(300), 0)) != keys(filled(20, rows(300), 1))


def test_a_key_offered_again_gets_no_second_draw() -> None:
    """Had every offer a draw of its own, a key offered 30 times would nearly always be held."""
    items = rows(100)
    once, often = filled(10, items), filled(10, items)
    for _ in range(30):
        for row in items[:20]:
            often.offer(row)
    assert keys(once) == keys(often)
    assert (once.seen, often.seen) == (100, 700)
    held = next(iter(often))
    assert often.offer(held.but(x=torch.ones(1)))
    assert next(iter(often)) is held


def test_one_key_in_two_tasks_is_two_items() -> None:
    assert len(filled(10, [*rows(3, "a"), *rows(3, "b")])) == 6


def test_offer_says_whether_the_item_is_held_now() -> None:
    buffer = ReservoirBuffer(5)
    for row in rows(200):
        assert buffer.offer(row) == (row.key in keys(buffer))
        assert len(buffer) <= 5


@pytest.mark.parametrize("shares", [(50, 50), (97, 3), (4, 96), (0, 100)])
def test_two_halves_merged_equal_one_pass(shares: tuple[int, int]) -> None:
    items = rows(100)
    one, other = filled(10, items[: shares[0]]), filled(10, items[shares[0] :])
    one.merge(other)
    whole = filled(10, items)
    assert list(map(id, one)) == list(map(id, whole))
    assert one.seen == whole.seen
    # and they go on alike
    for row in rows(50, "late"):
        assert one.offer(row) == whole.offer(row)
    assert list(map(id, one)) != list(map(id, filled(10, items)))
    assert [r.key for r in one] == [r.key for r in whole]


def test_merging_halves_that_overlap_counts_a_key_once() -> None:
    items = rows(100)
    one, other = filled(10, items[:70]), filled(10, items[30:])
    one.merge(other)
    assert [r.key for r in one] == [r.key for r in filled(10, items)]


def test_merging_after_an_erasure_keeps_the_lower_threshold() -> None:
    """What one half once refused may not come back through the other, else it would be favoured."""
    items = rows(100)
    one = filled(10, items)
    one.erase(sorted(keys(one))[:6])
    one.merge(filled(10, items[50:]))
    assert keys(one) <= keys(filled(10, items))


def test_what_cannot_be_merged_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="one seed can be merged, got seeds 0 and 1"):
        filled(3, rows(3)).merge(filled(3, rows(3), 1))
    with pytest.raises(ConfigError, match="only items with a key can be merged"):
        filled(3, rows(3)).merge(filled(3, ["x"]))
    filled(3, rows(3)).merge(filled(3, rows(3, "#1")))


class ForgetsThreshold(ReservoirBuffer):
    """The mutant: an erasure opens the door to whatever comes next."""

    def erase(self, wanted: Any) -> int:
        gone = super().erase(wanted)
        self._threshold = SPAN
        return gone


def test_an_erasure_does_not_favour_late_rows() -> None:
    """The threshold stays at the 11th smallest of 100 uniform priorities, 11/101 on average.

    So of 100 late rows 100·11/101 = 10.9 fall below it, of which at most 10 stay. Without the threshold nine places
    are free for anything: the first late rows fill them whatever their priority, and the buffer is always full.
    """

    def held_after(cls: Any) -> float:
        total = 0
        for seed in range(300):
            buffer = cls(10, seed)
            buffer.extend(rows(100, "early"))
            buffer.erase([row.key for row in list(buffer)])
            buffer.extend(rows(20, "late"))
            total += len(buffer)
        return total / 300

    assert held_after(ReservoirBuffer) == pytest.approx(20 * 11 / 101, abs=0.4)
    assert held_after(ForgetsThreshold) == 10


def test_erase_by_key_whatever_the_task() -> None:
    buffer = filled(10, [*rows(3, "a"), *rows(3, "b")])
    assert buffer.erase(["1", "absent"]) == 2
    assert keys(buffer) == {"0", "2"}
    assert all(row.key != "1" for row in buffer.sample(10))
    assert buffer.erase(["1"]) == 0
    assert buffer.seen == 6


def test_an_erased_key_may_be_offered_again() -> None:
    buffer = filled(10, rows(100))
    key = next(iter(buffer)).key
    buffer.erase([key])
    assert buffer.offer(Example(key, "t"))
    assert keys(buffer) == keys(filled(10, rows(100)))


def test_sample_is_without_replacement_and_of_what_is_held() -> None:
    buffer = filled(10, rows(100))
    for k in (0, 1, 5, 10, 11, 1000):
        drawn = [row.key for row in buffer.sample(k)]
        assert len(drawn) == len(set(drawn)) == min(k, 10)
        assert set(drawn) <= keys(buffer)
    assert ReservoirBuffer(3).sample(2) == []


def test_sample_is_uniform() -> None:
    """10 held rows, 3 drawn, 3,000 times: 900 each."""
    buffer = filled(10, rows(10))
    drawn = [{int(row.key) for row in buffer.sample(3)} for _ in range(3_000)]
    assert inclusion_p(drawn, 10, 3) > LEAST_P
    assert pair_z(drawn, 10, 3) < 4


def test_draws_follow_from_seed_and_number_alone() -> None:
    torch.manual_seed(0)
    one = [[row.key for row in filled(10, rows(100)).sample(4)] for _ in range(2)]
    assert one[0] == one[1]
    buffer = filled(10, rows(100))
    assert [row.key for row in buffer.sample(4)] == one[0]
    assert [row.key for row in buffer.sample(4)] != one[0]
    assert [r.key for r in filled(10, rows(10), 0).sample(9)] != [r.key for r in filled(10, rows(10), 1).sample(9)]


@pytest.mark.parametrize("cut", [0, 3, 50, 199])
def test_resumed_in_the_middle_of_a_stream_it_is_identical(cut: int) -> None:
    items = [row.but(x=torch.tensor([float(row.key)]), y=torch.tensor(i)) for i, row in enumerate(rows(200))]
    through, before = ReservoirBuffer(20, seed=4), ReservoirBuffer(20, seed=4)
    trace: list[list[Any]] = [[], []]
    resumed = before
    for i, row in enumerate(items):
        if i == cut:
            state = before.state_dict()
            tensors = state["items"]["tensors"]
            state["items"]["tensors"] = None
            state = json.loads(json.dumps(state))  # what is not a tensor survives JSON
            state["items"]["tensors"] = tensors
            resumed = ReservoirBuffer(1)
            resumed.load_state_dict(state)
        for buffer, lines in zip((through, resumed), trace, strict=True):
            held = buffer.offer(row)
            lines.append((held, [(r.key, r.task, float(r.x), int(r.y)) for r in buffer.sample(3)]))
            if i == 150:
                buffer.erase([str(k) for k in range(0, 100, 2)])
    assert trace[0] == trace[1]
    assert (through.seen, through.capacity, through.seed) == (resumed.seen, resumed.capacity, resumed.seed)
    assert [row.key for row in through] == [row.key for row in resumed]


def test_the_resume_check_can_fail() -> None:
    buffer = filled(5, rows(50))
    for key, value in {"threshold": str(SPAN), "draws": 3, "offers": 0, "seed": 1}.items():
        fresh = ReservoirBuffer(1)
        fresh.load_state_dict({**buffer.state_dict(), key: value})
        fresh.extend(rows(50, "late"))
        whole = filled(5, [*rows(50), *rows(50, "late")])
        same = [(r.task, r.key) for r in fresh] == [(r.task, r.key) for r in whole]
        drawn = [(r.task, r.key) for r in fresh.sample(4)] == [(r.task, r.key) for r in whole.sample(4)]
        # A full buffer finds its threshold again by itself; an erased one does not (above).
        assert (same and drawn and fresh.seen == whole.seen) == (key == "threshold"), key


def test_only_examples_are_saved() -> None:
    with pytest.raises(ConfigError, match="only a buffer of Example items can be saved"):
        filled(3, ["text"]).state_dict()


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_capacity_below_one_is_refused(capacity: int) -> None:
    with pytest.raises(ConfigError, match=f"capacity must be at least 1, got {capacity}"):
        ReservoirBuffer(capacity)


class SortsEachTime(ReservoirBuffer):
    """The mutant: the buffer is sorted at each offer."""

    def offer(self, item: Any) -> bool:
        held = super().offer(item)
        self._heap.sort(key=lambda entry: entry[1])
        self._heap.sort()
        return held


def test_sorting_at_each_offer_is_far_slower() -> None:
    """5,000 offers into 1,000 places, one after the other on the same machine: ten times the time and more."""
    seconds = []
    for make in (ReservoirBuffer, SortsEachTime):
        buffer, start = make(1_000), time.process_time()
        for number in range(5_000):
            buffer.offer((number,))
        seconds.append(time.process_time() - start)
    assert seconds[1] > 10 * seconds[0]


def test_200_000_offers_take_seconds() -> None:
    """O(log k) an offer, more than a million a second at its best: 4 s leaves room for slow machines."""
    numbers = count()
    start = time.process_time()
    buffer = ReservoirBuffer(1_000)
    for _ in range(200_000):
        buffer.offer((next(numbers),))
    assert time.process_time() - start < 4
    assert len(buffer) == 1_000
    assert buffer.seen == 200_000


def test_the_kept_are_the_smallest_priorities() -> None:
    """Brute force: sort all, take the first ten."""
    heap: list[tuple[int, str]] = []
    buffer = filled(10, rows(500))
    for row in rows(500):
        heappush(heap, (buffer._rank(f"t\0{row.key}"), row.key))
    assert [row.key for row in buffer] == [heappop(heap)[1] for _ in range(10)]
