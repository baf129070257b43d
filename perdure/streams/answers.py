"""How a given answer is scored against the reference: rules by name, from two texts to shares of one.

Texts alone: what is read of a model's tokens, and for which rows, is not known here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from string import punctuation

from perdure.streams.latex import final_answer, normal_form

PLAIN = "plain"
_PUNCTUATION = str.maketrans("", "", punctuation)
_CLOSED = ("yes", "no", "noanswer")


@dataclass(frozen=True, slots=True)
class Rule:
    """A way to score answers.

    Attributes:
        summary: what counts as right, in a line.
        score: (answer, reference) -> each metric of one row, 0 to 1; "exact_match" is always one.

    Example:
        >>> RULES["hotpot"].score("The Beatles", "beatles")
        {'exact_match': 1.0, 'f1': 1.0}
    """

    summary: str
    score: Callable[[str, str], dict[str, float]]


def matches(answer: str, reference: str) -> bool:
    """Whether two texts are the same but for white space at the ends and its amount within."""
    return " ".join(answer.split()) == " ".join(reference.split())


def same_result(answer: str, reference: str) -> bool:
    r"""Whether two mathematical texts have the same final answer, written in one form.

    A final answer is the content of the last `\boxed{…}`, else what follows the last "answer is", "Answer:" or
    "####", to the end of its sentence or line. A text without one is wrong. A reference without one is a bare
    answer: it is then compared as a whole with the final answer, or with the whole text of an answer that has none.
    """
    given, wanted = final_answer(answer), final_answer(reference)
    if wanted is None:
        given, wanted = answer if given is None else given, reference
    return given is not None and normal_form(given) == normal_form(wanted)


def words_of(text: str) -> list[str]:
    """The words that HotpotQA compares: in lower case, without ASCII punctuation, without a, an and the."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(answer: str, reference: str) -> float:
    """HotpotQA's F1: the harmonic mean of precision and recall over words, each as often as it stands in both.

    0 where either text is yes, no or noanswer and the other is not the same. Also 0 where either has no words left,
    as in the authors' program.
    """
    given, wanted = words_of(answer), words_of(reference)
    if given != wanted and any(" ".join(words) in _CLOSED for words in (given, wanted)):
        return 0.0
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


def _plain(answer: str, reference: str) -> dict[str, float]:
    return {"exact_match": float(matches(answer, reference))}


def _math(answer: str, reference: str) -> dict[str, float]:
    return {"exact_match": float(same_result(answer, reference))}


def _hotpot(answer: str, reference: str) -> dict[str, float]:
    same = words_of(answer) == words_of(reference)
    return {"exact_match": float(same), "f1": token_f1(answer, reference)}


RULES = {
    PLAIN: Rule("the same text; white space at the ends and its amount within do not count", _plain),
    "math": Rule('the same final answer (the last box, or after "answer is"), written in one form', _math),
    "hotpot": Rule("HotpotQA's exact match and F1 over words: no case, punctuation, a, an, the", _hotpot),
}
"""How answers may be scored, by the name that `answers` takes."""
