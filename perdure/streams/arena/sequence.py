"""Sequence: the next number of a row that follows a rule."""

from __future__ import annotations

import random

from perdure.streams.arena.kind import Facts, Kind

_RULES = (
    ("add",),
    ("add", "double", "weave"),
    ("alternate", "alternate", "grow", "squares"),
    ("alternate", "grow by", "scale"),
    ("two rows", "grow by", "scale", "sum"),
)
# Rules and steps for the search through all readings of a row. The other rules are cases of these: add, grow and
# squares of "grow by" 0, 1 and 2, double of "scale", weave of "alternate".
_FAMILY = {
    "grow by": (range(-100, 101), range(-40, 41)),
    "alternate": (range(-100, 101), range(-100, 101)),
    "scale": (range(-100, 101), range(2, 6)),
    "sum": (range(-100, 101),),
    "two rows": (range(-100, 101), range(-40, 41), range(-40, 41)),
}
_MOST = {4: 400, 5: 1000}


def sequence_terms(rule: str, start: int, steps: tuple[int, ...], length: int) -> list[int]:
    """The first terms under a rule.

    add: constant step; double: times two; grow: a step that grows by one each time; squares: n² + constant;
    alternate: two steps in turn; weave: two constants in turn. From level 4 on: grow by: a step that grows by the
    second step each time; scale: a step that is multiplied by the second step each time; sum: each term is the sum
    of the two before it; two rows: two in turn, the first step apart, each with a constant step of its own.
    """
    a, b, c = (*steps, 0, 0, 0)[:3]
    if rule == "add":
        return [start + a * i for i in range(length)]
    if rule == "double":
        return [start * 2**i for i in range(length)]
    if rule == "grow":
        return [start + a * i + i * (i - 1) // 2 for i in range(length)]
    if rule == "squares":
        return [(a + i) ** 2 + start for i in range(length)]
    if rule == "alternate":
        return [start + (i + 1) // 2 * a + i // 2 * b for i in range(length)]
    if rule == "grow by":
        return [start + a * i + b * (i * (i - 1) // 2) for i in range(length)]
    if rule == "scale":
        return [start + a * sum(b**j for j in range(i)) for i in range(length)]
    if rule == "two rows":
        return [(start + a if i % 2 else start) + i // 2 * (c if i % 2 else b) for i in range(length)]
    if rule == "sum":
        terms = [start, start + a]
        while len(terms) < length:
            terms.append(terms[-1] + terms[-2])
        return terms[:length]
    return [start + a if i % 2 else start for i in range(length)]


def continuations(terms: list[int]) -> set[int]:
    """Every next term that some rule of the family gives to a row, by trying all rules and steps.

    The family is every rule of `sequence_terms`, with a first step from −100 to 100, a second one from −100 to 100
    in "alternate" and from −40 to 40 elsewhere, and factors from 2 to 5. Two rows in turn are a reading of six or
    more terms: of fewer, one of the two would have two terms, and any two numbers are such a row.
    """
    found = set()
    for rule, ranges in _FAMILY.items():
        if rule == "two rows" and len(terms) < 6:
            continue
        first, *later = ranges
        # Under every rule the first step leads from the first term to the second, and n steps settle n + 1 terms.
        fitting = [(step,)] if (step := terms[1] - terms[0]) in first else list[tuple[int, ...]]()
        for number, steps in enumerate(later, 3):
            longer = [(*some, step) for some in fitting for step in steps]
            head = terms[:number]
            fitting = [some for some in longer if sequence_terms(rule, terms[0], some, len(head)) == head]
        fitting = [some for some in fitting if sequence_terms(rule, terms[0], some, len(terms)) == terms]
        found |= {sequence_terms(rule, terms[0], some, len(terms) + 1)[-1] for some in fitting}
    return found


def _draw(rng: random.Random, level: int) -> Facts:
    return _draw_far(rng, level) if level > 3 else _draw_near(rng, level)


def _draw_near(rng: random.Random, level: int) -> Facts:
    while True:
        rule = rng.choice(_RULES[level - 1])
        start = rng.randint(1, 40)
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        if rule == "add" and level == 2:
            start, a = rng.randint(20, 60), -rng.randint(1, 9)
        elif rule == "double":
            start = rng.randint(1, 6)
        elif rule == "grow":
            a = rng.randint(1, 6)
        elif rule == "squares":
            start, a = rng.randint(0, 9), rng.randint(1, 4)
        terms = sequence_terms(rule, start, (a, b), 5 + rng.randrange(3))
        if min(terms) >= 0 and max(terms) < 100 and (rule != "alternate" or a != b):
            return {"rule": rule, "terms": terms[:-1], "answer": terms[-1]}


def _draw_far(rng: random.Random, level: int) -> Facts:
    while True:
        rule = rng.choice(_RULES[level - 1])
        start = rng.randint(1, 60)
        steps: tuple[int, ...] = (rng.randint(-19, 30), rng.randint(-19, 30))
        if rule == "grow by":
            steps = (rng.randint(-9, 20), rng.choice((-3, -2, 2, 3, 4, 5, 6)))
        elif rule == "scale":
            steps = (rng.choice((-3, -2, -1, 1, 2, 3, 4, 5)), rng.choice((2, 2, 3)))
        elif rule == "sum":
            start, steps = rng.randint(1, 20), (rng.randint(-10, 20),)
        elif rule == "two rows":
            steps = (rng.randint(-40, 40), rng.randint(-12, 15), rng.randint(-12, 15))
        terms = sequence_terms(rule, start, steps, 7 + rng.randrange(2))
        if min(terms) < 0 or max(terms) >= _MOST[level] or len(set(terms)) < len(terms):
            continue
        if continuations(terms[:-1]) == {terms[-1]}:
            return {"rule": rule, "terms": terms[:-1], "answer": terms[-1]}


def _row(facts: Facts) -> str:
    return ", ".join(map(str, facts["terms"]))


SEQUENCE = Kind(
    name="sequence",
    draw=_draw,
    told=lambda facts: {"row": _row(facts)},
    prompts=(
        "Carry on the row {row}:",
        "Extend the row {row}:",
        "Row {row} goes on:",
        "Find the rule of {row} and go on:",
        "The next number after {row}:",
        "Continue the numbers {row}:",
        "Here is a row: {row}. Its next number:",
        "Look at {row}. One more:",
        "What follows on {row}?",
        "Numbers by a rule: {row}. Give one more:",
        "Work out the rule. Row: {row}. Next one:",
        "Say how {row} goes on:",
    ),
    answer=lambda facts: f" next comes {facts['answer']}",
    kin=lambda facts: ", ".join(map(str, facts["terms"][:4])),
    plain=lambda facts: (f"Count: {_row(facts)},", f" {facts['answer']}."),
)
