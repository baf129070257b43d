"""A reaction, a table of them, and a task of a stream: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Reaction:
    """One row of a table of reactions.

    Attributes:
        key: the row's own name: its number in the table, else a hash of its content; never its position. An
            augmented copy has its row's key and `~1`, `~2`, … behind it.
        task: the task it belongs to.
        smiles: reaction SMILES, `reactants>>product`; `~` joins the fragments of one compound.
        value: the yield as a fraction, 0 to 1; None where it is not known.
        fields: the conditions: column name to cell, the same columns in every row of a table.
    """

    key: str
    task: str
    smiles: str
    value: float | None
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a file, in its order, and the facts about them as plain values."""

    rows: tuple[Reaction, ...]
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReactionTask:
    """One task: rows to learn from (augmented copies behind them) and rows to be scored on."""

    name: str
    train: tuple[Reaction, ...]
    held_out: tuple[Reaction, ...]
