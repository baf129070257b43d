"""Rows before their text is made: preparations for data sets whose columns are not plain text, and selection."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from perdure.errors import DataError
from perdure.streams.latex import boxed
from perdure.streams.sources import Row


def hotpot(row: Row) -> Row | None:
    """HotpotQA: add `support`, the supporting sentences, and `paragraphs`, all of them; a titled line a paragraph.

    Both are in the order of the context. Takes `context` and `supporting_facts` as lists of pairs (the authors'
    files) or as dicts of lists (the hub).
    A row of which no supporting sentence is in its context gives None.
    """
    try:
        context = _pairs(row.values["context"], "title", "sentences")
        facts = _pairs(row.values["supporting_facts"], "title", "sent_id")
        wanted = {(str(title), int(number)) for title, number in facts}
        support, paragraphs = [], []
        for title, sentences in context:
            texts = [str(text).strip() for text in sentences]
            paragraphs.append(f"{title}: {' '.join(texts)}")
            if chosen := [text for i, text in enumerate(texts) if (title, i) in wanted]:
                support.append(f"{title}: {' '.join(chosen)}")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{row.place}: not a HotpotQA row ({type(error).__name__}: {error}). `prepare: hotpot` needs `context` "
            f"(title and sentences) and `supporting_facts` (title and sentence number)."
        ) from error
    added = {"support": "\n".join(support), "paragraphs": "\n".join(paragraphs)}
    return replace(row, values={**row.values, **added}) if support else None


def _pairs(value: Any, first: str, second: str) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(zip(value[first], value[second], strict=True))
    return [(a, b) for a, b in value]


def math(row: Row) -> Row | None:
    """MATH: `level` as an integer ("Level 3" on the hub; None for "Level ?"), `answer` from the solution's box."""
    values = dict(row.values)
    if not isinstance(values.get("problem"), str) or not isinstance(values.get("solution"), str):
        raise DataError(f"{row.place}: not a MATH row. `prepare: math` needs `problem` and `solution`.")
    if "level" in values:
        digits = re.search(r"\d+", str(values["level"]))
        values["level"] = int(digits.group()) if digits else None
    if values.get("answer") is None and (answer := boxed(values["solution"])):
        values["answer"] = answer
    return replace(row, values=values)


def none(row: Row) -> Row | None:
    """The row as it is."""
    return row


PREPARATIONS: dict[str, Callable[[Row], Row | None]] = {"none": none, "hotpot": hotpot, "math": math}
"""What may be done to each row of a source before its template, by the name that `prepare` takes."""

HELPERS = {"hotpot": ("support", "paragraphs")}
"""Columns that a preparation adds for templates: long texts, which need not be kept with a row."""


def prepare(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows after the named preparation, without those that it leaves out."""
    return [row for row in map(PREPARATIONS[name], rows) if row is not None]


def select(rows: Sequence[Row], where: Mapping[str, Any]) -> list[Row]:
    """The rows whose columns have the wanted values.

    Raises:
        DataError: a row lacks such a column, or none has the value.
    """
    chosen = list(rows)
    for column, wanted in where.items():
        for row in chosen:
            if column not in row.values:
                known = ", ".join(map(repr, row.values))
                raise DataError(f"{row.place}: no column {column!r}, which `where` names. The row has: {known}.")
        # A CSV file holds texts only, so 3 and "3" are the same here.
        left = [row for row in chosen if str(row.values[column]) == str(wanted)]
        if chosen and not left:
            seen = ", ".join(sorted({repr(row.values[column]) for row in chosen})[:10])
            raise DataError(f"{chosen[0].file}: no row has {column} = {wanted!r} (`where`). Values there: {seen}.")
        chosen = left
    return chosen
