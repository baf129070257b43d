"""The gate's tests: closed forms, numbers by hand, all outcomes summed another way, and how often they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, multinomial, norm

from perdure.teaching import gate
from perdure.teaching.gate import Fall, broken_p, of_lessons, of_sample, paired_p

P = Callable[[int, int, int, float], float]
TOLERANCES = (0.0, 0.02, 0.1)


def marks(rows: int, broken: int, mended: int, right: int | None = None) -> tuple[list[bool], list[bool]]:
    """Marks before and after; `right` rows are right before, half of those that stay where nothing is said."""
    kept = (rows - broken - mended) // 2 if right is None else right - broken
    wrong = rows - broken - mended - kept
    before = [True] * (broken + kept) + [False] * (mended + wrong)
    after = [False] * broken + [True] * (kept + mended) + [False] * wrong
    return before, after


# Earlier lessons: the binomial's tail


def check_broken(p: Callable[[int, int, float], float]) -> None:
    """Against SciPy, and by hand: of 10 at 0.02, 1 − 0.98^10 − 10·0.02·0.98^9 = 1 − 0.81707 − 0.16675 = 0.01618."""
    assert p(10, 2, 0.02) == pytest.approx(0.016178, abs=1e-6)
    for right in (1, 2, 7, 50, 300):
        for broken in {1, 2, right // 2 or 1, right}:
            for tolerance in (0.01, 0.02, 0.2):
                if broken <= right:
                    wanted = binom.sf(broken - 1, right, tolerance)
                    assert p(right, broken, tolerance) == pytest.approx(wanted, rel=1e-9), (
                        right,
                        broken,
                        tolerance,
                    )


def test_broken_lessons_are_a_binomial_s_tail() -> None:
    check_broken(broken_p)


def more_than(right: int, broken: int, tolerance: float) -> float:
    return float(binom.sf(broken, right, tolerance))


def without_tolerance(right: int, broken: int, tolerance: float) -> float:
    return float(broken == 0)


def just_as_many(right: int, broken: int, tolerance: float) -> float:
    return float(binom.pmf(broken, right, tolerance))


@pytest.mark.parametrize("wrong", [more_than, without_tolerance, just_as_many])
def test_wrong_tails_are_caught(wrong: Callable[[int, int, float], float]) -> None:
    with pytest.raises(AssertionError):
        check_broken(wrong)


def check_of_right_ones(of: Callable[..., Fall]) -> None:
    """Of 40 rows 10 were right, and 2 of these broke: 0.0162 as above; of 40 it would be 0.19."""
    assert of(*marks(40, 2, 0, right=10), 0.02).p == pytest.approx(0.016178, abs=1e-6)
    # What was mended makes up for nothing: another lesson is lost.
    assert of(*marks(40, 2, 1, right=10), 0.02).p == pytest.approx(0.016178, abs=1e-6)


def of_all_rows(before: Sequence[bool], after: Sequence[bool], tolerance: float) -> Fall:
    broken = sum(was and not now for was, now in zip(before, after, strict=True))
    return Fall(len(before), broken, 0, broken_p(len(before), broken, tolerance), tolerance)


def test_only_lessons_that_were_right_can_break() -> None:
    check_of_right_ones(of_lessons)
    with pytest.raises(AssertionError):
        check_of_right_ones(of_all_rows)


# The probe: Tango's score, and its distribution under the fitted null hypothesis


def log_likelihood(q: float, rows: int, broken: int, mended: int, tolerance: float) -> float:
    total = 0.0
    for count, p in ((broken, q + tolerance), (mended, q), (rows - broken - mended, 1 - 2 * q - tolerance)):
        total += count * math.log(max(p, 1e-300)) if count else 0.0
    return total


def fitted(rows: int, broken: int, mended: int, tolerance: float) -> float:
    """The root of the likelihood's derivative in q, which falls; an end of its range where it has none."""
    rest = rows - broken - mended

    def slope(q: float) -> float:
        return broken / (q + tolerance) + mended / q - 2 * rest / (1 - 2 * q - tolerance)

    low, high = 1e-14, (1 - tolerance) / 2 - 1e-14
    if slope(low) <= 0:
        return 0.0
    return (1 - tolerance) / 2 if slope(high) >= 0 else float(brentq(slope, low, high, xtol=1e-15))


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize(
    "pairs", [(20, 4, 1), (20, 3, 0), (20, 0, 3), (200, 12, 9), (7, 7, 0), (7, 3, 4), (9, 0, 0)]
)
def test_the_share_of_mended_rows_fits_best(pairs: tuple[int, int, int], tolerance: float) -> None:
    rows, broken, mended = pairs
    found = float(gate._mended_share(rows, np.array(broken), np.array(mended), tolerance))
    best = minimize_scalar(
        lambda q: -log_likelihood(q, *pairs, tolerance), bounds=(0, (1 - tolerance) / 2), method="bounded",
        options={"xatol": 1e-10},
    )  # fmt: skip
    assert found == pytest.approx(best.x, abs=1e-5)
    assert found == pytest.approx(fitted(*pairs, tolerance), abs=1e-9)


