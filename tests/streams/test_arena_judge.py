"""The arena's judge against cases by hand: wrong answers that hold the right one, right ones in other words."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations

import pytest

from perdure.streams.arena import ALL_KINDS, ALL_LEVELS, Facts, Item, generate, judge, reading, rouge_l, scores
from perdure.streams.arena.item import normalise
from perdure.streams.arena.judge import stated, strict
from perdure.streams.arena.rouge import longest_common_subsequence

FACTS: dict[str, Facts] = {
    "comparison": {"scale": 0, "pairs": [["Anna", "Ben", False]], "most": True, "answer": "Anna"},
    "will": {"scale": 0, "pairs": [["Will", "Ben", False]], "most": True, "answer": "Will"},
    "causal": {
        "rules": [["the bell rings", "the dog barks"]],
        "start": "the bell rings",
        "chain": ["the bell rings", "the dog barks"],
        "answer": "the dog barks",
    },
    "grid": {
        "names": ["Anna", "Ben", "Cleo"],
        "things": ["cat", "dog", "hen"],
        "clues": [["Ben", "dog", True], ["Cleo", "hen", True]],
        "asked": "Anna",
        "answer": "cat",
    },
    "math": {"name": "Anna", "thing": "toys", "steps": [["has", 12], ["loses", 5]], "answer": 7},
    "thousand": {"name": "Anna", "thing": "toys", "steps": [["has", 1234]], "answer": 1234},
    "sequence": {"rule": "add", "terms": [30, 33, 36, 39], "answer": 42},
    "code": {"program": [["print", ["text", "catdog"]]], "answer": "catdog"},
    "passage": {
        "told": [["Anna", "master", "Ben"], ["Cleo", "master", "Dan"]],
        "start": "Anna",
        "path": ["master"],
        "answer": "Ben",
    },
    "summary": {
        "place": "Borvik",
        "day": "Monday",
        "events": [["On Monday", "the mine closed"], ["Long ago", "the bank closed"]],
        "order": [0, 1],
        "answer": "the mine closed",
    },
    "cipher": {"from": "Anna", "to": "Ben", "words": ["cat", "dog", "hen"], "answer": [0, 3, 7]},
    "operator": {"numbers": [3, 1], "answer": 7},
}
KIND = {"will": "comparison", "thousand": "math"}

# Each holds the right answer and is wrong.
WRONG: dict[str, tuple[str, ...]] = {
    "comparison": (
        " the one is not Anna!",
        "Anna or Ben",
        "Ben is shorter than Anna.",
        "It isn’t Anna.",
        "Annabel",
        "Anna's brother",
        "Anna-Maria",
        "Anyone but Anna.",
        "Neither Anna nor Ben",
        "Anna is the shortest.",
        "Ben. Anna is second.",
        "The answer is Ben, not Anna.",
        "Anna? The answer is Ben.",
        "The answer isn't Anna.",
        "The wrong answer is Anna.",
        "The answer is Anna. No, the answer is Ben.",
        "Anna. No, Ben.",
        "Anna, wait, no.",
        "Anna. Sorry, that is wrong.",
        "Is it Anna?",
        "It is not, I think, Anna.",
        "Everybody except Anna",
        "Anna and Max are the tallest.",
        "Anna/Ben",
        "Ben\nAnna",
        "Someone other than Anna.",
        "It cannot be Anna.",
        "Never Anna",
        "I doubt it is Anna.",
        "Anna is unlikely.",
        "",
    ),
    "will": ("it will be Ben", "that will do", "Ben will"),
    "causal": (
        " finally, the bell rings and the dog barks?",
        "The dog barks not.",
        "the dog barks, the cat runs",
        "the dog never barks",
        "the guard dog barks",
        "No, it is not that the dog barks.",
        "Does the dog barks?",
    ),
    "grid": (
        " must own the cat or the dog;",
        " has no cat;",
        "Ben has the cat.",
        "the catfish",
        "the dog, as Ben has the cat",
        "the cat. Wait, the dog.",
        "Anna has the dog, not the cat.",
    ),
    "math": (
        "12 minus 5",
        "17",
        "70",
        "7.5",
        "-7",
        "minus 7",
        "− 7",
        "7/2",
        "7th",
        "7%",
        "7²",
        "7½",
        "7,5",
        "07",
        "7 or 8",
        "12 - 5 = 8, close to 7",
        "7 dozen",
        "half of 7",
        "more than 7",
        "about 7",
        "close to 7",
        "up to 7",
        "near 7",
        "not 7",
        "7 apples",
        "Ben has 7",
        "7 = 12 - 4",
        "7 plus two",
        "7e3",
        "x7",
        "1,007",
        "7 - 5",
        "it is not so, 7",
        "12 - 5",
        "at least 7",
        "n != 7",
        "7 and seven tenths, say eight",
        "8. It makes 7.",
    ),
    "thousand": ("1,23,4", "1 234", "1.234", "12,34", "11,234", "1,2345"),
    "sequence": (
        "142",
        "4 2",
        "39, 42, 45",
        "the row is 30, 33, 36, 39, 42",
        "42 is wrong",
        "-42",
        "4200 / 100 = 42.0",
    ),
    "code": ("cat dog", "catdogs", "not catdog", "catdog or dogcat", "dogcat, catdog", "CATDOG", "the catdog runs"),
    "passage": ("Ben and Cleo", "Dan, not Ben", "Dan taught Ben", "Benjamin", "Nobody but Ben"),
    "summary": (
        "the mine never closed",
        "It is not true that the mine closed.",
        "The mine closed. No, the bank closed.",
        "Had the mine closed? Is it so that the mine closed?",
        "the goldmine closed",
        "the mine closedown",
        "The mine was closed long ago.",
    ),
    "cipher": (
        "3 0 7",
        "0 3",
        "0 3 7 7",
        "not 0 3 7",
        "0 3 7 1 5",
        "03 7",
        "0 7 3",
        "0 3 7.5",
        "0 3 17",
        "-0 3 7 or 0 3 8",
        "037",
        "0 3 7 17",
        "0 3 -7",
        "The code is not known, 0 3 7",
    ),
    "operator": ("3 # 1", "3 # 7 is it", "7 # 3 = 17", "8, not 7", "between 6 and 7"),
}
# Right, if not in the reference's very words.
RIGHT: dict[str, tuple[str, ...]] = {
    "comparison": (
        " the one is Anna!",
        "Anna",
        "anna.",
        "**Anna**",
        "“Anna”",
        "The tallest is ANNA",
        "The answer is Anna.",
        "Ben is shorter than Cleo. Anna is taller than Ben. So the answer is: Anna.",
        "Anna, not Ben.",
        "It is not Ben but Anna.",
        "Anna rather than Ben",
        "No, Anna.",
        "Sure! It's Anna.",
        "Answer:\nAnna",
        "Anna. Who is the shortest? Ben.",
        "Anna, no doubt.",
        "Without doubt Anna.",
        "Anna is the tallest. No one is taller.",
        "#### Anna",
    ),
    "will": (" the one is Will!", "WILL", "Will", "It will be Will."),
    "causal": (" finally, the dog barks?", "The dog barks.", "dog barks", "In the end, the dog barks!"),
    "grid": (" must own the cat;", "Anna has the cat.", "The cat", "cat", "Not the dog, the cat."),
    "math": (
        " it makes 7 in all",
        "7",
        "7.",
        "7 toys",
        "+7",
        "12 - 5 = 7",
        "Anna has 7 toys.",
        "12 - 5 = 7, so 7",
        "seven",
        "$7$",
        "\\boxed{7}",
        "The answer is 7.\n\nNext: 9",
        "not 8 but 7",
        "12 - 5 => 7",
    ),
    "thousand": ("1,234", "1234 toys", "It is 1,234."),
    "sequence": (" next comes 42", "42", "The next number: 42.", "(42)", "`42`"),
    "code": (" prints catdog", "catdog", '"catdog"', "The output is catdog.", "It prints 'catdog'"),
    "passage": (" we read Ben", "Anna was taught by Ben.", "Ben taught Anna", "ben"),
    "summary": (
        " in short, the mine closed in Borvik.",
        "On Monday the mine closed",
        "In Borvik the mine closed. Long ago the bank closed.",
        "THE MINE CLOSED",
        "There was soup, and the mine closed.",
    ),
    "cipher": (" code 0 3 7", "0, 3, 7", "CODE 0 3 7.", "cat is 0, dog is 3, hen is 7", "0 3 7 (as told)"),
    "operator": (" gives 7", "3 # 1 = 7", "It is 7"),
}
REFERENCE = {
    "comparison": " the one is Anna!",
    "summary": " in short, the mine closed in Borvik.",
}


def item(name: str) -> Item:
    return Item(KIND.get(name, name), 1, "", REFERENCE.get(name, ""), FACTS[name])


def misjudged(judge_it: Callable[[Item, str], bool]) -> list[tuple[str, str]]:
    found = [(name, text) for name, texts in WRONG.items() for text in texts if judge_it(item(name), text)]
    return found + [
        (name, text) for name, texts in RIGHT.items() for text in texts if not judge_it(item(name), text)
    ]


def test_wrong_answers_that_hold_the_right_one_and_right_ones_in_other_words() -> None:
    assert misjudged(stated) == []
    assert set(WRONG) == set(RIGHT) == set(FACTS)
    assert {KIND.get(name, name) for name in FACTS} == set(ALL_KINDS)


def test_there_are_enough_wrong_ones_and_most_hold_the_right_one() -> None:
    holding = [text for name, texts in WRONG.items() for text in texts if substring(item(name), text)]
    assert len(holding) >= 100


def substring(item: Item, completion: str) -> bool:
    answer = item.facts["answer"]
    wanted = " ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
    return wanted.casefold() in completion.casefold()


def last_number(item: Item, completion: str) -> bool:
    found = re.findall(r"-?\d+", completion)
    return bool(found) and found[-1] == str(item.facts["answer"])


def mutants(patch: pytest.MonkeyPatch) -> dict[str, Callable[[], None]]:
    """Wrong judges, each put in place of a part of the right one."""

    def never(text: str) -> re.Pattern[str]:
        return re.compile(r"(?!)")

    def any_length(text: str, candidates: tuple[str, ...]) -> list[str]:
        return [c for c in candidates if c.casefold() in text.casefold()]

    def digits(text: str) -> list[int | str]:
        return [int(n) for n in re.findall(r"-?\d+", text)]

    def last(text: str) -> list[int | str]:
        return digits(text)[-1:]

    right = reading.clauses

    def whole(completion: str, names: re.Pattern[str], everything: bool = False) -> list[list[reading.Clause]]:
        return right(completion, names, everything=True)

    def by_sentence(sentence: str, names: re.Pattern[str]) -> list[reading.Clause]:
        return [reading.Clause(sentence, reading._NEGATION.search(sentence) is not None)]

    def no_other(found, wanted, read, others, in_order, several):
        values = [v for clause in found if not clause.denied for v in read(clause.text)]
        return set(wanted) <= set(values)

    return {
        "no negation": lambda: patch.setattr(reading, "_NEGATION", never("")),
        "negation by sentence": lambda: patch.setattr(reading, "_clauses", by_sentence),
        "no taking back": lambda: patch.setattr(reading, "_TAKEN_BACK", never("")),
        "no lead-in": lambda: patch.setattr(reading, "_LEAD_IN", never("")),
        "questions state": lambda: patch.setattr(reading, "_QUESTION", never("")),
        "no openings": lambda: patch.setattr(reading, "_OPENINGS", never("")),
        "anybody but": lambda: patch.setattr(reading, "_ANYBODY_BUT", never("")),
        "no doubt denies": lambda: patch.setattr(reading, "_NO_DENIAL", never("")),
        "the whole text": lambda: patch.setattr(judge, "clauses", whole),
        "within words": lambda: patch.setattr(judge, "phrases", any_length),
        "all digits": lambda: patch.setattr(judge, "numbers", digits),
        "last number wins": lambda: patch.setattr(judge, "numbers", last),
        "number words do not count": lambda: patch.setattr(judge, "_NUMBER_WORDS", {}),
        "inexact is exact": lambda: patch.setattr(judge, "_INEXACT", frozenset()),
        "changed is unchanged": lambda: patch.setattr(judge, "_CHANGING", frozenset()),
        "no commas in thousands": lambda: patch.setattr(judge, "_WHOLE", re.compile(r"[+-]?[0-9]+")),
        "any other may be stated": lambda: patch.setattr(judge, "_states", no_other),
        "will in lower case": lambda: patch.setattr(judge, "_COMMON", frozenset()),
    }


NAMES_OF_MUTANTS = tuple(mutants(pytest.MonkeyPatch()))


@pytest.mark.parametrize("name", NAMES_OF_MUTANTS)
def test_a_wrong_part_of_the_judge_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutants(monkeypatch)[name]()
    assert misjudged(judge.stated)


@pytest.mark.parametrize("wrong", [substring, last_number, strict, lambda item, completion: True])
def test_a_wrong_judge_is_caught(wrong: Callable[[Item, str], bool]) -> None:
    assert misjudged(wrong)


def test_others_are_caught_where_they_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another person's 7, other things, the other end of the line: without `others` these count as right."""
    monkeypatch.setattr(judge, "kind_of", lambda name: _without_others(name))
    assert {("comparison", "Anna is the shortest."), ("math", "Ben has 7"), ("grid", "Ben has the cat.")} <= set(
        misjudged(stated)
    )


