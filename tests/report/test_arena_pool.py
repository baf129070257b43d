"""Runs that differ by their seed, as one: which are pooled, their intervals, and what of a gain is learning."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t

from perdure.report.arena import arena_run, read_arena_run
from perdure.report.arena_pool import Group, labels, other_evaluation, over_seeds, pooled, t_quantile
from perdure.report.arena_run import ArenaRun, Estimate
from perdure.report.arena_words import elicitation, reworded, score

from .arena_runs import EIGHT, FIVE, results, write

Interval = Callable[[Sequence[float]], tuple[float, float]]


def run_of(folder: Path, **options: Any) -> ArenaRun:
    lr = options.pop("lr", 1e-3)
    return read_arena_run(write(folder, results(**options), log=False, lr=lr))


def test_the_quantile_is_that_of_another_library() -> None:
    for degrees in range(1, 40):
        assert t_quantile(degrees) == pytest.approx(t.ppf(0.975, degrees), abs=1e-12)


def ours(values: Sequence[float]) -> tuple[float, float]:
    found = over_seeds(values)
    return found.low, found.high


def around(values: Sequence[float], half: float) -> tuple[float, float]:
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def normal(x: Sequence[float]) -> tuple[float, float]:
    return around(x, 1.959964 * statistics.stdev(x) / math.sqrt(len(x)))


def population_variance(x: Sequence[float]) -> tuple[float, float]:
    return around(x, t_quantile(len(x) - 1) * statistics.pstdev(x) / math.sqrt(len(x)))


def not_of_the_mean(x: Sequence[float]) -> tuple[float, float]:
    return around(x, t_quantile(len(x) - 1) * statistics.stdev(x))


def all_degrees(x: Sequence[float]) -> tuple[float, float]:
    return around(x, t_quantile(len(x)) * statistics.stdev(x) / math.sqrt(len(x)))


def check_interval(interval: Interval) -> None:
    """Of 0.7, 0.8, 0.9: mean 0.8, s = √(0.02 / 2) = 0.1, t(0.975, 2) = 4.3027, so ± 4.3027 · 0.1 / √3 = 0.24842."""
    assert interval([0.7, 0.8, 0.9]) == (pytest.approx(0.55158, abs=1e-5), pytest.approx(1.04842, abs=1e-5))


def test_an_interval_by_hand() -> None:
    check_interval(ours)


@pytest.mark.parametrize("wrong", [normal, population_variance, not_of_the_mean, all_degrees])
def test_a_wrong_interval_is_caught(wrong: Interval) -> None:
    with pytest.raises(AssertionError):
        check_interval(wrong)


def test_one_value_or_equal_ones_have_no_interval() -> None:
    for values, mean, n in (([0.5, math.nan], 0.5, 1), ([0.5, 0.5, 0.5], 0.5, 3)):
        found = over_seeds(values)
        assert (found.value, found.n, found.bounded) == (mean, n, False)
    assert not over_seeds([]).known


def test_a_share_stays_a_share(tmp_path: Path) -> None:
    """The lone run keeps its own interval; that over seeds, up to 1.048 by hand, ends at 1."""
    base = run_of(tmp_path / "a")

    def scored(value: float) -> ArenaRun:
        exact = replace(base.scores.exact, final=Estimate(value, value - 0.1, value + 0.05))
        return replace(base, scores=replace(base.scores, exact=exact))

    runs = tuple(map(scored, (0.7, 0.8, 0.9)))
    assert Group("a", runs[:1]).share(lambda run: run.scores.exact.final) == Estimate(0.7, 0.7 - 0.1, 0.7 + 0.05)
    found = Group("a", runs).share(lambda run: run.scores.exact.final)
    assert (found.low, found.high, found.n) == (pytest.approx(0.55158, abs=1e-5), 1.0, 3)
    assert score(found) == "80.0 % (55.2–100.0)"
    equal = Group("a", runs[:1] * 3).share(lambda run: run.scores.exact.final)
    assert score(equal) == "70.0 %"


def test_runs_that_differ_by_seed_alone_are_one(tmp_path: Path) -> None:
    """Names and folders do not count; a learning rate, a model and a seed that comes again do."""
    runs = [
        run_of(tmp_path / "0", seed=0, name="first"),
        run_of(tmp_path / "1", seed=0, name="soft", method="soft-prompt"),
        run_of(tmp_path / "2", seed=1, name="second"),
        run_of(tmp_path / "3", seed=2, name="third", lr=1e-4),
        run_of(tmp_path / "4", seed=1, name="again"),
        run_of(tmp_path / "5", seed=3, name="lora", model="other"),
    ]
    bare = run_of(tmp_path / "6", seed=7, name="lora")
    (tmp_path / "6" / "config.yaml").unlink()
    runs.append(read_arena_run(bare.path))
    groups = pooled(runs)
    assert [[run.path.name for run in group.runs] for group in groups] == [
        ["0", "2"],
        ["1"],
        ["3"],
        ["4"],
        ["5"],
        ["6"],
    ]
    assert [group.name for group in groups][:4] == ["lora, nano", "soft", "third", "again"]
    assert labels(groups)[:2] == ["lora, nano (n = 2)", "soft (n = 1)"]
    assert len({group.name for group in groups}) == len(groups)
    assert labels(groups[1:3]) == ["soft", "third"]


def test_groups_of_one_name_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    options: Iterable[dict[str, Any]] = (
        {}, {"lr": 1e-4}, {"model": "org/Other-1B"}, {"drift": "blocks"},
    )  # fmt: skip
    groups = pooled([run_of(tmp_path / str(i), **one) for i, one in enumerate(options)])
    assert [group.name for group in groups] == [
        "lora, nano, drift off, lr 0.001",
        "lora, nano, drift off, lr 0.0001",
        "lora, org/Other-1B, drift off, lr 0.001",
        "lora, nano, drift blocks, lr 0.001",
    ]


def test_what_makes_held_out_rows_differ(tmp_path: Path) -> None:
    first, *others = (
        Group(str(i), (run_of(tmp_path / str(i), **options),))
        for i, options in enumerate(({}, {"seed": 1}, {"rows": 30, "levels": [1]}, {"kinds": EIGHT, "forms": 1}))
    )
    assert [other_evaluation(first, group) for group in others] == [
        [],
        ["held-out rows: 500 against 30", "levels: 1, 2, 3 against 1"],
        [
            f"kinds: {', '.join(FIVE)} against {', '.join(EIGHT)}",
            "wordings of each kind: 3 against 1",
        ],
    ]
    changed = results()
    changed["kinds"]["math"]["rows"] = 7
    assert other_evaluation(first, Group("x", (arena_run(changed),))) == ["other numbers of rows of each kind"]


def test_what_a_gain_is_made_of_in_words() -> None:
    content = results(kinds=("math", "code"), rows=200)
    content["kinds"]["code"]["plain"] = None
    content.update(initial=0.1, final=0.7, elicitation={"known": 0.45, "elicited": 0.35, "learnt": 0.25, "lost": 0})
    group = Group("a", (arena_run(content),))
    assert reworded(group) == "1 of 2 kinds"
    assert elicitation(group) == (
        "Before training 45.0 % of the rows were right in some reading. The gain of 60.0 points: 35.0 are rows "
        "known in another reading (elicitation of the format), 25.0 rows that were right in none (learning)."
    )
    del content["elicitation"]
    assert elicitation(Group("a", (arena_run(content),))) == "What of the gain is learning was not measured."
