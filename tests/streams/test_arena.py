"""The arena: seeded, distinct, solved again by independent means."""

import re
from itertools import pairwise, permutations

import pytest

from perdure.streams import arena
from perdure.streams.arena import KINDS, Item, generate, normalise, plain, split


@pytest.fixture(scope="module")
def items() -> dict[str, list[Item]]:
    return {kind: generate(kind, 300, seed=7) for kind in KINDS}


def solve_comparison(text: str) -> str:
    """The one person who is never on the losing side of the question's scale."""
    scale = next(s for s in arena.SCALES if s[2] in text or s[3] in text)
    pairs = re.findall(r"(\w+) is (\w+) than (\w+)\.", text)
    greater = [(a, b) if word == scale[0] else (b, a) for a, word, b in pairs]
    people = {name for pair in greater for name in pair}
    side = 1 if scale[2] in text else 0
    (best,) = people - {pair[side] for pair in greater}
    return best


def solve_sequence(text: str) -> str:
    """The next term by differences: constant, constant second differences, doubling, or two steps in turn."""
    terms = [int(n) for n in re.findall(r"\d+", text)]
    steps = [b - a for a, b in pairwise(terms)]
    bends = [b - a for a, b in pairwise(steps)]
    if len(set(bends)) == 1:
        return str(terms[-1] + steps[-1] + bends[-1])
    if all(b == 2 * a for a, b in pairwise(terms)):
        return str(2 * terms[-1])
    assert all(a == b for a, b in zip(steps, steps[2:], strict=False)), text
    return str(terms[-1] + steps[-2])


def solve_causal(text: str) -> str:
    """Follow the rules from the event that is told without a "when"."""
    rules = dict(re.findall(r"When (the \w+ \w+), (the \w+ \w+)\.", text))
    rest = re.sub(r"When [^.]*\.", "", text).lower()
    (event,) = [event for event in arena.EVENTS if event in rest]
    while event in rules:
        event = rules[event]
    return event


def solve_math(text: str) -> str:
    """Add and take away what the sentences say."""
    if bags := re.search(r"has (\d+) bags with (\d+)", text):
        total = int(bags[1]) * int(bags[2])
    else:
        total = int(re.search(r"has (\d+) ", text)[1])
    total += sum(int(n) for n in re.findall(r"gets (\d+) more", text))
    return str(total - sum(int(n) for n in re.findall(r"loses (\d+)", text)))


def solve_grid(text: str) -> str:
    """Try all assignments against the clues in the text; exactly one may remain."""
    names = re.search(r"(\w+), (\w+) and (\w+) have a", text).groups()
    things = re.search(r"have an? (\w+), an? (\w+) and an? (\w+)\.", text).groups()
    clues = [(n, how == "the", t) for n, how, t in re.findall(r"(\w+) has (the|no) (\w+)\.", text)]
    fits = [
        dict(zip(names, order, strict=True))
        for order in permutations(things)
        if all((dict(zip(names, order, strict=True))[n] == t) == holds for n, holds, t in clues)
    ]
    assert len(fits) == 1, text
    asked = re.findall(r"\w+", text.split(".")[-1])
    return fits[0][next(name for name in asked if name in names)]


