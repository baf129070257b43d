"""Rows of reactions become a stream: cut into tasks, split by keyed priorities, copied in other spellings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from perdure.errors import ConfigError, DataError
from perdure.order import prioritiser
from perdure.streams.reactions.chem import augment, normal
from perdure.streams.reactions.reaction import Reaction, ReactionTask
from perdure.streams.reactions.similarity import arrange_tasks
from perdure.streams.reactions.spec import ReactionsSpec
from perdure.streams.reactions.table import read


def tasks_of(rows: Iterable[Reaction]) -> dict[str, list[Reaction]]:
    """The rows by task, tasks and rows in the order in which they come."""
    tasks: dict[str, list[Reaction]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def split(rows: Sequence[Reaction], holdout: float, seed: int, task: str) -> tuple[list[Reaction], list[Reaction]]:
    """Training and held-out rows of a task, each in the order given.

    Held out are the round(holdout · n) rows whose reactions have the smallest priorities (halves go to the even
    number), whatever the order of the file. Rows of one reaction SMILES, its compounds in any order, stay together;
    a reaction with more rows than are still wanted is passed over, so that there may be a few less. The count being
    exact, a row that is added to the task can move one other row to the other side.
    """
    if not 0 <= holdout < 1:
        raise ConfigError(f"holdout is a share of the rows, 0 or more and below 1, got {holdout}")
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(normal(row.smiles), []).append(i)
    wanted = round(holdout * len(rows))
    held: set[int] = set()
    for smiles in sorted(groups, key=prioritiser(seed, "reactions-holdout", task)):
        if len(held) + len(groups[smiles]) <= wanted:
            held.update(groups[smiles])
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def disjoint(train: Iterable[Reaction], held_out: Iterable[Reaction]) -> list[Reaction]:
    """The training rows whose reaction is not among the held-out ones, of whatever task."""
    held = {normal(row.smiles) for row in held_out}
    return [row for row in train if normal(row.smiles) not in held]


def augmented(rows: Sequence[Reaction], copies: int, seed: int) -> list[Reaction]:
    """The rows, and behind them `copies` of each in randomised SMILES, under the row's key and `~1`, `~2`, …

    For training rows only. Needs RDKit where there is a copy to make.
    """
    return [*rows] + [
        replace(row, key=f"{row.key}~{copy}", smiles=smiles)
        for row in rows
        for copy, smiles in enumerate(augment(row.smiles, copies, row.key, seed), 1)
    ]


def build(
    spec: ReactionsSpec, path: str | Path | None, seed: int
) -> tuple[tuple[ReactionTask, ...], dict[str, Any]]:
    """The stream of tasks that the settings describe, and the facts about its data as plain values.

    A reaction that is held out in one task is trained on in none.

    Args:
        spec: the settings.
        path: where the file stands; default: `spec.file` as it is.
        seed: of the split, of a random order of tasks, and of the augmented copies.

    Raises:
        DataError: as `read`; or a task has no training rows left.
        ConfigError: as `read`.
    """
    table = read(spec, path, molecules=True)
    tasks, order = arrange_tasks(tasks_of(table.rows), spec.order, seed, spec.similarity)
    halves = {name: split(rows, spec.holdout, seed, name) for name, rows in tasks.items()}
    held = [row for _, part in halves.values() for row in part]
    made, facts, notes = [], [], list(table.facts["notes"])
    for name, (train, part) in halves.items():
        kept = disjoint(train, held)
        if not kept:
            raise DataError(
                f"{table.facts['file']}: task {name!r} has no training rows left: all {len(train)} are held out "
                "in other tasks. Choose other task_columns, or a smaller holdout."
            )
        if not part and spec.holdout > 0:
            notes.append(f"task {name}: too few rows ({len(train)}) to hold any out")
        made.append(ReactionTask(name, tuple(augmented(kept, spec.augment, seed)), tuple(part)))
        facts.append(
            {
                "name": name,
                "rows": len(train) + len(part),
                "train": len(kept),
                "held_out": len(part),
                "overlapping": len(train) - len(kept),
                "augmented": len(kept) * spec.augment,
            }
        )
    return tuple(made), {**table.facts, "order": order, "tasks": facts, "notes": notes}