def _without_others(name: str):
    from dataclasses import replace

    from perdure.streams.arena.kinds import kind_of

    return replace(kind_of(name), others=lambda facts: ())


def test_the_longest_candidate_is_the_one_stated() -> None:
    candidates = ("the dog barks", "the dog barks loudly", "the cat")
    assert judge.phrases("the dog barks loudly", candidates) == ["the dog barks loudly"]
    assert judge.phrases("The dog barks, the cat", candidates) == ["the dog barks", "the cat"]
    assert judge.phrases("dog barks", candidates) == ["the dog barks"]
    assert judge.phrases("now dog barks", candidates) == []


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_reference_is_right_and_every_other_items_is_wrong(kind: str) -> None:
    for level in ALL_LEVELS:
        items = generate(kind, 7, 3, level=level, forms=12)
        for one in items:
            assert strict(one, f"\n{one.answer.replace(' ', '  ')} "), one
            assert stated(one, one.answer), one
            assert scores(one, one.answer) == dict.fromkeys(scores(one, ""), 1.0)
            for other in items:
                if other.facts["answer"] != one.facts["answer"]:
                    assert not strict(one, other.answer), (one, other.answer)
                    assert not stated(one, other.answer), (one, other.answer)


def test_candidates_hold_the_answer() -> None:
    for kind in ALL_KINDS:
        for one in generate(kind, 30, 5, forms=12):
            answer = one.facts["answer"]
            if one.candidates:
                assert set(answer if isinstance(answer, list) else [answer]) <= set(one.candidates)


