"""All kinds, levels and wordings of the arena: solved again from the text alone, unambiguous, kept apart."""

from __future__ import annotations

import io
import random
import re
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import pairwise, permutations, product

import pytest

from perdure.streams import arena
from perdure.streams.arena import (
    ALL_KINDS,
    ALL_LEVELS,
    ASK,
    IN_PRETRAINING,
    KIND_BY_NAME,
    KINDS,
    Item,
    check_disjoint,
    continuations,
    generate,
    partition,
    sequence_terms,
    split,
    wording,
)
from perdure.streams.arena.code import printed
from perdure.streams.arena.grid import solutions
from perdure.streams.arena.item import canonical
from perdure.streams.arena.passage import replies
from perdure.streams.arena.summary import news_of

NEW = tuple(kind for kind in ALL_KINDS if kind not in KINDS)


@pytest.fixture(scope="module")
def items() -> dict[str, list[Item]]:
    return {kind: [i for n in ALL_LEVELS for i in generate(kind, 15, 7, n, forms=12)] for kind in ALL_KINDS}


def solve_comparison(text: str) -> str:
    """Everyone who stands at the end asked for in some order of all people that agrees with every pair."""
    scale = next(s for s in arena.SCALES if s[2] in text or s[3] in text)
    told = re.findall(r"(\w+) is (\w+) than (\w+)\.", text)
    above = [(a, b) if word == scale[0] else (b, a) for a, word, b in told]
    people = sorted({name for pair in above for name in pair})
    orders = [o for o in permutations(people) if all(o.index(a) < o.index(b) for a, b in above)]
    (best,) = {order[0 if scale[2] in text else -1] for order in orders}
    return best


def solve_sequence(text: str) -> str:
    """The next term by differences of some kind: constant, of second order, a ratio, in turn, sums, two rows."""
    terms = [int(n) for n in re.findall(r"\d+", text)]
    steps = [b - a for a, b in pairwise(terms)]
    bends = [b - a for a, b in pairwise(steps)]
    if len(set(bends)) == 1:
        return str(terms[-1] + steps[-1] + bends[-1])
    if all(a == b for a, b in zip(steps, steps[2:], strict=False)):
        return str(terms[-1] + steps[-2])
    if all(c == a + b for a, b, c in zip(terms, terms[1:], terms[2:], strict=False)):
        return str(terms[-1] + terms[-2])
    if steps[0] and all(b * steps[0] == a * steps[1] for a, b in pairwise(steps)):
        return str(terms[-1] + steps[-1] * steps[1] // steps[0])
    rows = terms[::2], terms[1::2]
    assert all(len({b - a for a, b in pairwise(row)}) == 1 for row in rows), text
    row = rows[len(terms) % 2]
    return str(row[-1] + row[1] - row[0])


def solve_causal(text: str) -> str:
    rules = re.findall(r"When (the \w+ \w+), (the \w+ \w+)\.", text)
    assert len({cause for cause, _ in rules}) == len(rules)
    rest = re.sub(r"When [^.]*\.", "", text).lower()
    (event,) = [event for event in arena.EVENTS if event in rest]
    while event in dict(rules):
        event = dict(rules)[event]
    return event


def solve_math(text: str) -> str:
    if bags := re.search(r"has (\d+) bags with (\d+)", text):
        total = int(bags[1]) * int(bags[2])
    else:
        total = int(re.search(r"has (\d+) ", text)[1])
    total += sum(int(n) for n in re.findall(r"gets (\d+) more", text))
    return str(total - sum(int(n) for n in re.findall(r"loses (\d+)", text)))


def solve_grid(text: str) -> str:
    found = re.search(r"((?:\w+, )*\w+ and \w+) have ((?:an? \w+, )*an? \w+ and an? \w+)\.", text)
    names = re.findall(r"\w+", found[1].replace(" and ", " "))
    things = re.findall(r"an? (\w+)", found[2])
    clues = [(n, how == "the", t) for n, how, t in re.findall(r"(\w+) has (the|no) (\w+)\.", text)]
    grids = [dict(zip(names, order, strict=True)) for order in permutations(things)]
    (grid,) = [grid for grid in grids if all((grid[n] == t) == holds for n, holds, t in clues)]
    asked = re.findall(r"\w+", text.split(".")[-1])
    return grid[next(name for name in asked if name in names)]


def solve_code(text: str) -> str:
    """What Python prints when it runs the lines between the first and the last."""
    program = "\n".join(text.split("\n")[1:-1])
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(program, "program", "exec"), {"__builtins__": {"print": print, "range": range, "len": len}})
    return out.getvalue().rstrip("\n")


