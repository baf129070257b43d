"""Checks of what strategies are made with, all in the same words."""

from __future__ import annotations

import math
from typing import Any, Literal

from perdure.errors import ConfigError, StrategyError, unknown_name
from perdure.memory import Buffer, make_buffer

MEMORY, FIELD = "reservoir", "level"
OFFERS: tuple[Literal["task"], Literal["step"]] = ("task", "step")


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


def check_rehearsal(
    name: str,
    buffer: Buffer | None,
    ratio: Any,
    capacity: Any,
    memory: str,
    unit: str,
    select: str | None,
    field: str,
    resample: float | None,
    offer: str,
) -> None:
    """Refuse settings of a strategy with a memory that cannot be, or would do nothing.

    Raises:
        StrategyError: names strategy and setting, and what to do.
    """
    if ratio != "once" and (isinstance(ratio, str) or not ratio > 0 or ratio == float("inf")):
        raise StrategyError(
            f'{name}: ratio (replayed rows per new row) must be positive and finite, or "once", got {ratio!r}'
        )
    if isinstance(capacity, bool) or not isinstance(capacity, int | str) or str(capacity).strip().endswith("%"):
        raise StrategyError(
            f'{name}: capacity must be a whole number of rows or a size such as "2MB", got {capacity!r}; a share '
            "needs a run, which knows how many rows there are"
        )
    if isinstance(capacity, int) and capacity < 1:
        raise StrategyError(f"{name}: capacity must be at least 1 row, got {capacity}")
    try:
        make_buffer(memory, capacity, 0)
    except ConfigError as error:
        raise StrategyError(f"{name}: {error}") from error
    if unit not in ("examples", "tokens"):
        raise StrategyError(f'{name}: unit must be "examples" or "tokens", got {unit!r}')
    if unit == "tokens" and ratio == "once" and resample is None:
        raise StrategyError(f'{name}: unit "tokens" has nothing to count with ratio "once"; leave it out')
    if offer not in OFFERS:
        raise StrategyError(f"{name}: {unknown_name('offer', offer, OFFERS)}")
    if offer == "step" and ratio == "once":
        raise StrategyError(
            f'{name}: ratio "once" goes through a memory that stays the same for a task, and with offer "step" it '
            "changes at every step; give ratio a number"
        )
    if offer == "step" and select is not None and resample is None:
        raise StrategyError(
            f'{name}: select without resample puts a whole task in order when it ends, and with offer "step" rows '
            "come one by one; give resample, the share of the kept rows that is chosen anew for each pass"
        )
    if select is None and (resample is not None or field != FIELD):
        raise StrategyError(f"{name}: {'field' if resample is None else 'resample'} does nothing without select")
    if select is not None and resample is None and (buffer is not None or memory != MEMORY):
        raise StrategyError(
            f"{name}: {'buffer' if memory == MEMORY else 'memory'} cannot be chosen with select, whose policy says "
            "which rows stay; leave it out, or give resample, the share of the kept rows that is chosen anew for "
            "each pass"
        )
