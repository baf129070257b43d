"""The order of the tasks: as in the file, random, by name, or each beside the one it is most like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from perdure.errors import ConfigError, unknown_name
from perdure.order import arrange
from perdure.streams.reactions import chem
from perdure.streams.reactions.reaction import Reaction

ORDERS = ("file", "random", "sorted", "similarity")
MEASURES = ("auto", "morgan", "grams")
GRAM = 4


def arrange_tasks(
    tasks: Mapping[str, Sequence[Reaction]], order: str, seed: int, measure: str = "auto"
) -> tuple[dict[str, Sequence[Reaction]], dict[str, Any]]:
    """The tasks in the order asked for, and the facts about it.

    Args:
        tasks: name to rows, in the order of the file.
        order: "file"; "random", by the seed; "sorted", by name; "similarity": the file's first task, then always
            the one most like the last (the earlier in the file where two are), none twice.
        seed: of a random order.
        measure: of similarity: "morgan" (RDKit), "grams", or "auto": the first where RDKit is installed.

    Raises:
        ConfigError: another order or measure, or RDKit is asked for and is not installed.
        DataError: a molecule that RDKit cannot read.
    """
    if order not in ORDERS:
        raise ConfigError(unknown_name("order of tasks", order, ORDERS))
    facts: dict[str, Any] = {"kind": order}
    names = list(tasks)
    if order == "random":
        names = arrange(names, seed, "reactions-order", key=str)
    elif order == "sorted":
        names.sort()
    elif order == "similarity" and names:
        likeness, facts["measure"] = similarities(tasks, measure)
        chain, rest = [0], list(range(1, len(names)))
        while rest:
            chain.append(max(rest, key=lambda i: (likeness[chain[-1]][i], -i)))
            rest.remove(chain[-1])
        names = [names[i] for i in chain]
    return {name: tasks[name] for name in names}, facts | {"names": names}


def similarities(tasks: Mapping[str, Sequence[Reaction]], measure: str = "auto") -> tuple[list[list[float]], str]:
    """How alike the reactants of every two tasks are, 0 to 1 [T, T], and what it was measured with.

    A task's reactants are the compounds that all its reactions have, less those that all of the table have.
    Two tasks' likeness is the Tanimoto coefficient of their sets: the Morgan fingerprint bits of the reactants
    (radius 2, 2,048 bits), or the runs of four characters of their SMILES.

    Raises: as `arrange_tasks`.
    """
    if measure not in MEASURES:
        raise ConfigError(unknown_name("measure of similarity", measure, MEASURES))
    fingerprints = measure == "morgan" or (measure == "auto" and chem.has_rdkit())
    if fingerprints:
        chem.load_rdkit()
    what = (
        "Tanimoto coefficient of Morgan fingerprints"
        if fingerprints
        else "Jaccard index of SMILES' runs of 4 characters"
    )
    features = chem.morgan if fingerprints else _grams
    sets = [frozenset[Any]().union(*map(features, reactants)) for reactants in _reactants(tasks)]
    return [[_tanimoto(one, other) for other in sets] for one in sets], what


def _reactants(tasks: Mapping[str, Sequence[Reaction]]) -> list[list[str]]:
    common = []
    for rows in tasks.values():
        sets = [_molecules(row.smiles) for row in rows]
        # Where no compound is in every row, the task is all that is in any.
        common.append(set.intersection(*sets) or set.union(*sets))
    everywhere = set.intersection(*common)
    return [sorted(one - everywhere) or sorted(one) for one in common]


def _molecules(smiles: str) -> set[str]:
    return {fragment for part in chem.parts(smiles) for compound in part for fragment in compound}


def _grams(molecule: str) -> frozenset[str]:
    return frozenset(molecule[i : i + GRAM] for i in range(max(1, len(molecule) - GRAM + 1)))


def _tanimoto(one: frozenset[Any], other: frozenset[Any]) -> float:
    both = len(one & other)
    return both / (len(one) + len(other) - both) if one or other else 1.0
