"""Tables of reactions with yields, whatever their columns are called, read as plain values."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from perdure.errors import DataError
from perdure.storage import file_hash
from perdure.streams.reactions import chem, names
from perdure.streams.reactions.cells import Cells, Problems, read_cells
from perdure.streams.reactions.columns import Columns, find_columns
from perdure.streams.reactions.reaction import Reaction, Table
from perdure.streams.reactions.spec import ReactionsSpec

TOLERANCE = 0.01  # of the full yield: what lies above it by no more (100.4 %) counts as full
PERCENT_ABOVE = 1.5
FEW = 0.05  # so small a share of yields above that may be misprints
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
COPY = re.compile(r"~\d+$")


def read(
    spec: ReactionsSpec,
    path: str | Path | None = None,
    *,
    labelled: bool = True,
    fixed: bool = False,
    molecules: bool = False,
) -> Table:
    """The reactions of a file, in its order, and the facts about them.

    Args:
        spec: which columns are what.
        path: where the file stands; default: `spec.file` as it is.
        labelled: False to read rows whose yields are to be foretold: the yields and the columns of the tasks may be
            missing then (the task is "all", the value None).
        fixed: whether the settings are a run's and cannot be changed; for what an error advises.
        molecules: whether RDKit, where it is installed, looks at every molecule, to note what it cannot read; takes
            some 0.2 ms for each that is new.

    Raises:
        DataError: there is no such file, a column is missing, or a cell is malformed; names file, line, column.
        ConfigError: a package is missing that the file or the settings need; with the command that installs it.
    """
    place = Path(spec.file if path is None else path).expanduser()
    cells = read_cells(place, spec.sheet)
    columns = find_columns(spec, cells, labelled, fixed)
    problems = Problems(place)
    smiles = [_smiles(cells, columns, spec.canonical, line, row, problems) for line, row in cells.rows]
    like = "0.476" if spec.yield_scale == "fraction" else "47.6"
    given = [_number(columns.value, line, row, labelled, like, problems) for line, row in cells.rows]
    numbers = [value for value in given if value is not None]
    scale, notes = _scale(spec.yield_scale, numbers)
    values = [
        None if value is None else _fraction(cells, columns.value, line, value, scale, problems)
        for (line, _), value in zip(cells.rows, given, strict=True)
    ]
    keys, key_column, passed = _keys(spec, cells, columns, problems)
    problems.stop()
    unread = _unread(cells, smiles) if molecules and not spec.canonical else []
    notes = [*notes, *_untold(cells, columns.tasks), *unread]
    rows = tuple(
        Reaction(key, _task(row, columns.tasks), text, value, _fields(row, columns))
        for (_, row), key, text, value in zip(cells.rows, keys, smiles, values, strict=True)
    )
    used = {columns.smiles, columns.value, key_column, *columns.tasks, *columns.fields}
    if columns.assembled:
        used |= set(names.REQUIRED_COLUMNS)
    top = 100.0 if scale == "percent" else 1.0
    facts: dict[str, Any] = {
        "file": str(place),
        "sha256": file_hash(place),
        "rows": len(rows),
        "columns": {
            "smiles": columns.smiles or "assembled from the names of the compounds",
            "yield": columns.value,
            "key": key_column,
            "tasks": list(columns.tasks),
            "conditions": list(columns.fields),
            "left_out": [column for column in cells.header if column not in used],
        },
        "scale": scale if numbers else None,
        "yield": _summary([value for value in values if value is not None]),
        "above_full": sum(value > top for value in numbers),
        "unlabelled": len(rows) - len(numbers),
        "duplicates": _duplicates(rows),
        "canonical": spec.canonical,
        "tasks": dict(Counter(row.task for row in rows)),
        "notes": notes + passed,
    }
    return Table(rows, facts)


def _smiles(
    cells: Cells, columns: Columns, canonical: bool, line: int, row: Mapping[str, str], problems: Problems
) -> str:
    if columns.smiles is None:
        fields = {
            name: names.cleaned(name, row[column])
            for column, name in names.PUBLISHED_COLUMNS.items()
            if name in names.SMILES
        }
        wrong = [
            f"{column} is {fields[name]!r}, of which no SMILES is known (known: "
            f"{', '.join(names.SMILES[name])}); correct it, or add a column reaction_smiles"
            for column, name in names.PUBLISHED_COLUMNS.items()
            if name in fields and fields[name] not in names.SMILES[name]
        ]
        for message in wrong:
            problems.add(line, message)
        return "" if wrong else names.published_smiles(fields)
    text = row[columns.smiles]
    if not text:
        problems.add(line, f"{columns.smiles} is empty; fill it in or remove the row")
    elif re.search(r"\s", text):
        problems.add(line, f"{columns.smiles} holds a space in {text[:60]!r}; keep what stands before it")
    elif len(chem.parts(text)) not in (1, 3):
        problems.add(
            line, f"{columns.smiles} is {text[:60]!r}; write reactants>>product or reactants>agents>product"
        )
    elif canonical:
        try:
            return chem.canonical(text)
        except DataError as error:
            problems.add(line, f"{columns.smiles}: {error}")
    return text


def _untold(cells: Cells, columns: Sequence[str]) -> list[str]:
    """A word on rows that say nothing of their task: right where a well had none of it, a slip elsewhere."""
    lines = [line for line, row in cells.rows if not any(row[column] for column in columns)] if columns else []
    if not lines:
        return []
    rows = f"row (line {lines[0]})" if len(lines) == 1 else f"rows (the first in line {lines[0]})"
    name = " + ".join([names.ABSENT] * len(columns))
    return [f"{len(lines)} {rows} with nothing under {', '.join(columns)}: their task is {name}"]


def _unread(cells: Cells, smiles: Sequence[str]) -> list[str]:
    """A word on molecules that RDKit, where it is installed, cannot read: what is trained on is text."""
    if not chem.has_rdkit():
        return []
    found = [
        (line, molecule)
        for (line, _), text in zip(cells.rows, smiles, strict=True)
        if (molecule := chem.unreadable(text)) is not None
    ]
    if not found:
        return []
    (line, molecule), count = found[0], len(found)
    what = "1 row holds a molecule" if count == 1 else f"{count} rows hold molecules"
    where = "in" if count == 1 else "the first in"
    told = f"{what} that RDKit cannot read, {where} line {line}: {molecule[:60]!r}"
    return [f"{told}; kept as text. Correct a misprint; canonical (--canonical) refuses such rows"]


def _number(
    column: str | None, line: int, row: Mapping[str, str], labelled: bool, like: str, problems: Problems
) -> float | None:
    text = "" if column is None else row[column]
    if not text and not labelled:
        return None
    value = float(text) if NUMBER.fullmatch(text) else float("nan")
    if abs(value) < float("inf"):
        return value
    what = f"is {text!r}, which is not a finite number" if text else "is empty"
    way = "remove the row" if labelled else "leave the cell empty"
    problems.add(line, f"{column} {what}; write it like {like}, or {way}")
    return None


def _scale(asked: str, numbers: Sequence[float]) -> tuple[str, list[str]]:
    """The scale of the yields, and a word where few of them tell it."""
    if asked != "auto":
        return asked, []
    above = sum(value > PERCENT_ABOVE for value in numbers)
    if not above:
        return "fraction", []
    if above > FEW * len(numbers):
        return "percent", []
    told = f"{above} of {len(numbers)} yields are above {PERCENT_ABOVE}, so that all were read as percent"
    return "percent", [f"{told}; if they are fractions, correct those and give yield_scale fraction"]


def _fraction(
    cells: Cells, column: str | None, line: int, value: float, scale: str, problems: Problems
) -> float | None:
    top = 100.0 if scale == "percent" else 1.0
    if 0 <= value <= top * (1 + TOLERANCE):
        return abs(min(value / top, 1.0))
    way = (
        "give yield_scale percent (--yield-scale) if the yields are percent"
        if scale == "fraction" and value > 1
        else "correct it or remove the row"
    )
    problems.add(line, f"{column} is {value:g}, but a {scale} lies between 0 and {top:g}; {way}")
    return None


def _keys(
    spec: ReactionsSpec, cells: Cells, columns: Columns, problems: Problems
) -> tuple[list[str], str | None, list[str]]:
    """A key for each row, the column that they are from, and a word where one was passed over."""
    if columns.key is not None:
        first: dict[str, int] = {}
        wrong = []
        for line, row in cells.rows:
            key = row[columns.key]
            if not key or key in first or COPY.search(key):
                what = "is empty" if not key else f"is {key!r}"
                what += f", as in line {first[key]}" if key in first else ""
                what += ", but ~1 marks an augmented copy" if COPY.search(key) else ""
                what += "; every row needs a name of its own: correct it, or name another column with key_column"
                wrong.append((line, f"{columns.key} {what}"))
            first.setdefault(key, line)
        if not wrong:
            return list(first), columns.key, []
        if spec.key_column is not None:
            for line, message in wrong:
                problems.add(line, message)
            return [row[columns.key] for _, row in cells.rows], columns.key, []
        note = f"{columns.key} does not name every row apart; a hash of the row does instead"
        return _hashes(cells), None, [note]
    return _hashes(cells), None, []


def _hashes(cells: Cells) -> list[str]:
    """Hashes of the rows' cells; rows that are equal throughout are numbered."""
    seen: Counter[str] = Counter()
    keys = []
    for _, row in cells.rows:
        content = json.dumps(sorted(row.items()), ensure_ascii=False)
        key = blake2b(content.encode(), digest_size=16, person=b"perdure/reaction").hexdigest()
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return keys


