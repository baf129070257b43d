"""Which columns of a table of reactions are what: named in the settings, or found by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from perdure.errors import DataError
from perdure.streams.reactions import names
from perdure.streams.reactions.cells import Cells
from perdure.streams.reactions.spec import ReactionsSpec

# Names looked for, in this order, in capitals or not.
SMILES_COLUMNS = ("reaction_smiles", "rxn_smiles", "rxn", "reaction", "smiles", "text")
YIELD_COLUMNS = (
    names.PUBLISHED_YIELD.lower(),
    "yield",
    "yield_percent",
    "yield_pct",
    "yield (%)",
    "yield [%]",
    "yield %",
    "yields",
    "output",
    "label",
    "labels",
    "y",
)
RENAME = "Give the columns the names that they have in the run's own table."
KEY_COLUMNS = (names.PUBLISHED_KEY.lower(), "reaction_number", "reaction_id", "rxn_id", "id")
TASK_COLUMNS = (("Reactant_1_Name", "Reactant_2_Name"), ("reactant_1", "reactant_2"))


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a file are what; `assembled`: the SMILES are made of names."""

    smiles: str | None
    value: str | None
    key: str | None
    tasks: tuple[str, ...]
    fields: Mapping[str, str]  # column to field
    assembled: bool


def find_columns(spec: ReactionsSpec, cells: Cells, labelled: bool, fixed: bool = False) -> Columns:
    """The columns of a file; without `labelled`, those of yields and tasks may be missing.

    An error advises to name a column in the settings or, where those are `fixed`, as in the run's own table.

    Raises:
        DataError: a column is missing; lists those that the file has.
    """
    header = cells.header
    published = all(column in header for column in names.REQUIRED_COLUMNS)
    smiles = _named(cells, "smiles_column", spec.smiles_column) or _first(header, SMILES_COLUMNS)
    if smiles is None and not published:
        raise DataError(
            f"{cells.path}: no column of reaction SMILES was found (looked for {', '.join(SMILES_COLUMNS)}). "
            + (RENAME if fixed else "Name it with smiles_column (--smiles-column).")
            + f" {_has(header)}"
        )
    value = None
    if labelled or spec.yield_column in header:
        value = _named(cells, "yield_column", spec.yield_column)
    value = value or _first(header, YIELD_COLUMNS)
    if labelled and value is None:
        raise DataError(
            f"{cells.path}: no column of yields was found (looked for {', '.join(YIELD_COLUMNS)}). "
            + (RENAME if fixed else "Name it with yield_column (--yield-column).")
            + f" {_has(header)}"
        )
    key = _named(cells, "key_column", spec.key_column) or _first(header, KEY_COLUMNS)
    tasks = spec.task_columns
    if tasks is None:
        tasks = next((pair for pair in TASK_COLUMNS if set(pair) <= set(header)), None)
    if tasks is None and labelled:
        raise DataError(
            f"{cells.path}: which rows are one task? "
            + (
                RENAME
                if fixed
                else "Name the columns in which they agree with task_columns (--task-columns), or give an empty "
                "list for a single task."
            )
            + f" {_has(header)}"
        )
    if labelled:
        for column in tasks or ():
            _named(cells, "task_columns", column)
    elif not set(tasks or ()) <= set(header):
        tasks = ()
    conditions = spec.condition_columns
    if conditions is not None:
        fields = {column: column for column in conditions if _named(cells, "condition_columns", column)}
    elif published:
        # The rest are amounts that never change, and a second measurement of the same product.
        fields = {column: name for column, name in names.PUBLISHED_COLUMNS.items() if column in header}
    else:
        fields = {column: column for column in header if column not in (smiles, value, key) and not _tells(column)}
    return Columns(smiles, value, key, tuple(tasks or ()), fields, smiles is None)


def _tells(column: str) -> bool:
    """Whether a column is another measured yield, or a data frame's index: not what is known before a reaction."""
    return "yield" in column.lower() or re.fullmatch(r"Unnamed: \d+", column) is not None


def _named(cells: Cells, setting: str, column: str | None) -> str | None:
    if column is not None and column not in cells.header:
        raise DataError(f"{cells.path}: {setting} is {column!r}, but there is no such column. {_has(cells.header)}")
    return column


def _has(header: Sequence[str]) -> str:
    return f"The file has: {', '.join(header)}."


def _first(header: Sequence[str], known: Sequence[str]) -> str | None:
    by_name = {column.lower(): column for column in reversed(header)}
    return next((by_name[name] for name in known if name in by_name), None)