def solve_passage(text: str) -> str:
    """The question read from its words, the innermost name first."""

    def one(pattern: str) -> str:
        (found,) = re.findall(pattern, text)
        return found

    def read(name: str) -> str:
        if found := re.fullmatch(r"the town where (.*) lives", name):
            return one(rf"{read(found[1])} lives in (\w+)\.")
        if found := re.fullmatch(r"the one who taught (.*)", name):
            return one(rf"{read(found[1])} was taught by (\w+)\.")
        if found := re.fullmatch(r"the mayor of (.*)", name):
            return one(rf"The mayor of {read(found[1])} is (\w+)\.")
        return name

    asked = (
        (r"Where does ([\w ]+) live\?", r"{} lives in (\w+)\."),
        (r"What is the trade of ([\w ]+)\?", r"{} is a (\w+)\."),
        (r"When was ([\w ]+) born\?", r"{} was born in (\d+)\."),
        (r"Who taught ([\w ]+)\?", r"{} was taught by (\w+)\."),
        (r"Who is the mayor of ([\w ]+)\?", r"The mayor of {} is (\w+)\."),
        (r"On which river lies ([\w ]+)\?", r"{} lies on the (\w+)\."),
        (r"When was ([\w ]+) founded\?", r"{} was founded in (\d+)\."),
    )
    (answer,) = [
        one(told.format(read(found[1]))) for question, told in asked if (found := re.search(question, text))
    ]
    return answer


def solve_summary(text: str) -> str:
    day = re.search(r"Report of (\w+) from", text)[1]
    (news,) = re.findall(rf"On {day} ([^.]*)\.", text)
    return news


def solve_operator(text: str) -> str:
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    total = numbers[0]
    for number in numbers[1:]:
        total = total + total + number
    return str(total)


SOLVE: dict[str, Callable[[str], str]] = {
    "comparison": solve_comparison,
    "sequence": solve_sequence,
    "causal": solve_causal,
    "math": solve_math,
    "grid": solve_grid,
    "code": solve_code,
    "passage": solve_passage,
    "summary": solve_summary,
    "operator": solve_operator,
}


@pytest.mark.parametrize("kind", SOLVE)
def test_answers_agree_with_a_solver_that_reads_the_prompt(kind: str, items: dict[str, list[Item]]) -> None:
    for item in items[kind]:
        assert SOLVE[kind](item.prompt) == str(item.facts["answer"]), item
        assert str(item.facts["answer"]) in re.findall(r"-?\w+", item.answer) or kind in ("causal", "summary")


def test_the_code_can_be_learnt_from_training_items() -> None:
    """The book that training items tell, noun by noun, decodes every held-out item, none of which was seen."""
    train, held = split("cipher", 120, 60, 0, levels=(2, 3))
    book: dict[str, set[str]] = {}
    for item in train:
        nouns = [word for word in re.findall(r"\w+", item.prompt) if word in arena.THINGS]
        for noun, code in zip(nouns, item.answer.split()[1:], strict=True):
            book.setdefault(noun, set()).add(code)
    assert len(book) == 10
    assert all(len(codes) == 1 for codes in book.values())
    assert len(set.union(*book.values())) == 10
    for item in held:
        nouns = [word for word in re.findall(r"\w+", item.prompt) if word in book]
        assert item.answer == " code " + " ".join(min(book[noun]) for noun in nouns)


def without_brackets(program: list) -> str:
    from perdure.streams.arena import code

    return re.sub(r"(?<![a-z])\((\w+ [*+-] \w+)\)", r"\1", code.text_of(program))


def test_an_inner_sum_stands_in_brackets() -> None:
    """2 · (3 + 4) = 14; without the brackets Python makes 10 of it."""
    program = [["=", "a", ["*", 2, ["+", 3, 4]]], ["print", ["name", "a"]]]
    assert printed(program) == [14]
    assert solve_code(f"\n{arena.KIND_BY_NAME['code'].told({'program': program})['program']}\n") == "14"
    assert solve_code(f"\n{without_brackets(program)}\n") == "10"


def all_continuations(terms: list[int]) -> set[int]:
    """Every rule with every pair of steps in range, nothing left out; two rows as two rows of constant steps."""
    found = set()
    first, second = range(-100, 101), range(-40, 41)
    ranges = {
        "grow by": (first, second),
        "alternate": (first, first),
        "scale": (first, range(2, 6)),
        "sum": (first,),
    }
    for rule, steps in ranges.items():
        for some in product(*steps):
            row = sequence_terms(rule, terms[0], some, len(terms) + 1)
            if row[:-1] == terms:
                found.add(row[-1])
    rows = terms[::2], terms[1::2]
    if len(terms) >= 6 and all(len({b - a for a, b in pairwise(row)}) == 1 for row in rows):
        row = rows[len(terms) % 2]
        found.add(row[-1] + row[1] - row[0])
    return found


