"""Tasks of reactions: counts, splits and orders, against brute force and wrong versions."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from perdure.errors import ConfigError, DataError
from perdure.order import priority
from perdure.streams.reactions import (
    Reaction,
    ReactionsSpec,
    Table,
    arrange_tasks,
    augmented,
    build,
    disjoint,
    normal,
    read,
    similarities,
    split,
    tasks_of,
)

Split = Callable[[Sequence[Reaction], float, int, str], tuple[list[Reaction], list[Reaction]]]


@pytest.fixture(scope="module")
def suzuki(shared: Path) -> Path:
    return shared / "data" / "suzuki_miyaura.csv.gz"


@pytest.fixture(scope="module")
def table(suzuki: Path) -> Table:
    return read(ReactionsSpec(file=str(suzuki)))


def row(smiles: str, key: str | None = None, task: str = "t") -> Reaction:
    return Reaction(smiles if key is None else key, task, smiles, 0.5, {})


def chains(count: int) -> list[Reaction]:
    return [row(f"{'C' * i}>>N") for i in range(1, count + 1)]


def by_position(rows: Sequence[Reaction], holdout: float, seed: int, task: str) -> tuple[list, list]:
    """A wrong version: the places are drawn, not the rows."""
    held = set(random.Random(f"{seed}/{task}").sample(range(len(rows)), round(holdout * len(rows))))
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


def depends_on_the_order(divide: Split, rows: Sequence[Reaction]) -> bool:
    shuffled = random.Random(0).sample(rows, len(rows))
    return any(
        {r.key for r in divide(rows, 0.3, seed, "t")[1]} != {r.key for r in divide(shuffled, 0.3, seed, "t")[1]}
        for seed in range(3)
    )


def test_suzuki_is_split_269_to_115(table: Table) -> None:
    """round(0.3 · 384) = round(115.2) = 115 rows of each task held out, 269 left."""
    rows = tasks_of(table.rows)
    for name, whole in rows.items():
        train, held = split(whole, 0.3, 7193, name)
        assert (len(train), len(held)) == (269, 115)
        assert {r.key for r in train} | {r.key for r in held} == {r.key for r in whole}
        ranked = sorted(whole, key=lambda r: priority(7193, "reactions-holdout", name, key=r.smiles))
        assert {r.key for r in held} == {r.key for r in ranked[:115]}
        assert [r.key for r in held] == [r.key for r in whole if r in held]  # as in the file
    first = rows[next(iter(rows))]
    assert split(first, 0.3, 1, "a")[1] != split(first, 0.3, 2, "a")[1]
    assert split(first, 0.3, 1, "a")[1] != split(first, 0.3, 1, "b")[1]


def test_a_part_does_not_depend_on_the_order_of_the_file() -> None:
    assert not depends_on_the_order(split, chains(50))
    assert depends_on_the_order(by_position, chains(50))


def test_one_reaction_is_on_one_side() -> None:
    """20 reactions of 3 rows each, compounds in two orders: 18 of 60 held out, in whole reactions."""
    rows = [
        row(smiles, f"{i}/{copy}")
        for i in range(1, 21)
        for copy, smiles in enumerate((f"{'C' * i}.O>>N", f"O.{'C' * i}>>N", f"{'C' * i}.O>>N"))
    ]
    for seed in range(5):
        train, held = split(rows, 0.3, seed, "t")
        assert len(held) == 18
        assert not {normal(r.smiles) for r in train} & {normal(r.smiles) for r in held}
    # The mutant, which ranks rows, parts some reaction.
    wrong, out = by_position(rows, 0.3, 0, "t")
    assert {normal(r.smiles) for r in wrong} & {normal(r.smiles) for r in out}


def test_what_does_not_fit_is_passed_over() -> None:
    """Of 4 equal rows and 3 others, round(0.4 · 7) = 3 are held out: never some of the 4."""
    rows = [row("C>>N", str(i)) for i in range(4)] + chains(4)[1:]
    for seed in range(5):
        assert {r.smiles for r in split(rows, 0.4, seed, "t")[1]} == {"CC>>N", "CCC>>N", "CCCC>>N"}
    assert split(rows[:4], 0.4, 0, "t") == (rows[:4], [])
    assert split(rows, 0.0, 0, "t") == (rows, [])
    assert split([], 0.3, 0, "t") == ([], [])
    with pytest.raises(ConfigError, match="0 or more and below 1, got 1"):
        split(rows, 1.0, 0, "t")


def test_random_and_sorted_orders(table: Table) -> None:
    tasks = tasks_of(table.rows)
    names = list(tasks)
    assert list(arrange_tasks(tasks, "file", 0)[0]) == names
    assert list(arrange_tasks(tasks, "sorted", 0)[0]) == sorted(names)
    shuffled = list(arrange_tasks(tasks, "random", 3)[0])
    assert shuffled == sorted(names, key=lambda name: priority(3, "reactions-order", key=name))
    assert shuffled != list(arrange_tasks(tasks, "random", 4)[0])
    # A task more leaves the others' order as it was.
    fewer = {name: tasks[name] for name in names[1:]}
    assert list(arrange_tasks(fewer, "random", 3)[0]) == [name for name in shuffled if name != names[0]]
    assert arrange_tasks({}, "similarity", 0, "grams")[0] == {}
    with pytest.raises(ConfigError, match=r"unknown order of tasks 'sort'. Did you mean 'sorted'"):
        arrange_tasks(tasks, "sort", 0)
    with pytest.raises(ConfigError, match="unknown measure of similarity 'maccs'"):
        arrange_tasks(tasks, "similarity", 0, "maccs")


def chain_by_hand(likeness: Sequence[Sequence[float]]) -> list[int]:
    order = [0]
    while len(order) < len(likeness):
        best = None
        for i in range(len(likeness)):
            if i not in order and (best is None or likeness[order[-1]][i] > likeness[order[-1]][best]):
                best = i
        assert best is not None
        order.append(best)
    return order


@pytest.mark.parametrize("measure", ["grams", "morgan"])
def test_by_similarity(table: Table, measure: str) -> None:
    if measure == "morgan":
        pytest.importorskip("rdkit", reason="RDKit is in the extra chem")
    tasks = tasks_of(table.rows)
    likeness, what = similarities(tasks, measure)
    arranged, facts = arrange_tasks(tasks, "similarity", 0, measure)
    names = list(tasks)
    assert list(arranged) == [names[i] for i in chain_by_hand(likeness)] == facts["names"]
    assert facts["measure"] == what
    assert ("Morgan" in what) == (measure == "morgan")
    # Chemistry: each nucleophile's tasks stand together, and the bromide with the three quinoline borons is last.
    partners = [name.split(" + ")[1] for name in arranged]
    assert sum(one != other for one, other in pairwise(partners)) <= 4
    assert partners[-3:] == ["2d, Bromide"] * 3


def test_grams_by_hand() -> None:
    """Reactants less what all share (O, N): CCCCC → {CCCC}, CCCCO → {CCCC, CCCO}, FF → {FF}; likeness 1/2 and 0."""
    rows = {"a": [row("CCCCC.O>>N")], "b": [row("FF.O>>N")], "c": [row("CCCCO.O.S>>N"), row("CCCCO.O.P>>N")]}
    likeness, what = similarities(rows, "grams")
    assert likeness == [[1, 0, 0.5], [0, 1, 0], [0.5, 0, 1]]
    assert "runs of 4 characters" in what
    assert list(arrange_tasks(rows, "similarity", 0, "grams")[0]) == ["a", "c", "b"]
    # Where all tasks have the same compounds they are equally like, and stand as in the file.
    same = {name: [row("C.O>>N")] for name in "xyz"}
    assert similarities(same, "grams")[0] == [[1.0] * 3] * 3
    assert list(arrange_tasks(same, "similarity", 0, "grams")[0]) == ["x", "y", "z"]


def test_the_stream_of_suzuki(suzuki: Path) -> None:
    tasks, facts = build(ReactionsSpec(file=str(suzuki), order="random"), None, 7193)
    assert [(len(task.train), len(task.held_out)) for task in tasks] == [(269, 115)] * 15
    assert [task.name for task in tasks] == facts["order"]["names"] == [task["name"] for task in facts["tasks"]]
    assert {task["overlapping"] for task in facts["tasks"]} == {0}
    assert json.loads(json.dumps(facts)) == facts  # plain values


def held_out_is_untouched(held: Sequence[Reaction], train: Sequence[Reaction], originals: set[str]) -> bool:
    """No copy among the held-out rows, and no training row, copy or not, of a held-out row's key."""
    keys = {r.key for r in held}
    return keys <= originals and not {r.key.split("~")[0] for r in train} & keys


