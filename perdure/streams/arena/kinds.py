"""All kinds of problems by name."""

from __future__ import annotations

from collections.abc import Collection

from perdure.streams.arena.causal import CAUSAL
from perdure.streams.arena.cipher import CIPHER
from perdure.streams.arena.code import CODE
from perdure.streams.arena.comparison import COMPARISON
from perdure.streams.arena.grid import GRID
from perdure.streams.arena.kind import Kind
from perdure.streams.arena.math import MATH
from perdure.streams.arena.operator import OPERATOR
from perdure.streams.arena.passage import PASSAGE
from perdure.streams.arena.sequence import SEQUENCE
from perdure.streams.arena.summary import SUMMARY

KIND_BY_NAME: dict[str, Kind] = {
    "comparison": COMPARISON,
    "sequence": SEQUENCE,
    "causal": CAUSAL,
    "math": MATH,
    "grid": GRID,
    "code": CODE,
    "passage": PASSAGE,
    "summary": SUMMARY,
    "cipher": CIPHER,
    "operator": OPERATOR,
}
# The five that recipes take where none are named; nano has met them, and no others, in its pretraining text.
KINDS: tuple[str, ...] = ("comparison", "sequence", "causal", "math", "grid")
IN_PRETRAINING = KINDS
ALL_KINDS: tuple[str, ...] = tuple(KIND_BY_NAME)
DISPLAY_NAMES: dict[str, str] = {name: kind.name for name, kind in KIND_BY_NAME.items()}
# What a mixture of levels holds where none are named, and all there are.
LEVELS: tuple[int, ...] = (1, 2, 3)
ALL_LEVELS: tuple[int, ...] = (1, 2, 3, 4, 5)
# How many wordings a kind has, and how many are used where nothing is said.
ALL_FORMS = 12
FORMS = 3


def kind_of(name: str) -> Kind:
    """A kind by its name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in KIND_BY_NAME:
        raise ValueError(f"unknown arena kind '{name}'; the kinds are: {', '.join(ALL_KINDS)}")
    return KIND_BY_NAME[name]


def check_levels(levels: Collection[int]) -> None:
    """ValueError where there is no level, or one that does not exist, or one twice."""
    if not levels:
        raise ValueError("levels is empty: name at least one of " + ", ".join(map(str, ALL_LEVELS)))
    for level in levels:
        if level not in ALL_LEVELS or isinstance(level, bool):
            raise ValueError(f"level must be one of {', '.join(map(str, ALL_LEVELS))}, got {level}")
    if len(set(levels)) < len(levels):
        raise ValueError(f"levels must differ, got {list(levels)}")


def count_forms(forms: int | None) -> int:
    """How many wordings are meant; None means all.

    Raises:
        ValueError: there are not so many.
    """
    if forms is None:
        return ALL_FORMS
    if isinstance(forms, bool) or not 1 <= forms <= ALL_FORMS:
        raise ValueError(f"forms must be 1 to {ALL_FORMS}, or None for all, got {forms}")
    return forms
