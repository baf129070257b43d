"""Passage: a question over a short passage about people and towns that do not exist; the answer is a span of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

from perdure.streams.arena.kind import NAMES, TOWNS, Facts, Kind, words

RIVERS = words("Ard,Bree,Cale,Dorn,Erle,Fenn,Glim,Hask")
TRADES = words("baker,smith,miller,teacher,doctor,farmer,painter,sailor,tailor,hunter,gardener,weaver")
# Of whom, what it is, the sentence, the question, and the phrase that leads on to the next question.
_RELATIONS: dict[str, tuple[str, str, str, str, str]] = {
    "home": ("person", "town", "{a} lives in {b}.", "Where does {a} live?", "the town where {a} lives"),
    "trade": ("person", "trade", "{a} is a {b}.", "What is the trade of {a}?", ""),
    "born": ("person", "year", "{a} was born in {b}.", "When was {a} born?", ""),
    "master": ("person", "person", "{a} was taught by {b}.", "Who taught {a}?", "the one who taught {a}"),
    "mayor": ("town", "person", "The mayor of {a} is {b}.", "Who is the mayor of {a}?", "the mayor of {a}"),
    "river": ("town", "river", "{a} lies on the {b}.", "On which river lies {a}?", ""),
    "founded": ("town", "year", "{a} was founded in {b}.", "When was {a} founded?", ""),
}
_VALUES: dict[str, Sequence[str | int]] = {
    "person": NAMES,
    "town": TOWNS,
    "trade": TRADES,
    "river": RIVERS,
    "year": range(1700, 2000),
}
# How many facts the question leads through, and how many the passage tells.
_SIZES = {1: (1, 2), 2: (1, 4), 3: (2, 5), 4: (2, 8), 5: (3, 10)}

Told = list[str | int]


def replies(told: list[Told], start: str, path: list[str]) -> set[str | int]:
    """Where a chain of relations leads to from a start, by trying all chains of facts of that length."""
    found = set()
    for chain in product(told, repeat=len(path)):
        here: str | int = start
        for (subject, relation, value), wanted in zip(chain, path, strict=True):
            if subject != here or relation != wanted:
                break
            here = value
        else:
            found.add(here)
    return found


def _draw(rng: random.Random, level: int) -> Facts:
    hops, size = _SIZES[level]
    start, path, told = _asked(rng, hops)
    (answer,) = replies(told, start, path)
    _distract(rng, told, path, size)
    rng.shuffle(told)
    if replies(told, start, path) != {answer}:
        raise AssertionError(f"a passage has not exactly one answer to {path} from {start}: {told}")
    return {"told": told, "start": start, "path": path, "answer": answer}


def _asked(rng: random.Random, hops: int) -> tuple[str, list[str], list[Told]]:
    """A start, the relations asked for, and the facts that answer."""
    sort = rng.choice(("person", "town"))
    start = here = str(rng.choice(_VALUES[sort]))
    path: list[str] = []
    told: list[Told] = []
    for left in reversed(range(hops)):
        leads_on = [name for name, r in _RELATIONS.items() if r[0] == sort and (not left or r[4])]
        relation = rng.choice(leads_on)
        sort = _RELATIONS[relation][1]
        value = rng.choice([v for v in _VALUES[sort] if v not in {here, *(fact[0] for fact in told)}])
        path.append(relation)
        told.append([here, relation, value])
        here = str(value)
    return start, path, told


def _distract(rng: random.Random, told: list[Told], path: list[str], size: int) -> None:
    """Add facts of the relations asked for, and of others, about more people and towns, up to `size` in all.

    No one has two of a relation, and no two have the same of it: a span then stands for one fact.
    """
    while len(told) < size:
        relation = rng.choice(path) if rng.random() < 0.6 else rng.choice(list(_RELATIONS))
        sort, what = _RELATIONS[relation][:2]
        subject, value = rng.choice(_VALUES[sort]), rng.choice(_VALUES[what])
        known = [fact for fact in told if fact[1] == relation]
        if subject != value and all(fact[0] != subject and fact[2] != value for fact in known):
            told.append([subject, relation, value])


def _sentences(facts: Facts) -> list[str]:
    return [_RELATIONS[relation][2].format(a=a, b=b) for a, relation, b in facts["told"]]


def _question(facts: Facts) -> str:
    *before, last = facts["path"]
    about = facts["start"]
    for relation in before:
        about = _RELATIONS[relation][4].format(a=about)
    return _RELATIONS[last][3].format(a=about)


def _candidates(facts: Facts) -> tuple[str, ...]:
    """All that the question could ask for: people for a person, and so on; the start is no answer to itself."""
    what = _RELATIONS[facts["path"][-1]][1]
    return () if what == "year" else tuple(str(v) for v in _VALUES[what] if v != facts["start"])


PASSAGE = Kind(
    name="passage",
    draw=_draw,
    told=lambda facts: {"passage": " ".join(_sentences(facts)), "question": _question(facts)},
    prompts=(
        "Read. {passage} {question}",
        "Read the text. {passage} Question: {question}",
        "Here is a text. {passage} Now tell: {question}",
        "{passage} From this text: {question}",
        "Look it up. {passage} {question}",
        "Find it in the text. {passage} {question}",
        "A short story. {passage} A question on it: {question}",
        "Some facts. {passage} Asked: {question}",
        "Take the answer from the text. {passage} {question}",
        "Text: {passage} Question: {question}",
        "Read this first. {passage} Then say: {question}",
        "What does the text say? {passage} {question}",
    ),
    answer=lambda facts: f" we read {facts['answer']}",
    candidates=_candidates,
    canonical=lambda facts: " ".join([*sorted(_sentences(facts)), _question(facts)]),
)
