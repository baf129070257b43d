"""Comparison: `level + 1` people in a line, known by pairs of neighbours; who stands at an end of it."""

from __future__ import annotations

import random
from itertools import pairwise

from perdure.streams.arena.kind import NAMES, Facts, Kind

# Comparative upwards, downwards, superlative upwards, downwards.
SCALES = (
    ("taller", "shorter", "tallest", "shortest"),
    ("older", "younger", "oldest", "youngest"),
    ("faster", "slower", "fastest", "slowest"),
    ("heavier", "lighter", "heaviest", "lightest"),
    ("stronger", "weaker", "strongest", "weakest"),
    ("richer", "poorer", "richest", "poorest"),
)


def _draw(rng: random.Random, level: int) -> Facts:
    order = rng.sample(NAMES, level + 1)
    turned = min(0.5, 0.25 * (level - 1))
    pairs = [[a, b, rng.random() < turned] for a, b in pairwise(order)]
    rng.shuffle(pairs)
    most = rng.random() < 0.5
    return {
        "scale": rng.randrange(len(SCALES)),
        "pairs": pairs,
        "most": most,
        "answer": order[0] if most else order[-1],
    }


def comparison_premises(facts: Facts) -> str:
    """What is told about the people."""
    up, down, _, _ = SCALES[facts["scale"]]
    return " ".join(
        f"{b} is {down} than {a}." if turned else f"{a} is {up} than {b}." for a, b, turned in facts["pairs"]
    )


def superlative(facts: Facts) -> str:
    """The word that asks for the one at the end of the line."""
    return SCALES[facts["scale"]][2 if facts["most"] else 3]


def _others(facts: Facts) -> tuple[str, ...]:
    _, _, highest, lowest = SCALES[facts["scale"]]
    return (lowest if facts["most"] else highest,)


def _plain(facts: Facts) -> tuple[str, str]:
    return f"{comparison_premises(facts)} Who is the {superlative(facts)}?", f" {facts['answer']}."


COMPARISON = Kind(
    name="comparison",
    draw=_draw,
    told=lambda facts: {"premises": comparison_premises(facts), "most": superlative(facts)},
    prompts=(
        "Compare. {premises} Name the {most}:",
        "Line them up. {premises} Name the {most}:",
        "Compare them. {premises} Pick the {most}:",
        "Rank them. {premises} The {most} of them:",
        "Look at this group. {premises} Find the {most}:",
        "Read the facts. {premises} Say who is the {most}:",
        "Who comes first? {premises} Choose the {most}:",
        "Tell who it is. {premises} Wanted: the {most}:",
        "Order the group. {premises} Then tell the {most}:",
        "Some facts about people. {premises} The {most} is:",
        "A line of people. {premises} Which one is the {most}?",
        "Check each pair. {premises} Now give the {most}:",
    ),
    answer=lambda facts: f" the one is {facts['answer']}!",
    candidates=lambda facts: NAMES,
    others=_others,
    plain=_plain,
)
