"""Math word problem: one person, things that come and go."""

from __future__ import annotations

import random

from perdure.streams.arena.kind import NAMES, Facts, Kind, words

OBJECTS = words("pens,apples,coins,books,cards,stones,shells,eggs,cups,nuts,keys,toys")
# What there is at first (a number, or bags and how many in each), how many changes follow, and the largest of them.
_START = {1: ((2, 20),), 2: ((2, 20),), 3: ((2, 5), (2, 6)), 4: ((20, 80),), 5: ((3, 12), (5, 12))}
_CHANGES = {1: (1, 9), 2: (2, 9), 3: (1, 9), 4: (4, 30), 5: (5, 40)}


def _draw(rng: random.Random, level: int) -> Facts:
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    numbers = [rng.randint(*bounds) for bounds in _START[level]]
    total = numbers[0] * numbers[1] if len(numbers) == 2 else numbers[0]
    steps: list[list[str | int]] = [["bags" if len(numbers) == 2 else "has", *numbers]]
    changes, most = _CHANGES[level]
    for _ in range(changes):
        if rng.random() < 0.5 and total > 2:
            change = rng.randint(1, min(total - 1, most))
            total -= change
            steps.append(["loses", change])
        else:
            change = rng.randint(1, most)
            total += change
            steps.append(["gets", change])
    return {"name": name, "thing": thing, "steps": steps, "answer": total}


def math_sentences(facts: Facts) -> list[str]:
    """The story, one sentence a step."""
    name, thing = facts["name"], facts["thing"]
    says = {
        "has": f"{name} has {{}} {thing}.",
        "bags": f"{name} has {{}} bags with {{}} {thing} each.",
        "gets": f"{name} gets {{}} more.",
        "loses": f"{name} loses {{}}.",
    }
    return [says[step[0]].format(*step[1:]) for step in facts["steps"]]


def _others(facts: Facts) -> tuple[str, ...]:
    return tuple(word for word in (*NAMES, *OBJECTS) if word not in (facts["name"], facts["thing"]))


def _plain(facts: Facts) -> tuple[str, str]:
    story = " ".join(math_sentences(facts))
    return f"{story} How many {facts['thing']} does {facts['name']} have?", f" {facts['answer']}."


MATH = Kind(
    name="math word problem",
    draw=_draw,
    told=lambda facts: {
        "story": " ".join(math_sentences(facts)),
        "thing": facts["thing"],
        "name": facts["name"],
    },
    prompts=(
        "Solve. {story} Total of {thing}:",
        "Work it out. {story} Total of {thing}:",
        "Solve it. {story} Sum up the {thing}:",
        "Count with {name}. {story} Number of {thing} now:",
        "A story with numbers. {story} How many {thing} are left?",
        "Take each step. {story} The {thing} at the end:",
        "Find the number. {story} All {thing} in the end:",
        "{story} Tell how many {thing} that is:",
        "Do the sum. {story} {name} now has this number of {thing}:",
        "Read and count. {story} The number of {thing}:",
        "Keep count. {story} After that, the {thing} number:",
        "What is the result? {story} Count the {thing}:",
    ),
    answer=lambda facts: f" it makes {facts['answer']} in all",
    others=_others,
    plain=_plain,
)
