"""Logic grid: as many things as people, one each; exactly one assignment agrees with the clues."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations

from perdure.streams.arena.kind import NAMES, THINGS, Facts, Kind, listed

Clue = Sequence[object]
_SIZE = {4: 4, 5: 5}


def solutions(names: list[str], things: list[str], clues: Sequence[Clue]) -> list[dict[str, str]]:
    """Every assignment of things to names that agrees with all clues, by trying them all."""
    found = []
    for order in permutations(things):
        grid = dict(zip(names, order, strict=True))
        if all((grid[str(name)] == thing) == holds for name, thing, holds in clues):
            found.append(grid)
    return found


def _draw(rng: random.Random, level: int) -> Facts:
    size = _SIZE.get(level, 3)
    names, things = rng.sample(NAMES, size), rng.sample(THINGS, size)
    order = rng.sample(names, size)
    owns = dict(zip(order, rng.sample(things, size), strict=True))
    clues, may_ask = _clues_of_many(rng, order, owns) if size > 3 else _clues_of_three(level, order, owns)
    asked = rng.choice(may_ask) if len(may_ask) > 1 else may_ask[0]
    rng.shuffle(clues)
    if solutions(names, things, clues) != [{name: owns[name] for name in names}]:
        raise AssertionError(
            f"a logic grid of level {level} has not exactly one solution: {names}, {things}, {clues}"
        )
    return {"names": names, "things": things, "clues": clues, "asked": asked, "answer": owns[asked]}


def _clues_of_three(level: int, order: list[str], owns: dict[str, str]) -> tuple[list[list[object]], list[str]]:
    """Clues, and whom one may ask for."""
    a, b, c = order
    if level == 1:
        return [[a, owns[a], True], [b, owns[b], True]], [c]
    if level == 2:
        return [[a, owns[a], True], [b, owns[c], False]], [b, c]
    return [[a, owns[b], False], [a, owns[c], False], [b, owns[c], False]], order


def _clues_of_many(
    rng: random.Random, order: list[str], owns: dict[str, str]
) -> tuple[list[list[object]], list[str]]:
    """One person is known; of the others, true denials are told until one solution is left, and none in vain."""
    known, *rest = order
    clues: list[list[object]] = [[known, owns[known], True]]
    denials: list[list[object]] = [[n, owns[m], False] for n in rest for m in rest if n != m]
    rng.shuffle(denials)
    left = solutions(order, list(owns.values()), clues)
    for clue in denials:
        fitting = [grid for grid in left if grid[str(clue[0])] != clue[1]]
        if len(fitting) < len(left):
            clues.append(clue)
            left = fitting
    return clues, rest


def grid_premises(facts: Facts) -> str:
    """Who and what there is, and the clues."""
    clues = " ".join(f"{n} has the {t}." if holds else f"{n} has no {t}." for n, t, holds in facts["clues"])
    return f"{listed(facts['names'])} have {listed([f'a {thing}' for thing in facts['things']])}. {clues}"


def _plain(facts: Facts) -> tuple[str, str]:
    return f"{grid_premises(facts)} What does {facts['asked']} have?", f" The {facts['answer']}."


GRID = Kind(
    name="logic grid",
    draw=_draw,
    told=lambda facts: {"premises": grid_premises(facts), "asked": facts["asked"]},
    prompts=(
        "Fill the grid. {premises} Row {asked}:",
        "Logic grid. {premises} Row {asked}:",
        "Fill the table. {premises} Line {asked}:",
        "Match them up. {premises} The match of {asked}:",
        "Use the clues. {premises} The thing of {asked}:",
        "A puzzle. {premises} Work out {asked}:",
        "Each has one thing. {premises} Find the one of {asked}:",
        "Who owns what? {premises} Tell it of {asked}:",
        "Solve the grid. {premises} Now fill in {asked}:",
        "Read each clue. {premises} Then place {asked}:",
        "Put the table in order. {premises} Next to {asked} stands:",
        "One thing each. {premises} What has {asked}?",
    ),
    answer=lambda facts: f" must own the {facts['answer']};",
    candidates=lambda facts: THINGS,
    others=lambda facts: tuple(name for name in facts["names"] if name != facts["asked"]),
    plain=_plain,
)