def test_copies_are_of_training_rows(tmp_path: Path) -> None:
    pytest.importorskip("rdkit", reason="RDKit is in the extra chem")
    path = tmp_path / "t.csv"
    path.write_text("id,rxn,yield\n" + "".join(f"{i},{'C' * i}(O)N>>N{'C' * i}=O,{i}\n" for i in range(1, 21)))
    spec = ReactionsSpec(file=str(path), task_columns=(), augment=2)
    (task,), facts = build(spec, None, 0)
    assert (len(task.train), len(task.held_out)) == (14 * 3, 6)
    assert facts["tasks"][0]["augmented"] == 28
    originals = {str(i) for i in range(1, 21)}
    assert held_out_is_untouched(task.held_out, task.train, originals)
    by_key = {r.key: r for r in task.train}
    assert len(by_key) == 42
    for r in task.train[14:]:
        one = by_key[r.key[:-2]]
        assert r.key in (f"{one.key}~1", f"{one.key}~2")
        assert (r.value, r.task, r.fields) == (one.value, one.task, one.fields)
    assert [r.key for r in task.train[:14]] == [r.key for r in task.train if "~" not in r.key]
    # The mutant: copies made before the split.
    whole = augmented(read(spec).rows, 2, 0)
    train, held = split(whole, 0.3, 0, "all")
    assert not held_out_is_untouched(held, train, originals)


