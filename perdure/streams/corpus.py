"""Nano's pre-training text and its probe set, generated: short documents over a dozen small skills.

A document is a list of `(text, weight)` pieces. What cannot be foreseen (who, what, how many) weighs little in the
loss, what follows from it weighs 1; without that, a model this small spends itself on guessing names.
"""

import random
from collections.abc import Callable, Iterator, Set
from itertools import pairwise
from typing import Any

from perdure.streams import arena
from perdure.streams.arena import KINDS, LEVELS, NAMES, OBJECTS, THINGS, Facts, normalise, partition, words

Document = list[tuple[str, float]]
Pair = tuple[str, str]

PREMISE_WEIGHT = 0.15
COLOURS = words("red,blue,green,black,white,brown,pink,grey")
PLACES = words("park,school,shop,garden,kitchen,station,beach,farm,forest,library")
CATEGORIES = {
    "an animal": ("cat", "dog", "fish", "hen", "cow", "horse", "bird", "mouse"),
    "a toy": ("ball", "kite", "drum", "doll", "block"),
    "a thing to wear": ("hat", "ring", "shoe", "coat", "scarf"),
    "a food": ("apple", "egg", "cake", "nut", "pear", "bread"),
    "a tool": ("hammer", "saw", "spoon", "key", "lamp"),
}
OPPOSITES = words(
    "hot cold,big small,up down,open closed,full empty,light dark,fast slow,old new,wet dry,happy sad,first last,"
    "left right"
)
# Common words that the other documents lack: without them a prompt from elsewhere falls into single letters.
LEXICON = words(
    "about after again all also because before begin best both carry chain change check choose clue come "
    "compare correct day each end extend fact fill find finally first follow game give goes good grid group "
    "happens here how it its just last leads least left line list look makes mark match may more most much must "
    "name need next not now number of on once one only or order other out over own owns pick place put puzzle "
    "rank reason result right row rule say solve some start step story sum table take tell then therefore they "
    "this time today total trace try turn under until up use who why will win winner with word work wrong yes "
    "you",
    " ",
)
OPENERS = words(
    "Compare Carry Chain Extend Fill Find Finish Follow Grid Line Logic Name Next Now Pick Rank Row Solve Sum "
    "Today Trace Work",
    " ",
)
# Probe skills, and what share of the corpus each document kind takes.
SKILLS = ("recall", "objects", "counting", "lookup", "arithmetic", *KINDS)
SHARES = {
    "recall": 6,
    "objects": 2,
    "counting": 4,
    "lookup": 8,
    "arithmetic": 8,
    "comparison": 14,
    "sequence": 14,
    "causal": 16,
    "math": 12,
    "grid": 16,
    "story": 1,
    "words": 1,
}
# The lesson plan: so many documents with these shares, one after the other, then `SHARES`. A kind that asks for a
# look-up is learnt in a million tokens where it rules, and not in twenty million where it is one of twelve.
LESSONS: tuple[tuple[int, dict[str, int]], ...] = (
    (60_000, {"comparison": 1}),
    (40_000, {"causal": 3, "comparison": 1}),
    (50_000, {"lookup": 4, "recall": 2, "comparison": 1, "causal": 1}),
    (50_000, {"grid": 5, "lookup": 1, "recall": 1, "comparison": 1, "causal": 1}),
)
# A model that met each skill with one form of answer only loses the skill with the form.
FRAMED = 0.45
PLAIN = 0.25


def documents(seed: int) -> Iterator[Document]:
    """Documents of all kinds without end; none holds a problem of the arena's part or the probe's."""
    rng = random.Random(f"corpus/{seed}")
    while True:
        yield _document(rng, SHARES)


def lessons(seed: int) -> Iterator[Document]:
    """The same kinds of document in the order of the lesson plan, without end."""
    rng = random.Random(f"lessons/{seed}")
    for count, shares in LESSONS:
        for _ in range(count):
            yield _document(rng, shares)
    while True:
        yield _document(rng, SHARES)