def statistic(rows: int, broken: int, mended: int, tolerance: float) -> float:
    return float(gate._statistic(rows, np.array(broken), np.array(mended), tolerance))


def test_the_statistic_by_hand() -> None:
    """Without a tolerance it is McNemar's; with c = 0 the fitted q is (b(1 + τ) − 2nτ)/(2n), if that is above 0.

    Of 20 rows with 8 broken and τ = 0.1, q = (8.8 − 4)/40 = 0.12, and Z = 6/√(20(0.24 + 0.09)) = 6/√6.6 = 2.33550.
    Of 44 with 1 broken q = (1.1 − 8.8)/88 < 0, so 0, and Z = (1 − 4.4)/√(44·0.09) = −3.4/√3.96 = −1.70856.
    """
    for broken, mended in ((5, 2), (2, 5), (1, 0), (9, 9)):
        wanted = (broken - mended) / math.sqrt(broken + mended)
        assert statistic(40, broken, mended, 0.0) == pytest.approx(wanted, abs=1e-12)
    assert statistic(20, 8, 0, 0.1) == pytest.approx(2.33550, abs=1e-5)
    assert statistic(44, 1, 0, 0.1) == pytest.approx(-1.70856, abs=1e-5)
    assert statistic(40, 0, 0, 0.0) == 0


@cache
def summed(rows: int, broken: int, mended: int, tolerance: float) -> float:
    """Outcome by outcome in a loop, with SciPy's root and SciPy's multinomial."""

    def score(b: int, c: int) -> float:
        q = fitted(rows, b, c, tolerance)
        variance = rows * ((q + tolerance) + q - tolerance**2)  # of b − c in n multinomial rows
        return (b - c - rows * tolerance) / math.sqrt(variance) if variance > 1e-12 else 0.0

    if broken - mended <= rows * tolerance:
        return 1.0
    q, seen = fitted(rows, broken, mended, tolerance), score(broken, mended)
    shares = np.array([q + tolerance, q, max(0.0, 1 - 2 * q - tolerance)])
    return sum(
        float(multinomial.pmf([b, c, rows - b - c], rows, shares / shares.sum()))
        for b in range(rows + 1)
        for c in range(rows + 1 - b)
        if score(b, c) >= seen - 1e-7
    )


def check_p(p: P) -> None:
    """By hand, without a tolerance: both of 2 rows broken have q = ½ and 1/4; of 3 rows 2 broken have q = ⅓, and as
    large are (2, 0) and (3, 0): 3·(1/3)²·(1/3) + 1/27 = 4/27."""
    assert p(2, 2, 0, 0.0) == pytest.approx(1 / 4, abs=1e-9)
    assert p(3, 2, 0, 0.0) == pytest.approx(4 / 27, abs=1e-9)
    for rows, broken, mended in ((8, 3, 0), (8, 4, 1), (12, 5, 2), (12, 12, 0), (15, 6, 0), (12, 1, 4)):
        for tolerance in TOLERANCES:
            wanted = summed(rows, broken, mended, tolerance)
            assert p(rows, broken, mended, tolerance) == pytest.approx(wanted, abs=1e-7), (rows, broken, mended)


def test_p_is_the_sum_over_all_outcomes() -> None:
    check_p(paired_p)


def ignores_tolerance(rows: int, broken: int, mended: int, tolerance: float) -> float:
    return paired_p(rows, broken, mended, 0.0)


def two_sided(rows: int, broken: int, mended: int, tolerance: float) -> float:
    return min(1.0, 2 * paired_p(rows, broken, mended, tolerance))


def _summed_with(rows: int, broken: int, mended: int, tolerance: float, q: float, strictly: bool) -> float:
    """As `paired_p`, with a q that was found otherwise, or without outcomes that are just as large."""
    if broken - mended <= rows * tolerance:
        return 1.0
    seen, total = statistic(rows, broken, mended, tolerance), 0.0
    shares = np.array([q + tolerance, q, max(0.0, 1 - 2 * q - tolerance)])
    for b in range(rows + 1):
        for c in range(rows + 1 - b):
            score = statistic(rows, b, c, tolerance)
            if score > seen + 1e-9 or (not strictly and score >= seen - 1e-9):
                total += float(multinomial.pmf([b, c, rows - b - c], rows, shares / shares.sum()))
    return total


def unconstrained(rows: int, broken: int, mended: int, tolerance: float) -> float:
    """q as it was seen, whatever the null hypothesis says of what broke."""
    return _summed_with(rows, broken, mended, tolerance, mended / rows, False)


def strictly_larger(rows: int, broken: int, mended: int, tolerance: float) -> float:
    return _summed_with(rows, broken, mended, tolerance, fitted(rows, broken, mended, tolerance), True)