def test_rows_have_one_continuation_and_the_search_leaves_out_none() -> None:
    for level in ALL_LEVELS:
        for item in generate("sequence", 40, 2, level):
            assert continuations(item.facts["terms"]) == {item.facts["answer"]}, item
    for terms in [item.facts["terms"] for item in generate("sequence", 1, 3, 5)] + [[1, 2, 4], [5, 5, 5, 5]]:
        assert continuations(terms) == all_continuations(terms)


def test_a_short_row_has_three_continuations() -> None:
    """1, 2, 4 is 1 + 1 + 2 + 3 (7), 1 + 1 + 2 + 1 in turn (5), and doubling (8)."""
    assert continuations([1, 2, 4]) == {5, 7, 8}


@pytest.mark.parametrize(
    ("general", "special"),
    [
        (("grow by", 5, (3, 0)), ("add", 5, (3,))),
        (("grow by", 5, (3, 1)), ("grow", 5, (3, 0))),
        (("grow by", 4 + 3, (5, 2)), ("squares", 3, (2, 0))),
        (("scale", 3, (3, 2)), ("double", 3, (0, 0))),
        (("alternate", 3, (4, -4)), ("weave", 3, (4, 0))),
    ],
)
def test_the_older_rules_are_cases_of_the_searched_ones(general, special) -> None:
    """Squares from 2 plus 3: 7, 12, 19, 28; so they begin at 4 + 3, step 5, and the step grows by 2."""
    assert sequence_terms(*general, 7) == sequence_terms(*special, 7)


def test_new_sequence_rules_by_hand() -> None:
    """scale from 2, step 3 doubled: 2, 5, 11, 23; sum from 2, 2 + 3: 2, 5, 7, 12; two rows 1, 2, … and 9, 6, …"""
    assert sequence_terms("scale", 2, (3, 2), 4) == [2, 5, 11, 23]
    assert sequence_terms("sum", 2, (3,), 4) == [2, 5, 7, 12]
    assert sequence_terms("two rows", 1, (8, 1, -3), 6) == [1, 9, 2, 6, 3, 3]
    assert sequence_terms("grow by", 1, (2, 3), 4) == [1, 3, 8, 16]


@pytest.mark.parametrize(
    ("module", "kind", "name", "broken"),
    [
        ("grid", "grid", "solutions", lambda names, things, clues: [{}, {}]),
        ("passage", "passage", "replies", lambda told, *_: {"Anna"} if len(told) < 4 else {"Anna", "Ben"}),
        ("summary", "summary", "news_of", lambda facts: []),
    ],
)
def test_an_ambiguous_draw_does_not_come_out(module, kind, name, broken, monkeypatch) -> None:
    monkeypatch.setattr(f"perdure.streams.arena.{module}.{name}", broken)
    with pytest.raises(AssertionError, match="exactly one"):
        arena.draw(kind, 3, random.Random(0))


def test_the_solvers_see_ambiguity() -> None:
    assert len(solutions(["Anna", "Ben"], ["cat", "dog"], [])) == 2
    told = [["Anna", "home", "Borvik"], ["Anna", "home", "Cardan"], ["Ben", "home", "Kelby"]]
    assert replies(told, "Anna", ["home"]) == {"Borvik", "Cardan"}
    assert replies([*told[:1], ["Borvik", "mayor", "Ben"]], "Anna", ["home", "mayor"]) == {"Ben"}
    assert replies(told, "Cleo", ["home"]) == set()
    events = [["On Monday", "the mine closed"], ["On Monday", "the dam broke"], ["Long ago", "the bank closed"]]
    assert len(news_of({"day": "Monday", "events": events})) == 2


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_twelve_wordings_ask_the_same(kind: str) -> None:
    for facts in (item.facts for item in generate(kind, 9, 3, levels=ALL_LEVELS)):
        asked = [wording(kind, facts, form, None) for form in range(12)]
        assert len({arena.normalise(prompt) for prompt, _ in asked}) == 12
        assert len({answer for _, answer in asked}) == 1
        assert [wording(kind, facts, form) for form in range(3)] == asked[:3]
        if kind in SOLVE:
            assert {SOLVE[kind](prompt + ASK) for prompt, _ in asked} == {str(facts["answer"])}


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_forms_and_levels_are_those_asked_for(kind: str) -> None:
    found = generate(kind, 30, 5, levels=(2, 4, 5), forms=12)
    assert Counter(item.level for item in found) == {2: 10, 4: 10, 5: 10}
    used = Counter(_form(item) for item in found)
    assert len(used) > 6
    assert {_form(item) for item in generate(kind, 30, 5)} <= {0, 1, 2}
    assert {item.level for item in generate(kind, 6, 5, level=4)} == {4}
    assert all(item.prompt.endswith(ASK) and item.prompt == item.prompt.strip() for item in found)
    assert all(item.answer[0] == " " and item.answer[1:] == item.answer.strip() for item in found)


