"""Every policy against plain Python on explicit tuples and naive loops; shares of an order against brute force."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from random import Random
from statistics import mean, median
from typing import Any

import pytest
import torch

from perdure.errors import ConfigError
from perdure.memory import POLICIES, order, select
from perdure.memory.buffer import name_of
from perdure.memory.policies import Facts
from perdure.memory.select import first, policy_of
from perdure.order import priority
from perdure.types import Example

SEED, DRAW = 7, 3
LEVELS: list[Any] = [1, "Level 3", "Level 5", 2.5, None, "Level ?", "-1 (trivial)", "Level 3", True, "1e1"]
WORTH = [1.0, 3.0, 5.0, 2.5, None, None, -1.0, 3.0, 1.0, 10.0]


class World:
    """Rows with few distinct values, so that there are many ties; all of them whole, so that ties are exact."""

    def __init__(self, num_rows: int, seed: int) -> None:
        draw = Random(seed)
        self.level = [draw.randrange(len(LEVELS)) for _ in range(num_rows)]
        self.type = [draw.choice("xyz") for _ in range(num_rows)]
        self.loss = [float(draw.randrange(9)) for _ in range(num_rows)]
        self.learnt = [float(draw.randrange(5)) for _ in range(num_rows)]
        self.points = [[draw.randrange(-4, 5) for _ in range(3)] for _ in range(num_rows)]
        self.rows = [
            Example(str(i), "t", fields={"level": LEVELS[self.level[i]], "type": self.type[i]})
            for i in range(num_rows)
        ]
        self.tie = [priority(SEED, "select", DRAW, "t", key=str(i)) for i in range(num_rows)]

    def order(self, policy: str, shuffle: int = 0, **settings: Any) -> list[int]:
        places = list(range(len(self.rows)))
        Random(shuffle).shuffle(places)
        rows = [self.rows[i] for i in places]
        found = order(
            rows,
            policy,
            losses={str(name_of(row)): self.loss[int(row.key)] for row in rows},
            learnt={str(name_of(row)): self.learnt[int(row.key)] for row in rows},
            features=torch.tensor([self.points[i] for i in places], dtype=torch.float32),
            **{"seed": SEED, "draw": DRAW, **settings},
        )
        return [int(row.key) for row in found]

    def brute_force(self, policy: str) -> list[int]:
        everything = range(len(self.rows))
        worth = [WORTH[level] for level in self.level]
        keys: dict[str, Callable[[int], Any]] = {
            "random": lambda i: (),
            "difficulty_hard": lambda i: (worth[i] is None, -(worth[i] or 0)),
            "difficulty_easy": lambda i: (worth[i] is None, worth[i] or 0),
            "loss_descending": lambda i: (-self.loss[i],),
            "loss_ascending": lambda i: (self.loss[i],),
            "surprise": lambda i: (-(self.loss[i] - self.learnt[i]),),
            "boundary": lambda i: (abs(self.loss[i] - median(self.loss)),),
        }
        if policy in keys:
            return sorted(everything, key=lambda i: (*keys[policy](i), self.tie[i]))
        naive = {"balanced": self.in_turn, "diverse": self.k_centre, "herding": self.herded}
        if policy in naive:
            return naive[policy]()
        return self.alternated(policy.partition(":")[2] or "loss_descending")

    def in_turn(self) -> list[int]:
        label = [json.dumps({"level": LEVELS[k], "type": t}) for k, t in zip(self.level, self.type, strict=True)]
        groups = sorted(set(label), key=lambda g: priority(SEED, "select group", DRAW, key=g))
        waiting = {g: sorted((i for i, t in enumerate(label) if t == g), key=self.tie.__getitem__) for g in groups}
        found = []
        while any(waiting.values()):
            found += [waiting[g].pop(0) for g in groups if waiting[g]]
        return found

    def gap(self, i: int, j: int) -> int:
        return sum((a - b) ** 2 for a, b in zip(self.points[i], self.points[j], strict=True))

    def centre(self, chosen: Sequence[int]) -> list[Fraction]:
        return [Fraction(sum(self.points[i][d] for i in chosen), len(chosen)) for d in range(3)]

    def k_centre(self) -> list[int]:
        left = set(range(len(self.rows)))
        middle = self.centre(list(left))
        found = [min(left, key=lambda i: (_square(self.points[i], middle), self.tie[i]))]
        left -= set(found)
        while left:
            found.append(min(left, key=lambda i: (-min(self.gap(i, j) for j in found), self.tie[i])))
            left.remove(found[-1])
        return found

    def herded(self) -> list[int]:
        left = set(range(len(self.rows)))
        middle = self.centre(list(left))
        found: list[int] = []
        while left:
            found.append(min(left, key=lambda i: (_square(self.centre([*found, i]), middle), self.tie[i])))
            left.remove(found[-1])
        return found

    def alternated(self, best: str) -> list[int]:
        queues = [self.brute_force("random"), self.brute_force(best)]
        found: list[int] = []
        for turn in range(len(self.rows)):
            found.append(next(i for i in queues[turn % 2] if i not in found))
        return found


def _square(one: Sequence[Any], other: Sequence[Any]) -> Fraction:
    return sum(((Fraction(a) - b) ** 2 for a, b in zip(one, other, strict=True)), Fraction(0))


NAMES = [*POLICIES, "mixed:diverse", "mixed:difficulty_easy", "mixed:random"]


def check(policy: str) -> None:
    for num_rows, seed in ((1, 0), (2, 1), (9, 2), (24, 3)):
        world = World(num_rows, seed)
        expected = world.brute_force(policy)
        assert sorted(expected) == list(range(num_rows))
        for shuffle in range(3):
            assert world.order(policy, shuffle) == expected


@pytest.mark.parametrize("policy", NAMES)
def test_a_policy_is_the_brute_force_order_however_rows_arrive(policy: str) -> None:
    check(policy)


def ties_by_arrival(rows: Sequence[Example], seed: int, draw: int) -> list[int]:
    return list(range(len(rows)))


def easy_for_hard(facts: Facts) -> Iterable[int]:
    return POLICIES["difficulty_easy"].rank(facts)


def unknown_as_nought(facts: Facts) -> list[int]:
    worth = [WORTH[LEVELS.index(row.fields["level"])] or 0 for row in facts.rows]
    return sorted(range(len(worth)), key=worth.__getitem__)


def boundary_by_the_mean(facts: Facts) -> list[int]:
    middle = mean(facts.losses)
    return sorted(range(len(facts.rows)), key=lambda i: abs(facts.losses[i] - middle))


def learnt_less_now(facts: Facts) -> list[int]:
    return sorted(range(len(facts.rows)), key=lambda i: facts.losses[i] - facts.learnt[i])


def by_the_mean_of_distances(facts: Facts) -> list[int]:
    gaps = torch.cdist(facts.features, facts.features)
    found = [int((facts.features - facts.features.mean(0)).square().sum(1).argmin())]
    while len(found) < len(facts.rows):
        far = gaps[found].mean(0)
        far[found] = -1
        found.append(int(far.argmax()))
    return found


def nearest_to_the_mean(facts: Facts) -> list[int]:
    return (facts.features - facts.features.mean(0)).square().sum(1).argsort(stable=True).tolist()


def group_after_group(facts: Facts) -> list[int]:
    return sorted(range(len(facts.rows)), key=lambda i: str(facts.rows[i].fields["type"]))


@pytest.mark.parametrize(
    ("policy", "mutant"),
    [
        ("difficulty_hard", easy_for_hard),
        ("difficulty_easy", unknown_as_nought),
        ("boundary", boundary_by_the_mean),
        ("surprise", learnt_less_now),
        ("diverse", by_the_mean_of_distances),
        ("herding", nearest_to_the_mean),
        ("balanced", group_after_group),
    ],
)
def test_wrong_policies_are_caught(policy: str, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, policy, replace(POLICIES[policy], rank=mutant))
    with pytest.raises(AssertionError):
        check(policy)


def test_ties_broken_by_arrival_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_keyed", ties_by_arrival)
    for policy in ("loss_descending", "difficulty_hard", "random", "diverse"):
        with pytest.raises(AssertionError):
            check(policy)


@pytest.mark.parametrize("policy", ["diverse", "herding"])
def test_a_limit_is_a_prefix_and_the_rest_is_keyed(policy: str) -> None:
    world = World(24, 3)
    whole, cut = world.order(policy), world.order(policy, limit=9)
    assert cut[:9] == whole[:9]
    assert cut[9:] == sorted(cut[9:], key=world.tie.__getitem__)
    assert sorted(cut) == list(range(24))


def test_another_draw_and_another_seed_break_ties_anew() -> None:
    world = World(24, 3)
    found = [world.order("loss_descending", seed=seed, draw=draw) for seed in (0, 1) for draw in (0, 1)]
    assert len(set(map(tuple, found))) == 4
    assert len({tuple(world.loss[i] for i in one) for one in found}) == 1


def test_a_random_order_favours_no_row() -> None:
    """Of 12 rows the first 3 of 2,000 draws: each row 500 times in the mean, σ = √(2000 · ¼ · ¾) = 19.4."""
    rows = [Example(str(i), "t") for i in range(12)]
    count = [0] * 12
    for draw in range(2_000):
        for row in order(rows, "random", seed=1, draw=draw)[:3]:
            count[int(row.key)] += 1
    assert max(abs(n - 500) for n in count) < 4 * 19.4


def test_a_field_of_another_name_and_groups_by_it() -> None:
    rows = [Example(str(i), "t", fields={"hops": i % 3}) for i in range(9)]
    found = order(rows, "difficulty_hard", seed=0, field="hops")
    assert [row.fields["hops"] for row in found] == [2, 2, 2, 1, 1, 1, 0, 0, 0]
    found = order(rows, "balanced", seed=0, field="hops")
    assert all({row.fields["hops"] for row in found[i : i + 3]} == {0, 1, 2} for i in (0, 3, 6))


ROW = Example("r1", "math", fields={"subject": "algebra", "source": "x"})


@pytest.mark.parametrize(
    ("policy", "given", "message"),
    [
        ("loss_descnding", {}, r"unknown policy 'loss_descnding'. Did you mean 'loss_descending'\?"),
        ("mixed:mixed", {}, "unknown policy 'mixed:mixed'"),
        ("mixed:", {}, "unknown policy 'mixed:'"),
        (
            "difficulty_hard",
            {},
            "row 'r1' of task 'math' has no column 'level' .* its columns are: subject, source",
        ),
        ("balanced", {}, "row 'r1' of task 'math' has neither a column 'type' nor 'level' .*subject, source"),
        ("loss_descending", {}, "goes by the loss of each row: give losses"),
        ("loss_descending", {"losses": {"math\0r2": 1.0}}, "losses has none for row 'r1' of task 'math'"),
        ("loss_ascending", {"losses": {"math\0r1": float("nan")}}, "in losses row 'r1' of task 'math' has nan"),
        ("surprise", {"losses": {"math\0r1": 1.0}}, "the loss of each row when it had been learnt: give learnt"),
        ("diverse", {}, r"give features, a tensor \[1, D\], got none"),
        ("herding", {"features": torch.ones(2, 3)}, r"a tensor \[1, D\], got \[2, 3\]"),
        ("diverse", {"features": torch.tensor([[1.0, torch.inf]])}, "features of row 'r1' .* not all finite"),
    ],
)
def test_what_is_missing_is_said(policy: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        order([ROW], policy, seed=0, **given)


def test_no_rows_are_in_order_already() -> None:
    for name in NAMES:
        assert order([], name, seed=0) == []
    assert policy_of("mixed:surprise").needs == {"losses", "learnt"}


def check_first(of: Callable[..., list[Example]]) -> None:
    """Shares as they are written, in hundredths: ⌊share · n⌋ by whole numbers."""
    for n in (1, 2, 3, 7, 49, 100, 101):
        rows = [Example(str(i)) for i in range(n)]
        for hundredths in range(1, 101):
            assert of(rows, hundredths / 100) == rows[: max(1, hundredths * n // 100)]


def float_share(ordered: Sequence[Example], share: float) -> list[Example]:
    return list(ordered[: max(1, int(share * len(ordered)))])


def test_a_share_in_examples_is_exact() -> None:
    check_first(first)
    with pytest.raises(AssertionError):
        check_first(float_share)
    assert first([], 0.5) == []


def learning(targets: int) -> Example:
    labels = torch.full((targets + 2,), -100)
    labels[2:] = 1
    return Example(str(targets), y=labels)


def check_tokens(of: Callable[..., list[Example]]) -> None:
    """The distance of every prefix from the share, and of the nearest the shortest."""
    draw = Random(0)
    for _ in range(60):
        sizes = [draw.randrange(6) for _ in range(draw.randrange(1, 12))]
        rows = [learning(size) for size in sizes]
        for share in (0.05, 0.1, 0.29, 0.5, 0.9, 1.0):
            wanted = Fraction(str(share)) * sum(sizes)
            best = min(range(1, len(rows) + 1), key=lambda k: (abs(sum(sizes[:k]) - wanted), k))
            assert of(rows, share, "tokens") == rows[:best]


def not_above(ordered: Sequence[Example], share: float, unit: str) -> list[Example]:
    """Wrong: the longest prefix that is not above the share."""
    sizes = [int((row.y[1:] != -100).sum()) for row in ordered if row.y is not None]
    fits = [k for k in range(1, len(sizes) + 1) if sum(sizes[:k]) <= Fraction(str(share)) * sum(sizes)]
    return list(ordered[: max(fits, default=1)])


def test_a_share_in_tokens_is_the_nearest_prefix() -> None:
    check_tokens(first)
    with pytest.raises(AssertionError):
        check_tokens(not_above)


def test_rows_without_token_labels_count_one() -> None:
    rows = [Example(str(i), y=torch.tensor(i)) for i in range(10)]
    assert first(rows, 0.3, "tokens") == rows[:3]


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan"), True, "half"])
def test_what_is_no_share_is_refused(share: Any) -> None:
    with pytest.raises(ConfigError, match="a share of the rows must be above 0 and at most 1"):
        first([ROW], share)


def test_another_unit_is_refused() -> None:
    with pytest.raises(ConfigError, match='unit must be "examples" or "tokens"'):
        first([ROW], 0.5, "bytes")  # type: ignore[arg-type]