SOLVE = {
    "comparison": solve_comparison,
    "sequence": solve_sequence,
    "causal": solve_causal,
    "math": solve_math,
    "grid": solve_grid,
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_agree_with_an_independent_solver(kind: str, items: dict[str, list[Item]]) -> None:
    for item in items[kind]:
        expected = SOLVE[kind](item.prompt)
        assert re.search(rf"\b{expected}\b", item.answer), item
        prompt, answer = plain(item)
        assert SOLVE[kind](prompt).lower() == answer.strip(" .").lower().removeprefix(
            "the " if kind == "grid" else ""
        )


@pytest.mark.parametrize("kind", KINDS)
def test_items_are_seeded_distinct_and_of_all_levels(kind: str, items: dict[str, list[Item]]) -> None:
    assert items[kind] == generate(kind, 300, seed=7)
    assert items[kind] != generate(kind, 300, seed=8)
    assert len({normalise(item.prompt) for item in items[kind]}) == 300
    assert len({item.key for item in items[kind]}) == 300
    assert {item.level for item in items[kind]} == {1, 2, 3}
    assert {item.level for item in generate(kind, 20, seed=7, level=2)} == {2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_training_and_evaluation_share_no_problem(kind: str, seed: int) -> None:
    train, evaluate = split(kind, 400, 100, seed)
    assert (len(train), len(evaluate)) == (400, 100)
    for text in (lambda item: normalise(item.prompt), lambda item: normalise(plain(item)[0])):
        assert not {text(item) for item in train} & {text(item) for item in evaluate}


def test_the_answer_starts_with_the_space_and_the_prompt_does_not_end_with_one(
    items: dict[str, list[Item]],
) -> None:
    for item in (item for kind in KINDS for item in items[kind]):
        for prompt, answer in ((item.prompt, item.answer), plain(item)):
            assert prompt == prompt.strip()
            assert answer[0] == " "
            assert answer[1:] == answer.strip()


def test_each_kind_has_an_answer_style_of_its_own(items: dict[str, list[Item]]) -> None:
    first_words = {kind: {item.answer.split()[0] for item in items[kind]} for kind in KINDS}
    assert all(len(words) == 1 for words in first_words.values())
    assert len(set.union(*first_words.values())) == len(KINDS)


def test_grids_with_one_clue_missing_have_more_solutions() -> None:
    """Two people known of three: one grid. Only one known: the other two can swap, so two grids."""
    names, things = ["Anna", "Ben", "Cleo"], ["cat", "dog", "hen"]
    clues = [("Anna", "cat", True), ("Ben", "dog", True)]
    assert arena.solutions(names, things, clues) == [{"Anna": "cat", "Ben": "dog", "Cleo": "hen"}]
    assert len(arena.solutions(names, things, clues[:1])) == 2


def test_sequence_terms_by_hand() -> None:
    """grow from 1 by 2: 1, 1+2, 3+3, 6+4; squares from 2 plus 1: 5, 10, 17; alternate +1 +4: 3, 4, 8, 9."""
    assert arena.sequence_terms("grow", 1, (2, 0), 4) == [1, 3, 6, 10]
    assert arena.sequence_terms("squares", 1, (2, 0), 3) == [5, 10, 17]
    assert arena.sequence_terms("alternate", 3, (1, 4), 4) == [3, 4, 8, 9]


def test_row_and_key_follow_the_text_alone() -> None:
    (item,) = generate("math", 1, seed=0)
    assert set(item.row()) == {"id", "kind", "level", "prompt", "answer"}
    shouted = Item(item.kind, item.level, f"  {item.prompt.upper()} ", item.answer, {})
    assert shouted.key == item.key


def test_normalise_keeps_signs_that_carry_meaning() -> None:
    assert normalise(" Who is\nthe  TALLEST?") == "who is the tallest"
    assert normalise("7 + 5 =") != normalise("7 - 5 =")


def test_excluded_texts_do_not_come_up(items: dict[str, list[Item]]) -> None:
    taken = frozenset(normalise(item.prompt) for item in items["grid"])
    assert not taken & {normalise(item.prompt) for item in generate("grid", 300, seed=7, exclude=taken)}


def test_errors_name_what_exists() -> None:
    with pytest.raises(ValueError, match=r"'chess'.*comparison, sequence, causal, math, grid"):
        generate("chess", 1, 0)
    with pytest.raises(ValueError, match="level must be"):
        generate("math", 1, 0, level=9)
    with pytest.raises(
        ValueError, match=r"'sequence' at level 1 cannot supply 100000 distinct items: \d+ were found"
    ):
        generate("sequence", 100_000, 0, level=1)