@pytest.mark.parametrize("wrong", [ignores_tolerance, two_sided, unconstrained, strictly_larger])
def test_wrong_p_values_are_caught(wrong: P) -> None:
    with pytest.raises(AssertionError):
        check_p(wrong)


def check_pairs(of: Callable[..., Fall]) -> None:
    """The same rows before and after: 12 of 200 broken and none mended is no chance, 62 and 50 may be one."""
    assert of(*marks(200, 12, 0), 0.02).harmful
    assert not of(*marks(200, 62, 50), 0.02).harmful


def unpaired(before: Sequence[bool], after: Sequence[bool], tolerance: float) -> Fall:
    """Two shares, as if of different rows."""
    n, fell = len(before), (sum(before) - sum(after)) / len(before)
    shares = [sum(side) / n for side in (before, after)]
    spread = math.sqrt(sum(p * (1 - p) for p in shares) / n)
    return Fall(n, sum(before) - sum(after), 0, float(norm.sf((fell - tolerance) / spread)), tolerance)


def test_rows_are_compared_in_pairs() -> None:
    check_pairs(of_sample)
    with pytest.raises(AssertionError):
        check_pairs(unpaired)


def refused(p: P, rows: int, q: float, tolerance: float, fall: float, draws: int = 3_000) -> float:
    """How often the gate refuses, where rows break with q + fall and are mended with q."""
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(rows, [q + fall, q, 1 - 2 * q - fall], size=draws)
    outcomes, counts = np.unique(drawn[:, :2], axis=0, return_counts=True)
    hits = 0
    for (b, c), count in zip(outcomes.tolist(), counts.tolist(), strict=True):
        found = Fall(rows, b, c, p(rows, b, c, tolerance), tolerance)
        hits += count if found.harmful else 0
    return hits / draws


CASES = [(20, 0.05, 0.02), (60, 0.02, 0.05), (60, 0.2, 0.0), (200, 0.005, 0.02), (200, 0.1, 0.02)]


def check_size(p: P) -> None:
    """A fall of just the tolerance is refused in 5 of 100 draws; of 3,000 draws 0.065 is 3.8 deviations above."""
    for rows, q, tolerance in CASES:
        assert refused(p, rows, q, tolerance, tolerance) <= 0.065, (rows, q, tolerance)


def test_what_falls_by_the_tolerance_is_seldom_refused() -> None:
    check_size(paired_p)
    with pytest.raises(AssertionError):
        check_size(ignores_tolerance)


def test_a_large_fall_is_refused() -> None:
    """15 points of 200 rows: nearly always; the test refuses at its level where many rows flip by chance too."""
    assert refused(paired_p, 200, 0.02, 0.02, 0.15) > 0.99
    assert refused(paired_p, 60, 0.02, 0.02, 0.2) > 0.9
    assert refused(paired_p, 200, 0.1, 0.02, 0.02) > 0.025


# The edges


def test_nothing_to_compare_is_no_harm() -> None:
    for of in (of_sample, of_lessons):
        empty, same = of([], [], 0.02), of([True, False], [True, False], 0.02)
        assert (empty.p, empty.share, empty.harmful) == (1.0, 0.0, False)
        assert (same.p, same.share, same.harmful) == (1.0, 0.0, False)
        for tolerance in TOLERANCES:
            assert not of(*marks(30, 2, 5), tolerance).harmful, "more were mended than broken"


def test_everything_broken_is_harm() -> None:
    """All of n rows broken have ((1 + τ)/2)^n, since the fitted q leaves no row that stays."""
    for rows in (6, 10, 200):
        for tolerance in TOLERANCES:
            assert paired_p(rows, rows, 0, tolerance) == pytest.approx(((1 + tolerance) / 2) ** rows, rel=1e-6)
            assert of_sample([True] * rows, [False] * rows, tolerance).harmful
            assert of_lessons([True] * rows, [False] * rows, tolerance).harmful


def test_a_lesson_that_breaks_is_harm_even_alone() -> None:
    """One of two: 1 − 0.98² = 0.0396; one of three: 0.0588, which may be chance."""
    assert of_lessons([True, True], [True, False], 0.02).harmful
    assert not of_lessons([True] * 3, [True, True, False], 0.02).harmful
    assert of_lessons([True] * 3, [True, True, False], 0.0).harmful


def test_a_fall_within_the_tolerance_is_no_harm_however_sure() -> None:
    assert not Fall(1000, 15, 0, 1e-9, 0.02).harmful
    assert Fall(1000, 25, 0, 0.05, 0.02).harmful, "at the level itself it is refused"
    assert not Fall(1000, 25, 0, 0.051, 0.02).harmful


def test_other_rows_after_than_before_are_an_error() -> None:
    for of in (of_sample, of_lessons):
        with pytest.raises(ValueError, match="got 2 marks before and 1 after"):
            of([True, False], [True], 0.02)
