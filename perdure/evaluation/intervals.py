"""How far a share of right answers may be off."""

from __future__ import annotations

import math

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share: (low, high), each 0 to 1; (0, 1) where nothing was counted.

    It holds at 0 and at 1 too, where the usual p ± 1.96·√(p(1−p)/n) has no width.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".

    Example:
        >>> [round(bound, 4) for bound in wilson(0, 10)]
        [0.0, 0.2775]
    """
    if not count:
        return 0.0, 1.0
    share, square = right / count, Z * Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    # Rounding would leave 3e-18 in place of 0.
    low = middle - half if right else 0.0
    return max(0.0, low), min(1.0, middle + half) if right < count else 1.0