def test_strict_wants_the_whole_text() -> None:
    one = item("comparison")
    assert strict(one, "the  one is\nAnna!")
    assert not any(
        strict(one, text) for text in ("Anna", "the one is anna!", "the one is Anna", "the one is Anna!!")
    )


def by_all_subsequences(first: list[str], second: list[str]) -> int:
    for length in range(len(first), 0, -1):
        wanted = {tuple(first[i] for i in at) for at in combinations(range(len(first)), length)}
        if wanted & {tuple(second[i] for i in at) for at in combinations(range(len(second)), length)}:
            return length
    return 0


def common_words(first: list[str], second: list[str]) -> int:
    return len(set(first) & set(second))


def common_run(first: list[str], second: list[str]) -> int:
    runs = {tuple(first[i:j]) for i in range(len(first)) for j in range(i + 1, len(first) + 1)}
    other = {tuple(second[i:j]) for i in range(len(second)) for j in range(i + 1, len(second) + 1)}
    return max((len(run) for run in runs & other), default=0)


@pytest.mark.parametrize(
    ("rule", "right"), [(longest_common_subsequence, True), (common_words, False), (common_run, False)]
)
def test_the_longest_common_subsequence_against_all_subsequences(rule, right: bool) -> None:
    rng = random.Random(0)
    pairs = [[rng.choices("abc", k=rng.randint(0, 7)) for _ in range(2)] for _ in range(150)]
    assert all(rule(a, b) == by_all_subsequences(a, b) for a, b in pairs) is right


def test_rouge_l_by_hand() -> None:
    """Against "in short the mine closed in borvik" (7 words).

    "the mine in Borvik closed" (5 words): in order "the mine in borvik", 4 words ("the mine closed" has 3), so
    P = 4/5, R = 4/7, F1 = 2 · 4 / (5 + 7) = 2/3. "closed mine": one word, P = 1/2, R = 1/7, F1 = 2/9.
    """
    reference = " in short, the mine closed in Borvik."
    assert rouge_l("The mine in Borvik closed!", reference) == pytest.approx(float(Fraction(2, 3)), abs=1e-12)
    assert rouge_l("closed mine", reference) == pytest.approx(float(Fraction(2, 9)), abs=1e-12)
    assert rouge_l("", reference) == rouge_l("!", reference) == 0.0
    assert rouge_l(normalise(reference), reference) == 1.0
    told = scores(item("summary"), "the mine closed")
    assert told == {"exact_match": 0.0, "stated": 1.0, "rouge_l": pytest.approx(0.6, abs=1e-12)}