def _task(row: Mapping[str, str], columns: Sequence[str]) -> str:
    """The cells of the task's columns, joined by a plus; as a JSON list where that could be two things."""
    cells = [row[column] or names.ABSENT for column in columns]
    if len(cells) > 1 and any(" + " in cell or cell[0] == "+" or cell[-1] == "+" for cell in cells):
        return json.dumps(cells, ensure_ascii=False)
    return " + ".join(cells) or "all"


def _fields(row: Mapping[str, str], columns: Columns) -> dict[str, str]:
    return {name: names.cleaned(name, row[column]) for column, name in columns.fields.items()}


def _summary(values: Sequence[float]) -> dict[str, float | int] | None:
    if not values:
        return None
    return {
        "least": min(values),
        "most": max(values),
        "mean": sum(values) / len(values),
        "zeros": sum(value == 0 for value in values),
    }


def _duplicates(rows: Sequence[Reaction]) -> dict[str, int]:
    """How many rows repeat an earlier one, and how many reactions stand in several tasks."""
    same = {(chem.normal(row.smiles), row.task, tuple(row.fields.items())) for row in rows}
    within = {(chem.normal(row.smiles), row.task) for row in rows}
    tasks = Counter(smiles for smiles, _ in within)
    return {
        "rows": len(rows) - len(same),
        "smiles_in_task": len(rows) - len(within),
        "smiles_in_several_tasks": sum(count > 1 for count in tasks.values()),
    }
