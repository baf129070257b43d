"""Whether a lesson made what was right before wrong: a paired test on the same rows before and after.

Knows marks alone, no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Fall:
    """How some rows fared: the same ones before and after.

    Attributes:
        rows: how many.
        broken: right before, wrong after.
        mended: wrong before, right after.
        p: probability of what was seen, or worse, if rows fell by no more than the tolerance; 1 where none fell.
        tolerance: the fall that is put up with, as a share of the rows.
        alpha: at or below which `p` tells that the fall is real.
    """

    rows: int
    broken: int
    mended: int
    p: float
    tolerance: float
    alpha: float = ALPHA

    @property
    def share(self) -> float:
        """The fall of the share of right answers; below 0 where it rose."""
        return (self.broken - self.mended) / self.rows if self.rows else 0.0

    @property
    def harmful(self) -> bool:
        """Whether the fall is larger than the tolerance, and that is no chance."""
        return self.share > self.tolerance and self.p <= self.alpha


def of_sample(before: Sequence[bool], after: Sequence[bool], tolerance: float, alpha: float = ALPHA) -> Fall:
    """Rows that stand for many others, as those of a probe: some are near the edge and fall either way by chance.

    Args:
        before: a mark for each row.
        after: for the same rows, in the same order.
        tolerance: 0 to below 1.
        alpha: of the test, one-sided.

    Raises:
        ValueError: other rows after than before.
    """
    rows, broken, mended = _count(before, after)
    return Fall(rows, broken, mended, paired_p(rows, broken, mended, tolerance), tolerance, alpha)


def of_lessons(before: Sequence[bool], after: Sequence[bool], tolerance: float, alpha: float = ALPHA) -> Fall:
    """Rows that were taught and stand for themselves: one that was right can only break; as `of_sample`."""
    rows, broken, mended = _count(before, after)
    return Fall(rows, broken, mended, broken_p(sum(before), broken, tolerance), tolerance, alpha)


def _count(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int, int]:
    if len(before) != len(after):
        raise ValueError(f"the same rows are compared: got {len(before)} marks before and {len(after)} after")
    broken = sum(was and not now for was, now in zip(before, after, strict=True))
    mended = sum(now and not was for was, now in zip(before, after, strict=True))
    return len(before), broken, mended


def broken_p(right: int, broken: int, tolerance: float) -> float:
    """P(X ≥ broken) for X ~ Bin(right, tolerance): of so many right rows each breaks with that probability.

    Example:
        >>> round(broken_p(10, 2, 0.02), 4)
        0.0162
    """
    if not broken:
        return 1.0
    return sum(
        math.comb(right, k) * tolerance**k * (1 - tolerance) ** (right - k) for k in range(broken, right + 1)
    )


@lru_cache(maxsize=4096)
def paired_p(rows: int, broken: int, mended: int, tolerance: float) -> float:
    """P(score statistic at least as large as seen) if the share of right answers fell by just the tolerance.

    The pairs are multinomial: a row breaks with probability q + tolerance, is mended with q, and stays otherwise.
    The statistic is Tango's; its distribution is summed over all outcomes, with the q that fits best under the null
    hypothesis, so that it holds for few rows too.

    Args:
        rows: pairs.
        broken: pairs that fell.
        mended: pairs that rose.
        tolerance: the fall under the null hypothesis, 0 to below 1.

    Source: Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
        paired-sample design"; the estimated p-value is that of Lloyd 2008, "Exact p-values for discrete models".
    """
    if not rows or broken - mended <= rows * tolerance:
        return 1.0
    q = float(_mended_share(rows, np.array(broken), np.array(mended), tolerance))
    b, c = np.meshgrid(np.arange(rows + 1), np.arange(rows + 1), indexing="ij")
    possible = b + c <= rows
    b, c = b[possible], c[possible]
    seen = float(_statistic(rows, np.array(broken), np.array(mended), tolerance))
    as_large = _statistic(rows, b, c, tolerance) >= seen - 1e-9
    logs = _log_multinomial(rows, b[as_large], c[as_large], q + tolerance, q)
    return min(1.0, float(np.exp(logs).sum()))


def _mended_share(rows: int, broken: Any, mended: Any, tolerance: float) -> Any:
    """The maximum-likelihood q where rows break with probability q + tolerance and are mended with q."""
    # d/dq of b·log(q + τ) + c·log q + (n − b − c)·log(1 − 2q − τ), times the denominators, is quadratic in q.
    rest = rows - broken - mended
    square = -2.0 * (broken + mended + rest)
    linear = (broken + mended) * (1 - tolerance) - 2.0 * mended * tolerance - 2.0 * rest * tolerance
    constant = mended * tolerance * (1 - tolerance)
    root = (-linear - np.sqrt(np.maximum(linear**2 - 4 * square * constant, 0.0))) / (2 * square)
    return np.clip(root, 0.0, (1 - tolerance) / 2)


def _statistic(rows: int, broken: Any, mended: Any, tolerance: float) -> Any:
    """Tango's score: (b − c − nτ) / √(n(2q + τ(1 − τ))), with the q that fits best; 0 where nothing can vary."""
    q = _mended_share(rows, broken, mended, tolerance)
    variance = rows * (2 * q + tolerance * (1 - tolerance))
    return (broken - mended - rows * tolerance) / np.sqrt(np.maximum(variance, 1e-300))


def _log_multinomial(rows: int, broken: Any, mended: Any, p_broken: float, p_mended: float) -> Any:
    rest = rows - broken - mended
    factorials = np.array([math.lgamma(k + 1) for k in range(rows + 1)])
    logs = factorials[rows] - factorials[broken] - factorials[mended] - factorials[rest]
    for count, p in ((broken, p_broken), (mended, p_mended), (rest, 1 - p_broken - p_mended)):
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = logs + np.where(count > 0, count * np.log(p), 0.0)
    return logs
