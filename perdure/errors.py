"""The exceptions that perdure raises for a user's mistake or a failed run.

PerdureError
├── UsageError          a mistake in what was asked: exit code 2
│   ├── ConfigError     a setting: names it, its value and the choices
│   ├── DataError       a data file: names the file and the line
│   ├── ModelError      a model that cannot be loaded or does not fit
│   ├── RunError        a run folder that cannot be used as asked
│   │   └── NewerFormatError    a later perdure wrote it
│   └── StrategyError   a strategy that cannot work on this model or stream
└── RunFailure          the run itself failed: exit code 1
    ├── NonFiniteError  loss or gradient is nan or infinite, before the update
    └── StorageError    the disk refused a write
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class PerdureError(Exception):
    """Base of everything that perdure raises on purpose."""

    exit_code = 1


class UsageError(PerdureError):
    """A mistake in what was asked; the message says what to change."""

    exit_code = 2


class ConfigError(UsageError, ValueError):
    """A setting is unknown, has a wrong value, or contradicts another."""


class DataError(UsageError, ValueError):
    """A data file is missing, malformed or empty; the message names file and line."""


class ModelError(UsageError):
    """A model cannot be found, loaded or used as asked."""


class RunError(UsageError):
    """A run folder cannot be read, resumed or extended as asked."""


class NewerFormatError(RunError):
    """A file has a format that only a later perdure reads."""


class StrategyError(UsageError, ValueError):
    """A strategy cannot work here; the message says what it needs."""


class RunFailure(PerdureError):
    """The run started and could not go on."""


class NonFiniteError(RunFailure, ArithmeticError):
    """The loss or the gradient is nan or infinite; the update was not made."""


class StorageError(RunFailure, OSError):
    """A write failed; what was written before is intact."""


def unknown_name(kind: str, name: str, known: Iterable[str], meant: Sequence[str] = ()) -> str:
    """Message for an unknown name: what exists, and the nearest one (or what is `meant`) if any is near."""
    names = sorted(known)
    near = [*meant, *get_close_matches(name, names, n=1)]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}."
