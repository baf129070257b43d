"""Operator: an invented operation on small numbers, `a # b`, whose rule is told in no item: it can only be learnt.

The first number counts twice: a # b = 2a + b. Levels 1 to 3 have ever bigger numbers, levels 4 and 5 the operator
twice.
"""

from __future__ import annotations

import random
from functools import reduce

from perdure.streams.arena.kind import Facts, Kind

# The largest number, and how many numbers there are.
_SIZES = {1: (12, 2), 2: (30, 2), 3: (99, 2), 4: (12, 3), 5: (50, 3)}


def applied(a: int, b: int) -> int:
    """a # b."""
    return 2 * a + b


def _draw(rng: random.Random, level: int) -> Facts:
    most, count = _SIZES[level]
    numbers = [rng.randint(0, most) for _ in range(count)]
    return {"numbers": numbers, "answer": reduce(applied, numbers)}


def _shown(facts: Facts) -> str:
    first, second, *rest = facts["numbers"]
    return f"({first} # {second}) # {rest[0]}" if rest else f"{first} # {second}"


OPERATOR = Kind(
    name="operator",
    draw=_draw,
    told=lambda facts: {"term": _shown(facts)},
    prompts=(
        "Work out {term}:",
        "{term} =",
        "What is {term}?",
        "Find {term}:",
        "The result of {term}:",
        "Give the number {term}:",
        "Solve {term}:",
        "Say what {term} makes:",
        "Take {term}. Result:",
        "Tell the value of {term}:",
        "How much is {term}?",
        "Do {term} now:",
    ),
    answer=lambda facts: f" gives {facts['answer']}",
    canonical=_shown,
)