def test_a_reaction_held_out_anywhere_is_learnt_nowhere(tmp_path: Path) -> None:
    """20 reactions in two solvents that the SMILES do not tell: both tasks hold out 6, not the same ones."""
    path = tmp_path / "t.csv"
    lines = [f"{'C' * i}>>N,{solvent},{i}" for solvent in ("DMF", "THF") for i in range(1, 21)]
    path.write_text("\n".join(["rxn,solvent,yield", *lines]))
    tasks, facts = build(ReactionsSpec(file=str(path), task_columns=("solvent",)), None, 1)
    held = {r.smiles for task in tasks for r in task.held_out}
    assert [len(task.held_out) for task in tasks] == [6, 6]
    assert len(held) > 6
    assert not held & {r.smiles for task in tasks for r in task.train}
    assert [task["overlapping"] for task in facts["tasks"]] == [len(held) - 6] * 2
    # The mutant, which splits each task for itself, trains on some of them.
    alone = [
        split(rows, 0.3, 1, name)[0]
        for name, rows in tasks_of(read(ReactionsSpec(file=str(path), task_columns=("solvent",))).rows).items()
    ]
    assert held & {r.smiles for rows in alone for r in rows}
    assert disjoint([row("C.O>>N"), row("P>>N")], [row("O.C>>N")]) == [row("P>>N")]


def test_tasks_with_too_few_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("rxn,s,yield\nC>>N,a,5\nN>>N,b,6\nO>>N,b,6\n")
    tasks, facts = build(ReactionsSpec(file=str(path), task_columns=("s",)), None, 0)
    assert [(len(task.train), len(task.held_out)) for task in tasks] == [(1, 0), (1, 1)]
    assert facts["notes"] == ["task a: too few rows (1) to hold any out"]
    path.write_text("rxn,s,yield\nC>>N,a,5\nC>>N,b,5\nN>>N,b,5\n")

    def until_it_fails() -> None:
        for seed in range(20):  # the one row of a is held out in b by every second seed
            build(ReactionsSpec(file=str(path), task_columns=("s",), holdout=0.5), None, seed)

    with pytest.raises(DataError, match="task 'a' has no training rows left: all 1 are held out in other tasks"):
        until_it_fails()
