"""Rules for answers against cases by hand, and against what published solutions say of themselves."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from perdure.streams import answers
from perdure.streams.answers import RULES, Rule, words_of
from perdure.streams.latex import boxed, final_answer, normal_form

Score = Callable[[str, str], dict[str, float]]

# answer, reference, right
PLAIN = [
    (" 12", "12", True),
    ("a  b\n", "a b", True),
    ("a b", "ab", False),
    ("12.", "12", False),
    ("Yes", "yes", False),
    ("the answer is 12", "12", False),
    ("", " ", True),
    ("été", "ete", False),
]
MATH = [
    (r"so \boxed{12}.", r"hence $\boxed{12}$", True),
    (r"\boxed{112}", r"\boxed{12}", False),
    (r"\boxed{12} is wrong, so \boxed{13}", r"\boxed{13}", True),
    (r"\boxed{12} is wrong, so \boxed{13}", r"\boxed{12}", False),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\boxed{\frac1{\sqrt2}}", True),
    (r"\boxed{12} and then \boxed{12", r"\boxed{12}", False),
    (r"\boxed{\{1\}", r"\boxed{\{1\}}", False),
    (r"\fbox{5}", r"\boxed{5}", True),
    (r"$\boxed 5$ is it", r"\boxed{5}", True),
    ("12 is what comes out", r"\boxed{12}", False),
    ("The answer is 12. That is all.", r"\boxed{12}", True),
    ("First the answer is 11, but the answer is: $12$.", r"\boxed{12}", True),
    ("The answer is 12 or 13.", r"\boxed{12}", False),
    ("ANSWER: 3.5", r"\boxed{3.5}", True),
    ("work\n#### 1,000\n", r"\boxed{1000}", True),
    (r"the answer is 11, \boxed{12}", r"\boxed{12}", True),
    ("12", "12", True),
    ("so 12", "12", False),
    (r"so \boxed{12}", "12", True),
    ("12", r"\boxed{12}", False),
    (r"$5\text{ cm}$.", "5.", True),
    ("12.0", "12", False),
    ("1/2", r"\frac{1}{2}", True),
    ("0.5", r"\frac{1}{2}", True),
    ("0.25", r"\frac{1}{4}", False),
    (r"-\frac12", "-1/2", True),
    (r"\dfrac{3}{4}", r"\tfrac34", True),
    (r"\frac{\frac12}3", r"\frac{\frac{1}{2}}{3}", True),
    (r"\frac{12}{3}", r"\frac{1}{23}", False),
    (r"\sqrt3", r"\sqrt{3}", True),
    (r"\sqrt[3]{2}", r"\sqrt{2}", False),
    (r"\left( 1,\, 2 \right)", "(1,2)", True),
    (r"x\leftarrow y", r"xarrow y", False),
    (r"10\text{ cm}^2", "10", True),
    (r"\text{Monday}", "Monday", True),
    (r"\text{Monday}", r"\text{Tuesday}", False),
    (r"x \text{ is even}", r"x \text{ is odd}", False),
    (r"90^\circ", "90", True),
    (r"90^{\circ}", "90°", True),
    (r"\$1{,}250.50", "1250.50", True),
    (r"10,\!000", "10000", True),
    ("(1,000)", "(1000)", False),
    ("1,20", "120", False),
    ("45, 135, 225", "45135225", False),
    (r"\frac{1}{29,\!322}", r"\frac{1}{29322}", True),
    (r"50\%", "50", True),
    ("x = 5", "5", True),
    ("f(x) = 5", "5", False),
    (".5x", "0.5x", True),
    ("x+1", "1+x", False),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
    ("Ω²", "Ω²", True),
    ("", "12", False),
    ("", r"\boxed{12}", False),
    (r"\boxed{}", r"\boxed{12}", False),
    ("", "", True),
]
# answer, reference, exact match, F1
HOTPOT = [
    ("The Beatles", "beatles", 1, 1),
    ("yes", "Yes.", 1, 1),
    ("yes", "yes it is", 0, 0),
    ("no", "yes", 0, 0),
    ("the noanswer", "a noanswer of it", 0, 0),
    ("yes it is", "yes she is", 0, 2 / 3),
    ("the red house in Paris", "a red house, London", 0, 4 / 7),
    ("new new york", "New York, New York", 0, 6 / 7),
    ("October 1922 in Moscow", "October 1922", 0, 2 / 3),
    ("Theatre", "atre", 0, 0),
    ("U.S.", "us", 1, 1),
    ("re-elected", "reelected", 1, 1),
    ("ÉCOLE", "école", 1, 1),
    ("“yes”", "yes", 0, 0),
    ("", "paris", 0, 0),
    ("the", "", 1, 0),
]


def wrong(rules: dict[str, Rule]) -> list[tuple[str, str, str]]:
    """The cases that these rules score otherwise than they should."""
    out = []
    for name, cases in (("plain", PLAIN), ("math", MATH)):
        for answer, reference, right in cases:
            if rules[name].score(answer, reference) != {"exact_match": float(right)}:
                out.append((name, answer, reference))
    for answer, reference, same, f1 in HOTPOT:
        if rules["hotpot"].score(answer, reference) != {"exact_match": same, "f1": pytest.approx(f1, abs=1e-12)}:
            out.append(("hotpot", answer, reference))
    return out


def test_rules_against_cases_by_hand() -> None:
    """F1 by hand, with P and R of the words that are left.

    "red house in paris" against "red house london": 2 in common, P = 2/4, R = 2/3, so 2·(1/2)(2/3) / (7/6) = 4/7.
    "new new york" against "new york new york": "new" twice and "york" once in common, P = 3/3, R = 3/4, so 6/7; as
    sets they would be the same. "october 1922 in moscow" against "october 1922": P = 2/4, R = 2/2, so 2/3.
    "yes it is" against "yes she is" is no answer of the closed kind: P = R = 2/3. "“" is not ASCII punctuation, so
    "“yes”" is another word than "yes".
    """
    assert wrong(RULES) == []


def no_yes_case(answer: str, reference: str) -> float:
    given, wanted = words_of(answer), words_of(reference)
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


def set_of_words(answer: str, reference: str) -> float:
    given, wanted = words_of(answer), words_of(reference)
    if given != wanted and any(" ".join(words) in ("yes", "no", "noanswer") for words in (given, wanted)):
        return 0.0
    common = len(set(given) & set(wanted))
    return 2 * common / (len(set(given)) + len(set(wanted))) if common else 0.0


def precision_alone(answer: str, reference: str) -> float:
    given, wanted = words_of(answer), words_of(reference)
    if given != wanted and any(" ".join(words) in ("yes", "no", "noanswer") for words in (given, wanted)):
        return 0.0
    return (Counter(given) & Counter(wanted)).total() / len(given) if given else 0.0


def with_articles(text: str) -> list[str]:
    return re.sub(r"[^\w\s]", "", text.lower()).split()


def articles_within_words(text: str) -> list[str]:
    return re.sub(r"an|a|the", "", re.sub(r"[^\w\s]", "", text.lower())).split()


def first_box(text: str) -> str | None:
    found = re.search(r"\\boxed\{([^{}]*(?:\{[^{}]*\})*)\}", text)
    return found[1] if found else final_answer(text)


def to_the_first_brace(text: str) -> str | None:
    found = re.findall(r"\\(?:boxed|fbox)\{([^}]*)\}", text)
    return found[-1] if found else final_answer(text)


def an_open_box_gives_the_one_before(text: str) -> str | None:
    return final_answer(text) or boxed(text[: max(text.rfind(r"\boxed"), 0)])


def whole_text(text: str) -> str | None:
    return final_answer(text) or text


def no_rewriting(answer: str) -> str:
    return answer.strip()


def all_commas(answer: str) -> str:
    return normal_form(answer).replace(",", "")


def left_within_commands(answer: str) -> str:
    return normal_form(answer.replace(r"\left", "").replace(r"\right", ""))


def all_texts_are_units(answer: str) -> str:
    return normal_form(re.sub(r"\\text\{[^}]*\}", "", answer))


def contains(answer: str, reference: str) -> dict[str, float]:
    return {"exact_match": float(normal_form(reference) in normal_form(final_answer(answer) or answer))}


WRONG = [
    ("token_f1", no_yes_case),
    ("token_f1", set_of_words),
    ("token_f1", precision_alone),
    ("words_of", with_articles),
    ("words_of", articles_within_words),
    ("final_answer", first_box),
    ("final_answer", to_the_first_brace),
    ("final_answer", an_open_box_gives_the_one_before),
    ("final_answer", whole_text),
    ("normal_form", no_rewriting),
    ("normal_form", all_commas),
    ("normal_form", left_within_commands),
    ("normal_form", all_texts_are_units),
]


@pytest.mark.parametrize(("name", "mutant"), WRONG, ids=lambda value: getattr(value, "__name__", value))
def test_wrong_rules_are_caught(name: str, mutant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, name, mutant)
    assert wrong(RULES)


@pytest.mark.parametrize("name", ["plain", "math"])
def test_containment_is_caught(name: str) -> None:
    assert wrong({**RULES, name: Rule("", contains)})


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {5}", "5"),
        (r"$\boxed 12$, so", "12"),
        (r"\boxedtimes{5}", None),
        (r"\boxed{open", None),
        (r"\boxed{a} \boxed{open {x}", None),
        ("", None),
    ],
)
def test_the_last_box(text: str, answer: str | None) -> None:
    assert boxed(text) == answer


def test_a_text_that_repeats_itself_is_no_trouble() -> None:
    """What an untrained model writes: nested deeper than a stack goes, in a time that grows with its length."""
    for text in (r"\frac{" * 20_000, r"\boxed{" * 20_000, "{" * 50_000 + "}" * 50_000, r"\frac" * 20_000):
        assert RULES["math"].score(text, r"\boxed{1}") == {"exact_match": 0.0}
        assert RULES["math"].score(rf"\boxed{{{text}}}", r"\boxed{1}") == {"exact_match": 0.0}


def test_published_solutions_agree_with_their_answers(shared: Path) -> None:
    """Every solution of MATH's test set has the final answer that its file states; the next one's rarely."""
    with gzip.open(shared / "data" / "math_test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    score = RULES["math"].score
    for row in rows:
        assert score(row["solution"], row["answer"]) == {"exact_match": 1.0}, row["id"]
    others = zip(rows, rows[1:] + rows[:1], strict=True)
    assert sum(score(a["solution"], b["solution"])["exact_match"] for a, b in others) < 0.05 * len(rows)


def test_each_rule_gives_exact_match_and_a_line() -> None:
    for rule in RULES.values():
        assert next(iter(rule.score("a", "b"))) == "exact_match"
        assert len(rule.summary.splitlines()) == 1
