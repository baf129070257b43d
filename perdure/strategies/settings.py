"""Checks of what strategies are made with, all in the same words."""

from __future__ import annotations

import math
from typing import Any

from perdure.errors import StrategyError


def number(strategy: str, name: str, value: Any, *, above: bool = False) -> float:
    """A finite number of at least 0, or above it.

    Raises:
        StrategyError: it is none; names strategy, setting and value.
    """
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (above and value == 0):
        raise StrategyError(
            f"{strategy}: {name} must be a finite number {'above' if above else 'of at least'} 0, got {value!r}"
        )
    return float(value)


def whole(strategy: str, name: str, value: Any, what: str = "", least: int = 1) -> int:
    """A whole number, of `what` if that is said.

    Raises:
        StrategyError: it is none, or too small; names strategy, setting and value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        of = f" of {what}" if what else ""
        raise StrategyError(f"{strategy}: {name} must be a whole number{of}, at least {least}, got {value!r}")
    return value
