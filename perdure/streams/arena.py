"""The reasoning arena: five kinds of small generated problems whose answers are computed, never typed in."""

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from itertools import pairwise, permutations
from typing import Any

KINDS: tuple[str, ...] = ("comparison", "sequence", "causal", "math", "grid")
DISPLAY_NAMES: dict[str, str] = {
    "comparison": "comparison",
    "sequence": "sequence",
    "causal": "causal",
    "math": "math word problem",
    "grid": "logic grid",
}
LEVELS: tuple[int, ...] = (1, 2, 3)


def words(text: str, separator: str = ",") -> tuple[str, ...]:
    """The entries of a list written as one string."""
    return tuple(text.split(separator))


NAMES = words(
    "Anna,Ben,Cleo,Dan,Emma,Finn,Gina,Hugo,Iris,Jack,Kate,Leo,Mia,Nick,Olga,Paul,Rosa,Sam,Tina,Will,Vera,Omar,Lucy,Max"
)
# Comparative upwards, downwards, superlative upwards, downwards.
SCALES = (
    ("taller", "shorter", "tallest", "shortest"),
    ("older", "younger", "oldest", "youngest"),
    ("faster", "slower", "fastest", "slowest"),
    ("heavier", "lighter", "heaviest", "lightest"),
    ("stronger", "weaker", "strongest", "weakest"),
    ("richer", "poorer", "richest", "poorest"),
)
EVENTS = words(
    "the bell rings,the dog barks,the cat runs,the lamp falls,the door opens,the wind blows,the baby cries,"
    "the rain starts,the river rises,the road floods,the train stops,the horse jumps,the bird sings,"
    "the fire starts,the ice melts,the leaf drops,the gate closes,the boat sinks,the clock stops,the child laughs,"
    "the cow sleeps,"
    "the car turns,the ball rolls,the bridge shakes,the light flashes,the glass breaks,the wheel spins,"
    "the king smiles,the snow slides,the phone buzzes"
)
OBJECTS = words("pens,apples,coins,books,cards,stones,shells,eggs,cups,nuts,keys,toys")
THINGS = words("cat,dog,fish,hen,cow,horse,ball,book,drum,kite,lamp,ring,cup,hat,key,boat")

# Ends every prompt of the tasks: what follows it tells the kinds apart, not what comes before it.
ASK = " Answer:"

Facts = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One problem: `prompt + answer` is its text, and the answer begins with the space that separates the two."""

    kind: str
    level: int
    prompt: str
    answer: str
    facts: Facts = field(hash=False, repr=False)

    @property
    def key(self) -> str:
        """A stable hash of the normalised prompt, the same in every run and at every row number."""
        return digest(normalise(self.prompt))

    def row(self) -> dict[str, Any]:
        """The item as one line of JSONL."""
        return {
            "id": self.key,
            "kind": self.kind,
            "level": self.level,
            "prompt": self.prompt,
            "answer": self.answer,
        }


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces: two texts that differ in nothing else count as the same.

    Signs that carry meaning in arithmetic (`+ - * / = < >`) are kept.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w+\-*/=<>]+", " ", text).split())


def digest(text: str) -> str:
    """Sixteen hex digits of BLAKE2b."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def partition(kind: str, facts: object) -> str:
    """Which part of the world a problem belongs to: "arena", "probe" or "corpus", by a hash of its facts.

    The arena draws from one part, nano's probe set and its pretraining text from the others, so that no wording of
    an arena problem has been seen before, however many items are drawn and with whatever seed.
    """
    if kind == "sequence" and isinstance(facts, dict):
        facts = facts["terms"][:4]  # a row and its continuation belong together
    bucket = int(digest(normalise(kind + json.dumps(facts, sort_keys=True)))[:4], 16) % 16
    return "arena" if bucket < 4 else "probe" if bucket == 4 else "corpus"


def draw(kind: str, level: int, rng: random.Random) -> Facts:
    """The structured content of one problem: premises in the order shown, the question and the answer."""
    _check(kind, level)
    return _DRAW[kind](rng, level)


def wording(kind: str, facts: Facts, form: int) -> tuple[str, str]:
    """The problem in the arena's wording, in surface form `form` (taken modulo the number of forms)."""
    _check(kind)
    return _WORDING[kind](facts, form)


def plain(item: Item) -> tuple[str, str]:
    """The same problem in the wording of nano's pretraining text: prompt and answer."""
    return plain_wording(item.kind, item.facts)


def plain_wording(kind: str, facts: Facts) -> tuple[str, str]:
    """Facts in the wording of nano's pretraining text."""
    _check(kind)
    return _PLAIN[kind](facts)