def _form(item: Item) -> int:
    (form,) = [n for n in range(12) if wording(item.kind, item.facts, n, None)[0] + ASK == item.prompt]
    return form


def test_the_problems_are_the_same_in_any_number_of_wordings() -> None:
    few, many = (generate("grid", 40, 1, forms=forms) for forms in (3, None))
    assert [item.facts for item in few] == [item.facts for item in many]


def test_each_kind_has_an_answer_style_of_its_own(items: dict[str, list[Item]]) -> None:
    first_words = {kind: {item.answer.split()[0] for item in items[kind]} for kind in ALL_KINDS}
    assert all(len(words) == 1 for words in first_words.values())
    assert len(set.union(*first_words.values())) == len(ALL_KINDS)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_training_and_evaluation_share_no_problem_in_any_wording(kind: str) -> None:
    train, held = split(kind, 150, 50, 0, levels=ALL_LEVELS, forms=12, apart=True)
    assert (len(train), len(held)) == (150, 50)
    assert not {item.key for item in train} & {item.key for item in held}
    assert not {canonical(kind, item.facts) for item in train} & {canonical(kind, item.facts) for item in held}
    other = wording(kind, train[0].facts, _form(train[0]) + 1, None)[0] + ASK
    leaked = replace(train[0], prompt=other)
    with pytest.raises(AssertionError, match="share 1 texts"):
        check_disjoint(train, [*held, leaked])


def test_rows_that_begin_alike_are_kept_apart_on_request() -> None:
    starts = [
        {tuple(item.facts["terms"][:4]) for item in part} for part in split("sequence", 300, 100, 0, apart=True)
    ]
    assert not starts[0] & starts[1]
    short, long = (
        Item("sequence", 1, f"{terms}{ASK}", f" next comes {terms[-1]}", {"terms": terms[:-1], "answer": terms[-1]})
        for terms in ([2, 4, 6, 8, 10], [2, 4, 6, 8, 10, 12])
    )
    check_disjoint([short], [long])
    with pytest.raises(AssertionError, match="kin"):
        check_disjoint([short], [long], apart=True)


@pytest.mark.parametrize("kind", NEW)
def test_facts_have_one_part_of_the_world_in_any_order(kind: str) -> None:
    rng = random.Random(2)
    drawn = [arena.draw(kind, 1 + n % 5, rng) for n in range(160)]
    assert {partition(kind, facts) for facts in drawn} == {"arena", "probe", "corpus"}
    if kind in ("passage", "summary"):
        listed = "told" if kind == "passage" else "order"
        for facts in drawn:
            turned = {**facts, listed: facts[listed][::-1]}
            assert partition(kind, turned) == partition(kind, facts)
            assert canonical(kind, turned) == canonical(kind, facts)


def test_nano_met_only_the_first_five() -> None:
    assert IN_PRETRAINING == KINDS == ALL_KINDS[:5]
    assert {kind for kind in ALL_KINDS if KIND_BY_NAME[kind].plain is not None} == set(KINDS)
    assert all((KIND_BY_NAME[kind].plain is None) != (KIND_BY_NAME[kind].canonical is None) for kind in ALL_KINDS)
    (item,) = generate("cipher", 1, 0)
    with pytest.raises(ValueError, match="'cipher' has no plain wording: nano met no such problem"):
        arena.plain(item)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": 6}, "level must be one of 1, 2, 3, 4, 5"),
        ({"levels": ()}, "levels is empty"),
        ({"levels": (1, 7)}, "got 7"),
        ({"levels": (1, 1)}, "levels must differ"),
        ({"forms": 13}, "forms must be 1 to 12"),
        ({"forms": 0}, "forms must be 1 to 12"),
        ({"count": -1}, "0 or more"),
        ({"kind": "operator", "count": 99, "level": 1}, "'operator' at level 1 cannot supply 99"),
    ],
)
def test_what_cannot_be_is_refused(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**{"kind": "grid", "count": 1, "seed": 0, **settings})