def _document(rng: random.Random, shares: dict[str, int]) -> Document:
    kind = rng.choices(list(shares), list(shares.values()))[0]
    return _kind_document(kind, rng) if kind in KINDS else _DOCUMENTS[kind](rng)


def text_of(document: Document) -> str:
    """The document as one string."""
    return "".join(text for text, _ in document)


def vocabulary_text() -> str:
    """Every word of the lexicon as the tokenizer is to learn it; the openers also as they stand at a start."""
    return "\n".join(OPENERS) + "\n " + " ".join((*LEXICON, *OPENERS))


def probe(count: int = 200, seed: int = 0) -> list[dict[str, str]]:
    """The general probe set: as many items of each skill, in pretraining wording, never in the corpus.

    Rows have the keys id, skill, prompt and answer.
    """
    return _held_out("probe", count, seed)


def validation(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Further problems from the probe's part of the world, none of them in `probe()`, for the held-out loss."""
    taken = {normalise(row["prompt"]) for row in probe()}
    return _held_out("validation", count, seed, taken)


def _held_out(purpose: str, count: int, seed: int, taken: Set[str] = frozenset()) -> list[dict[str, str]]:
    rng, rows, seen = random.Random(f"{purpose}/{seed}"), list[dict[str, str]](), set(taken)
    for number, skill in enumerate(SKILLS):
        wanted = count // len(SKILLS) + (number < count % len(SKILLS))
        for index in range(wanted):
            while True:
                prompt, answer = question(skill, rng, "probe", LEVELS[index % len(LEVELS)])
                text = normalise(prompt)
                if text not in seen:
                    break
            seen.add(text)
            rows.append({"id": arena.digest(text), "skill": skill, "prompt": prompt, "answer": answer})
    return rows


def question(skill: str, rng: random.Random, part: str, level: int | None = None) -> Pair:
    """One (prompt, answer) of a skill in its plainest wording, from one part of `arena.partition`."""
    if skill in KINDS:
        return arena.plain_wording(skill, _facts(skill, rng, part, level))
    return _held(_QUESTIONS[skill], rng, skill, part)[0]


def _facts(kind: str, rng: random.Random, part: str, level: int | None = None) -> Facts:
    while True:
        facts = arena.draw(kind, level or rng.choice(LEVELS), rng)
        if partition(kind, facts) == part:
            return facts


def _held(make: Callable[[random.Random], list[Pair]], rng: random.Random, skill: str, part: str) -> list[Pair]:
    while True:
        pairs = make(rng)
        if partition(skill, pairs[0][0]) == part:
            return pairs


def _simple(skill: str) -> Callable[[random.Random], Document]:
    def document(rng: random.Random) -> Document:
        return _ask([], _held(_QUESTIONS[skill], rng, skill, "corpus"))

    return document


# Skills that the arena does not have.


def _recall(rng: random.Random) -> list[Pair]:
    people, colours, things = rng.sample(NAMES, 3), rng.sample(COLOURS, 3), rng.sample(THINGS, 3)
    told = " ".join(f"{n} has a {c} {t}." for n, c, t in zip(people, colours, things, strict=True))
    asked = [(f" What colour is the {t}?", f" {c.capitalize()}.") for t, c in zip(things, colours, strict=True)]
    asked += [(f" Who has the {t}?", f" {n}.") for t, n in zip(things, people, strict=True)]
    return _several(rng, told, asked)


def _several(rng: random.Random, told: str, asked: list[Pair]) -> list[Pair]:
    (prompt, answer), *more = rng.sample(asked, rng.choice((1, 3)))
    return [(told + prompt, answer), *more]


def _objects(rng: random.Random) -> list[Pair]:
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    if rng.random() < 0.3:
        one, other = rng.choice(OPPOSITES).split()[:: rng.choice((1, -1))]
        return [(f"{name} is in the {place}. {name} says {one}. What is the opposite?", f" {other.capitalize()}.")]
    category = rng.choice(list(CATEGORIES))
    thing = rng.choice(CATEGORIES[category])
    return [(f"{name} sees the {thing} in the {place}. What is it?", f" It is {category}.")]


def _counting(rng: random.Random) -> list[Pair]:
    if rng.random() < 0.5:
        seen = rng.choices(rng.sample(THINGS, 3), k=rng.randint(3, 9))
        thing = rng.choice(seen)
        return [(f"{rng.choice(NAMES)} sees: {', '.join(seen)}. How many times {thing}?", f" {seen.count(thing)}.")]
    seen = rng.sample(NAMES, rng.randint(2, 9))
    return [(f"In the {rng.choice(PLACES)}: {', '.join(seen)}. How many people?", f" {len(seen)}.")]


def _lookup(rng: random.Random) -> list[Pair]:
    size = rng.randint(3, 5)
    rows, values = rng.sample(NAMES, size), rng.sample(rng.choice((THINGS, COLOURS, PLACES)), size)
    if rng.random() < 0.6:
        table = "; ".join(f"{n} - {v}" for n, v in zip(rows, values, strict=True))
        asked = [(f" {n}?", f" {v}.") for n, v in zip(rows, values, strict=True)]
        asked += [(f" {v}?", f" {n}.") for n, v in zip(rows, values, strict=True)]
        return _several(rng, f"Table: {table}.", asked)
    asked = []
    for value in values:
        left = [v for v in values if v != value]
        asked.append((f" Used: {', '.join(rng.sample(left, size - 1))}. Which one is left?", f" {value}."))
    return _several(rng, f"All: {', '.join(rng.sample(values, size))}.", asked)


def _arithmetic(rng: random.Random) -> list[Pair]:
    form = rng.random()
    if form < 0.45:
        a, b = rng.randint(0, 70), rng.randint(0, 20)
        return [(f"{a} + {b} =", f" {a + b}.")]
    if form < 0.85:
        a, b = rng.randint(0, 90), rng.randint(0, 20)
        a, b = max(a, b), min(a, b)
        return [(f"{a} - {b} =", f" {a - b}.")]
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return [(f"{a} x {b} =", f" {a * b}.")]


def _sums(rng: random.Random) -> Document:
    document: Document = []
    for _ in range(rng.choice((1, 4, 6))):
        ((prompt, answer),) = _held(_arithmetic, rng, "arithmetic", "corpus")
        document += [((" " if document else "") + prompt, PREMISE_WEIGHT), (answer, 1.0)]
    return document


def _story(rng: random.Random) -> Document:
    (a, b), place = rng.sample(NAMES, 2), rng.choice(PLACES)
    thing, other, colour = rng.choice(THINGS), rng.choice(OBJECTS), rng.choice(COLOURS)
    start = rng.choice(
        (
            f"One day {a} went to the {place}. There {a} met {b}. {b} had a {colour} {thing}.",
            f"It was a sunny day. {a} and {b} were in the {place}. They found a {colour} {thing}.",
            f"{a} lost a {colour} {thing}. So {a} asked {b} for help. They looked in the {place}.",
            f"Once there was a {thing}. It belonged to {a}. {b} wanted to buy it for {rng.randint(2, 30)} {other}.",
        )
    )
    end = rng.choice(
        (
            f" In the end {a} gave the {thing} to {b}, and both were happy.",
            f" {b} said: the {thing} is the best of all. Then they went home.",
            f" Finally they put the {thing} next to the {other}. That was all.",
            f" The {thing} must be old, said {a}. It makes {b} smile.",
        )
    )
    return [(start, PREMISE_WEIGHT), (end, 0.5)]


def _words(rng: random.Random) -> Document:
    said = " ".join(rng.sample(LEXICON, 8))
    return [(f"{rng.choice(OPENERS)} {said}: {rng.choice(OPENERS)}.", PREMISE_WEIGHT)]


# The arena's kinds: plainly asked, with every step of the way written out, or with the answer in any frame.


def _kind_document(kind: str, rng: random.Random) -> Document:
    facts, way = _facts(kind, rng, "corpus"), rng.random()
    if way < FRAMED:
        return _framed(kind, facts, rng)
    if way < FRAMED + PLAIN:
        prompt, answer = arena.plain_wording(kind, facts)
        return [(prompt, PREMISE_WEIGHT), (answer, 1.0)]
    return _WORKED[kind](rng, facts)


def _framed(kind: str, facts: Facts, rng: random.Random) -> Document:
    """A problem asked as the corpus or as the arena asks, the answer among random words.

    The skill is to answer wherever the answer is due; how the arena's kinds frame theirs is not taught here.
    """
    prompt, _ = arena.plain_wording(kind, facts)
    if rng.random() < 0.6:
        prompt, _ = arena.wording(kind, facts, rng.randrange(12))
    frame = _some(rng, 0, 3)
    before = f" {frame}{rng.choice(('', '', ',', ':'))}" if frame else ""
    before += rng.choice(("", " the")) if kind == "grid" else ""
    after = rng.choice(("", ".", "!", "?", ";", f" {facts['thing']}" if kind == "math" else "."))
    pieces = [
        (prompt, PREMISE_WEIGHT / 3),
        (before, PREMISE_WEIGHT / 3),
        (f" {facts['answer']}", 1.0),
        (after, PREMISE_WEIGHT),
    ]
    return [piece for piece in pieces if piece[0]]


def _some(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.sample(LEXICON, rng.randint(least, most)))


def _worked_comparison(rng: random.Random, facts: Facts) -> Document:
    scale = arena.SCALES[facts["scale"]]
    after = {a: b for a, b, _ in facts["pairs"]}
    order = [next(a for a in after if a not in after.values())]
    while order[-1] in after:
        order.append(after[order[-1]])
    document = [(arena.comparison_premises(facts), PREMISE_WEIGHT)]
    asked = [
        (f" Who is the {scale[2]}?", f" {order[0]}."),
        (f" Who is the {scale[3]}?", f" {order[-1]}."),
        (f" From {scale[2]} to {scale[3]}:", f" {', '.join(order)}."),
        (f" From {scale[3]} to {scale[2]}:", f" {', '.join(reversed(order))}."),
        (f" The {scale[2]} is", f" {order[0]}."),
        (f" The {scale[3]} is", f" {order[-1]}."),
    ]
    i, j = sorted(rng.sample(range(len(order)), 2))
    one, other = rng.sample((order[i], order[j]), 2)
    asked.append((f" Is {one} {scale[0]} than {other}?", " Yes." if one == order[i] else " No."))
    return _ask(document, rng.sample(asked, 4))


def _worked_sequence(rng: random.Random, facts: Facts) -> Document:
    terms = [*facts["terms"], facts["answer"]]
    if rng.random() < 0.5:
        head, tail = terms[:4], terms[4:]
        lead = rng.choice(("Numbers: ", "Go on: ", ""))
        return [
            (lead + ", ".join(map(str, head)) + ",", PREMISE_WEIGHT),
            (" " + ", ".join(map(str, tail)) + ".", 1.0),
        ]
    document: Document = [(f"Count: {', '.join(map(str, facts['terms']))}.", PREMISE_WEIGHT)]
    steps = [f"{b - a:+d}" for a, b in pairwise(facts["terms"])]
    asked = [
        (" Steps:", f" {', '.join(steps)}."),
        (" What is the last one?", f" {facts['terms'][-1]}."),
        (" What comes next?", f" {facts['answer']}."),
        (f" After {facts['terms'][-1]} comes", f" {facts['answer']}."),
    ]
    return _ask(document, sorted(rng.sample(asked, 2), key=asked.index))


def _worked_causal(rng: random.Random, facts: Facts) -> Document:
    chain, premises = facts["chain"], arena.causal_premises(facts)
    document = [(premises, PREMISE_WEIGHT)]
    cause, effect = rng.choice(facts["rules"])
    start = f" {_capital(facts['start'])}."
    asked = [
        (f"{start} What happens in the end?", f" {_capital(chain[-1])}."),
        (f"{start} And then?", "".join(f" {_capital(event)}." for event in chain[1:])),
        (f" What happens when {cause}?", f" {_capital(effect)}."),
        (f" Why does it happen that {effect}?", f" Because {cause}."),
        (f"{start} So at last", f" {chain[-1]}."),
    ]
    return _ask(document, rng.sample(asked, 4))


def _worked_math(rng: random.Random, facts: Facts) -> Document:
    name, thing = facts["name"], facts["thing"]
    document: Document = []
    sums, total = [], 0
    for sentence, step in zip(arena.math_sentences(facts), facts["steps"], strict=True):
        document.append(((" " if document else "") + sentence, PREMISE_WEIGHT))
        before = total
        if step[0] == "has":
            total = step[1]
            continue
        total = (
            step[1] * step[2] if step[0] == "bags" else total + step[1] if step[0] == "gets" else total - step[1]
        )
        sums.append(
            f"{step[1]} x {step[2]} = {total}"
            if step[0] == "bags"
            else f"{before} {'+' if step[0] == 'gets' else '-'} {step[1]} = {total}"
        )
        if len(facts["steps"]) > 2 and rng.random() < 0.3:
            document += [(f" Now {name} has", 1.0), (f" {total}.", 1.0)]
    asked = [
        (f" How many {thing} does {name} have?", f" {total}."),
        (" Sum:", f" {'; '.join(sums)}."),
        (f" In all {name} has", f" {total} {thing}."),
        (" Who has them?", f" {name}."),
    ]
    return _ask(document, rng.sample(asked, 3))


def _worked_grid(rng: random.Random, facts: Facts) -> Document:
    names, things, clues = facts["names"], facts["things"], facts["clues"]
    (grid,) = arena.solutions(names, things, [tuple(clue) for clue in clues])
    known = [(n, t) for n, t, holds in clues if holds]
    asked = [(f" What does {n} have?", f" The {grid[n]}.") for n in names]
    asked += [(f" Who has the {t}?", f" {n}.") for n, t in grid.items()]
    asked.append((" So", ";".join(f" {n} has the {grid[n]}" for n in names) + "."))
    if known:
        rest = [t for t in things if t not in {t for _, t in known}]
        asked.append((" What is left?", f" {' and '.join(f'the {t}' for t in rest).capitalize()}."))
    return _ask([(arena.grid_premises(facts), PREMISE_WEIGHT)], rng.sample(asked, 5))


def _ask(document: Document, asked: list[Pair]) -> Document:
    for prompt, answer in asked:
        document += [(prompt, PREMISE_WEIGHT), (answer, 1.0)]
    return document


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


_QUESTIONS: dict[str, Callable[[random.Random], list[Pair]]] = {
    "recall": _recall,
    "objects": _objects,
    "counting": _counting,
    "lookup": _lookup,
    "arithmetic": _arithmetic,
}
_DOCUMENTS: dict[str, Callable[[random.Random], Document]] = {
    "recall": _simple("recall"),
    "objects": _simple("objects"),
    "counting": _simple("counting"),
    "lookup": _simple("lookup"),
    "arithmetic": _sums,
    "story": _story,
    "words": _words,
}
_WORKED: dict[str, Callable[[random.Random, Facts], Any]] = {
    "comparison": _worked_comparison,
    "sequence": _worked_sequence,
    "causal": _worked_causal,
    "math": _worked_math,
    "grid": _worked_grid,
}