def generate(
    kind: str, count: int, seed: int, level: int | None = None, exclude: Set[str] = frozenset()
) -> list[Item]:
    """Draw `count` items, distinct by normalised prompt; no two are one problem in different words either.

    Args:
        kind: one of `KINDS`.
        count: how many items.
        seed: the same seed gives the same items in the same order.
        level: 1 (easy) to 3 (hard); None mixes them evenly.
        exclude: normalised prompts that must not come up.

    Raises:
        ValueError: for an unknown kind or level, or when the kind cannot supply so many distinct items.
    """
    _check(kind, level)
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    rng = random.Random(f"arena/{kind}/{seed}/{level}")
    seen, items, misses = set(exclude), list[Item](), 0
    while len(items) < count:
        at = level or LEVELS[len(items) % len(LEVELS)] if misses < 500 else level or rng.choice(LEVELS)
        facts = draw(kind, at, rng)
        prompt, answer = wording(kind, facts, rng.randrange(12))
        prompt += ASK
        texts = {normalise(prompt), normalise(plain_wording(kind, facts)[0])}
        if texts & seen or partition(kind, facts) != "arena":
            misses += 1
            if misses > 5000:
                where = "" if level is None else f" at level {level}"
                raise ValueError(
                    f"kind '{kind}'{where} cannot supply {count} distinct items: {len(items)} were found; "
                    "ask for fewer, or for another level"
                )
            continue
        misses = 0
        seen |= texts
        items.append(Item(kind, at, prompt, answer, facts))
    rng.shuffle(items)
    return items


def split(kind: str, train: int, evaluate: int, seed: int) -> tuple[list[Item], list[Item]]:
    """Training and evaluation items of one kind, disjoint by normalised text."""
    items = generate(kind, train + evaluate, seed)
    first, second = items[:train], items[train:]
    shared = {normalise(item.prompt) for item in first} & {normalise(item.prompt) for item in second}
    shared |= {normalise(plain(item)[0]) for item in first} & {normalise(plain(item)[0]) for item in second}
    assert not shared, f"training and evaluation items of '{kind}' share {len(shared)} texts"
    return first, second


def solutions(names: list[str], things: list[str], clues: list[tuple[str, str, bool]]) -> list[dict[str, str]]:
    """Every assignment of things to names that agrees with all clues, by trying them all."""
    found = []
    for order in permutations(things):
        grid = dict(zip(names, order, strict=True))
        if all((grid[name] == thing) == holds for name, thing, holds in clues):
            found.append(grid)
    return found


def _check(kind: str, level: int | None = None) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown arena kind '{kind}'; the kinds are: {', '.join(KINDS)}")
    if level is not None and level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(map(str, LEVELS))} or None, got {level}")


def _pick(forms: tuple[str, ...], form: int) -> str:
    return forms[form % len(forms)]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# Comparison: `level + 1` people in a line, known by pairs of neighbours.


def _draw_comparison(rng: random.Random, level: int) -> Facts:
    order = rng.sample(NAMES, level + 1)
    pairs = [[a, b, rng.random() < 0.25 * (level - 1)] for a, b in pairwise(order)]
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


def _comparison(facts: Facts, form: int) -> tuple[str, str]:
    prompt = _pick(
        (
            "Compare. {premises} Name the {most}:",
            "Line them up. {premises} Name the {most}:",
            "Compare them. {premises} Pick the {most}:",
        ),
        form,
    ).format(premises=comparison_premises(facts), most=superlative(facts))
    return prompt, f" the one is {facts['answer']}!"


def _plain_comparison(facts: Facts) -> tuple[str, str]:
    return f"{comparison_premises(facts)} Who is the {superlative(facts)}?", f" {facts['answer']}."


# Sequence: the next number.


def sequence_terms(rule: str, start: int, steps: tuple[int, int], length: int) -> list[int]:
    """The first terms under a rule.

    add: constant step; double: times two; grow: a step that grows by one each time; squares: n² + constant;
    alternate: two steps in turn; weave: two constants in turn.
    """
    a, b = steps
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
    return [start + a if i % 2 else start for i in range(length)]


def _draw_sequence(rng: random.Random, level: int) -> Facts:
    while True:
        rule = rng.choice(
            (("add",), ("add", "double", "weave"), ("alternate", "alternate", "grow", "squares"))[level - 1]
        )
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


def _sequence(facts: Facts, form: int) -> tuple[str, str]:
    terms = ", ".join(map(str, facts["terms"]))
    prompt = _pick(("Carry on the row {}:", "Extend the row {}:", "Row {} goes on:"), form).format(terms)
    return prompt, f" next comes {facts['answer']}"


def _plain_sequence(facts: Facts) -> tuple[str, str]:
    return f"Count: {', '.join(map(str, facts['terms']))},", f" {facts['answer']}."


# Causal: rules "when A, B" in any order, one event that starts the chain, the last event asked for.


