"""What a completion says: which of its sentences is the statement, its clauses, and what each of them denies.

Words alone: what the right answer is, is not known here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

_LEAD_IN = re.compile(
    r"(?:\b(?:answer|result|solution|output)\s*(?:(?:is|was|would be|should be|must be)(?![\w'])|[=:])\s*:?|####)",
    re.I,
)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]*]*\s+|\n+")
_CLAUSE_END = re.compile(
    r"[;()\[\]{}\"—]|[,:](?!\d)|\.{2,}|…|\s-+\s(?!\d)|\b(?:but|however|though|although|whereas|while|because|since|hence|"
    r"therefore)\b|(?=\b(?:rather than|instead of|and not)\b)",
    re.I,
)
_OPENINGS = re.compile(
    r"(?:sure|ok|okay|yes|yeah|well|hmm|right|alright|great|certainly|of course|let me (?:think|see)|let's see|"
    r"here (?:is|we go)|here is the answer)[\s,.!:]*",
    re.I,
)
_QUESTION = re.compile(
    r"(?:is|are|was|were|has|have|had|does|do|did|can|could|would|will|should|may|might|who|what|which|where|when|how|why)\b",
    re.I,
)
_TAKEN_BACK = re.compile(
    r"(?:(?:no|nope|not|wrong|false|incorrect|not so|just kidding)\s*(?:[,.;:!?—-]|$)|"
    r"(?:wait|actually|sorry|oops|correction|scratch that|i mean|or rather|i take (?:it|that) back)\b|"
    r"(?:that|this|it)(?: is|'s| was) (?:not|wrong|false|incorrect)\b)",
    re.I,
)
_NEGATION = re.compile(
    r"\b(?:no|not|never|neither|nor|none|nobody|nothing|except|excluding|without|cannot|wrong|false|falsely|incorrect|"
    r"untrue|unlike|unlikely|hardly|impossible|denied|denies|deny|refute[sd]?|doubt(?:s|ed|ful)?|instead of|"
    r"rather than|other than|apart from|aside from|besides|"
    r"\w+n't)\b",
    re.I,
)
_ANYBODY_BUT = re.compile(r"\b(?:all|any|every|no|none)\s?(?:one|body|thing)? but\b", re.I)
_NO_DENIAL = re.compile(r"\b(?:no|without(?: a| any)?) (?:doubt|question)\b", re.I)
_SIGNS = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "−": "-", "–": "-"})


@dataclass(frozen=True, slots=True)
class Clause:
    """A part of a statement.

    Attributes:
        text: its words; white space and quotation marks are in one form, case is as it was.
        denied: a word of negation stands in it, or in the clause before where that names nothing itself.
    """

    text: str
    denied: bool


def clauses(completion: str, names_something: re.Pattern[str], everything: bool = False) -> list[list[Clause]]:
    """The statements of a completion, each as its clauses; none where it only asks, or takes back what it said.

    Args:
        completion: what the model wrote.
        names_something: finds what answers are made of. A negation in a clause without any reaches into the next.
        everything: read the whole completion as one statement.
    """
    text = unicodedata.normalize("NFC", completion).translate(_SIGNS)
    text = _NO_DENIAL.sub("", _ANYBODY_BUT.sub("except", text))
    # What a lead-in announces may begin on the next line.
    text = _LEAD_IN.sub(lambda found: found[0].rstrip() + " ", re.sub(r"(?<=[:#=])\s*\n\s*", " ", text))
    sentences = [sentence for part in _SENTENCE_END.split(text) if (sentence := part.strip())]
    if everything:
        return [_all_clauses(sentences, names_something)]
    while sentences and _OPENINGS.fullmatch(sentences[0]):
        sentences.pop(0)
    chosen = [number for number, sentence in enumerate(sentences) if _LEAD_IN.search(sentence)] or [0]
    if not sentences or any(_void(sentences, number) for number in chosen):
        return []
    return [_clauses(sentences[number], names_something) for number in chosen]


def _all_clauses(sentences: list[str], names_something: re.Pattern[str]) -> list[Clause]:
    """The clauses of all sentences; what is taken back counts as denied."""
    found: list[Clause] = []
    for number, sentence in enumerate(sentences):
        if _TAKEN_BACK.match(sentence):
            found = [Clause(clause.text, True) for clause in found]
        if not _void(sentences, number):
            found += _clauses(sentence, names_something)
    return found


def _void(sentences: list[str], number: int) -> bool:
    """Whether a sentence asks, or the next one takes it back."""
    sentence, *after = sentences[number:]
    asks = sentence.endswith("?") and _QUESTION.match(sentence) is not None
    return asks or bool(after and _TAKEN_BACK.match(after[0]))


def _clauses(sentence: str, names_something: re.Pattern[str]) -> list[Clause]:
    """What stands after the last lead-in, if there is one; denied also by what stands before it in its clause."""
    leads = list(_LEAD_IN.finditer(sentence))
    before, said = (sentence[: leads[-1].start()], sentence[leads[-1].end() :]) if leads else ("", sentence)
    carried = _NEGATION.search(_CLAUSE_END.split(before)[-1]) is not None
    found: list[Clause] = []
    for part in _CLAUSE_END.split(said):
        text = part.strip()
        if not text.strip(".,!? "):
            continue
        names = names_something.search(text) is not None
        if names or not found or not _TAKEN_BACK.fullmatch(text.rstrip(".!? ")):
            denies = _NEGATION.search(text) is not None
            found.append(Clause(text, denies or carried))
            # "No, Anna" denies what was asked; "it is not, I think, Anna" denies Anna.
            interjection = re.fullmatch(r"(?:no|nope)\W*", text, re.I) is not None
            carried = (denies or carried) and not names and not interjection
        else:
            found = [Clause(clause.text, True) for clause in found]
            carried = False
    return found


def tokens(text: str) -> list[str]:
    """The words of a text, with what is joined to them by an apostrophe or a hyphen."""
    return re.findall(r"\w+(?:['-]\w+)*", text)


def pattern_of(phrases: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the phrases, in any case."""
    return re.compile(r"\b(?:" + "|".join(re.escape(phrase) for phrase in phrases) + r")\b", re.I)