def _draw_causal(rng: random.Random, level: int) -> Facts:
    events = rng.sample(EVENTS, 5)
    chain = events[: level + 1]
    rules = [list(pair) for pair in pairwise(chain)]
    if level < 3:
        rules.append(events[3:])
    rng.shuffle(rules)
    return {"rules": rules, "start": chain[0], "chain": chain, "answer": chain[-1]}


def causal_premises(facts: Facts) -> str:
    """The rules, in the order shown."""
    return " ".join(f"When {a}, {b}." for a, b in facts["rules"])


def _causal(facts: Facts, form: int) -> tuple[str, str]:
    prompt = _pick(
        (
            "Trace the chain. {rules} Now {start}. The chain ends:",
            "Follow the chain. {rules} Now {start}. The chain ends:",
            "Trace it. {rules} Today {start}. It ends:",
        ),
        form,
    ).format(rules=causal_premises(facts), start=facts["start"])
    return prompt, f" finally, {facts['answer']}?"


def _plain_causal(facts: Facts) -> tuple[str, str]:
    return (
        f"{causal_premises(facts)} {_capital(facts['start'])}. What happens in the end?",
        f" {_capital(facts['answer'])}.",
    )


# Math word problem: one person, things that come and go.


def _draw_math(rng: random.Random, level: int) -> Facts:
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    if level == 3:
        bags, each = rng.randint(2, 5), rng.randint(2, 6)
        total, steps = bags * each, [["bags", bags, each]]
    else:
        total = rng.randint(2, 20)
        steps = [["has", total]]
    for _ in range(2 if level == 2 else 1):
        if rng.random() < 0.5 and total > 2:
            change = rng.randint(1, min(total - 1, 9))
            total -= change
            steps.append(["loses", change])
        else:
            change = rng.randint(1, 9)
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


def _math(facts: Facts, form: int) -> tuple[str, str]:
    prompt = _pick(
        (
            "Solve. {story} Total of {thing}:",
            "Work it out. {story} Total of {thing}:",
            "Solve it. {story} Sum up the {thing}:",
        ),
        form,
    ).format(story=" ".join(math_sentences(facts)), thing=facts["thing"])
    return prompt, f" it makes {facts['answer']} in all"


def _plain_math(facts: Facts) -> tuple[str, str]:
    story = " ".join(math_sentences(facts))
    return f"{story} How many {facts['thing']} does {facts['name']} have?", f" {facts['answer']}."


# Logic grid: three people, three things, one each; exactly one assignment agrees with the clues.


def _draw_grid(rng: random.Random, level: int) -> Facts:
    names, things = rng.sample(NAMES, 3), rng.sample(THINGS, 3)
    order = rng.sample(names, 3)
    owns = dict(zip(order, rng.sample(things, 3), strict=True))
    a, b, c = order
    if level == 1:
        clues, asked = [[a, owns[a], True], [b, owns[b], True]], c
    elif level == 2:
        clues, asked = [[a, owns[a], True], [b, owns[c], False]], rng.choice((b, c))
    else:
        clues = [[a, owns[b], False], [a, owns[c], False], [b, owns[c], False]]
        asked = rng.choice(order)
    rng.shuffle(clues)
    return {"names": names, "things": things, "clues": clues, "asked": asked, "answer": owns[asked]}


def grid_premises(facts: Facts) -> str:
    """Who and what there is, and the clues."""
    (a, b, c), (x, y, z) = facts["names"], facts["things"]
    clues = " ".join(f"{n} has the {t}." if holds else f"{n} has no {t}." for n, t, holds in facts["clues"])
    return f"{a}, {b} and {c} have a {x}, a {y} and a {z}. {clues}"


def _grid(facts: Facts, form: int) -> tuple[str, str]:
    prompt = _pick(
        (
            "Fill the grid. {premises} Row {asked}:",
            "Logic grid. {premises} Row {asked}:",
            "Fill the table. {premises} Line {asked}:",
        ),
        form,
    ).format(premises=grid_premises(facts), asked=facts["asked"])
    return prompt, f" must own the {facts['answer']};"


def _plain_grid(facts: Facts) -> tuple[str, str]:
    return f"{grid_premises(facts)} What does {facts['asked']} have?", f" The {facts['answer']}."


_DRAW: dict[str, Callable[[random.Random, int], Facts]] = {
    "comparison": _draw_comparison,
    "sequence": _draw_sequence,
    "causal": _draw_causal,
    "math": _draw_math,
    "grid": _draw_grid,
}
_WORDING: dict[str, Callable[[Facts, int], tuple[str, str]]] = {
    "comparison": _comparison,
    "sequence": _sequence,
    "causal": _causal,
    "math": _math,
    "grid": _grid,
}
_PLAIN: dict[str, Callable[[Facts], tuple[str, str]]] = {
    "comparison": _plain_comparison,
    "sequence": _plain_sequence,
    "causal": _plain_causal,
    "math": _plain_math,
    "grid": _plain_grid,
}
