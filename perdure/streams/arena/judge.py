r"""Whether a completion is right: by its very text, and by what it states.

`strict` compares the whole completion with the reference answer, frame and all. `stated` asks whether the right
answer and no other is stated, by these rules:

1. **Where.** The statement is the first sentence, after openings such as "Sure!". Where there are lead-ins
   ("the answer is", "Answer:", "result =", "####"), it is what follows each of them in its sentence, and all of
   them must be right. A sentence ends at ".", "!" or "?" before white space, or at the line's end. A sentence
   that asks ("Is it Anna?") states nothing; nor does one that is taken back at once ("Anna. No, Ben.", "Anna,
   wait, no").
2. **What.** Whole words, in any case, the longest candidate first: "the dog barks" is not stated within a
   longer candidate, "Anna" neither in "Annabel" nor in "Anna's". All words that a problem of the kind could
   have for an answer are candidates, whether they stand in the prompt or not. "Will" is a name only with its
   capital letter.
3. **Numbers.** Whole numbers with a sign and thousands commas. "142", "-7", "minus 7", "7.5", "7/2", "7th",
   "7%" are not 7; "7.", "+7" and "7 toys" are. Where there is a "=", what follows the last one counts. A word
   for a number ("seven") is that number, "one" is none. Words that change a number (half, twice, dozen, more),
   that make it inexact (about, close to, least) and signs of comparison (<, !=) leave none that is right.
4. **Negation.** A clause with a word of negation or doubt (no, not, n't, never, neither, nor, except, without,
   wrong, doubt, ...) states nothing; "but" and punctuation end a clause. A negation in a clause that names nothing
   reaches into the next, but for a lone "no".
5. **Only it.** Right is: the right candidate is stated, and no other. Nothing is stated where the sentence
   speaks of something else than was asked for: another person, other things, the other end of the line.
6. **Series** (ciphers): the digits of the statement, in order, are the answer. **Words without candidates**
   (what a program prints): what is left of the statement without words such as "it prints" is the answer.
7. **Summaries** may tell more: the whole completion is read, and the key fact must be stated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from perdure.streams.answers import matches
from perdure.streams.arena.item import Item
from perdure.streams.arena.kind import words
from perdure.streams.arena.kinds import kind_of
from perdure.streams.arena.reading import Clause, clauses, pattern_of, tokens
from perdure.streams.arena.rouge import rouge_l

Value = str | int
_NOT_AT_ALL = re.compile(r"(?!)")
_ANY_NUMBER = re.compile(r"\d")
_WHOLE = re.compile(r"0|[+-]?(?:[1-9][0-9]*|[1-9][0-9]{0,2}(?:,[0-9]{3})+)")
_NUMBER_WORDS: dict[str, int] = {
    "zero": 0,
    **{w: n for n, w in enumerate(words("two,three,four,five,six,seven,eight,nine,ten,eleven,twelve"), 2)},
    **{w: n for n, w in enumerate(words("thirteen,fourteen,fifteen,sixteen,seventeen,eighteen,nineteen"), 13)},
    **{w: 10 * n for n, w in enumerate(words("twenty,thirty,forty,fifty,sixty,seventy,eighty,ninety"), 2)},
}
# With one of these in its clause, or of the second right before it, a number is not the number stated.
_CHANGING = frozenset(
    words(
        "half twice double triple thrice quarter third dozen hundred thousand million billion times squared cubed "
        "square root percent point plus minus negative more fewer less",
        " ",
    )
)
_INEXACT = frozenset(
    words(
        "about around almost nearly near roughly approximately over under above below beyond than least most "
        "close-to up-to next-to",
        " ",
    )
)
_COMPARED = re.compile(r"!=|[<>≠≈~≤≥]")
_FILLERS = frozenset(
    words("the this program code output result answer string word text it that is prints print printed", " ")
)
# Also common words, and then in lower case.
_COMMON = frozenset(("will",))


def strict(item: Item, completion: str) -> bool:
    """Whether the whole completion is the reference answer; white space at its ends and its amount do not count."""
    return matches(completion, item.answer)


def stated(item: Item, completion: str) -> bool:
    """Whether the completion states the right answer and no other, by the rules of this module."""
    answer, kind = item.facts["answer"], kind_of(item.kind)
    candidates, others = kind.candidates(item.facts), kind.others(item.facts)
    read = _reader(answer, candidates)
    if read is None:
        return _is_the_word(str(answer), completion)
    names = pattern_of(candidates) if isinstance(answer, str) else _ANY_NUMBER
    found = clauses(completion, names, everything=kind.several)
    if not found:
        return False
    wanted = answer if isinstance(answer, list) else [answer]
    return all(_states(part, wanted, read, others, isinstance(answer, list), kind.several) for part in found)


def _reader(answer: object, candidates: Sequence[str]) -> Callable[[str], list[Value]] | None:
    if not isinstance(answer, str):
        return numbers
    return (lambda text: list(phrases(text, candidates))) if candidates else None


def _states(
    found: Sequence[Clause],
    wanted: Sequence[Value],
    read: Callable[[str], list[Value]],
    others: Sequence[str],
    in_order: bool,
    several: bool,
) -> bool:
    said = [clause.text for clause in found if not clause.denied]
    if any(phrases(text, others) for text in said):
        return False
    values = [value for text in said for value in read(text)]
    if in_order:
        return values == list(wanted) and not any(read(clause.text) for clause in found if clause.denied)
    return set(wanted) <= set(values) if several else set(values) == set(wanted)


def _is_the_word(answer: str, completion: str) -> bool:
    statements = clauses(completion, _NOT_AT_ALL)
    said = [
        [word for clause in found for word in tokens(clause.text) if word.casefold() not in _FILLERS]
        for found in statements
        if not any(clause.denied for clause in found)
    ]
    return bool(said) and len(said) == len(statements) and all(left == [answer] for left in said)


def phrases(text: str, candidates: Sequence[str]) -> list[str]:
    """The candidates that stand in a clause as whole words, in order, the longest at each place.

    Where a candidate has an article, it may be left out at the beginning of the clause.
    """
    given = tokens(text)
    folded = [word.casefold() for word in given]
    by_length = sorted(((c.casefold().split(), c) for c in candidates), key=lambda entry: -len(entry[0]))
    found, at = list[str](), 0
    while at < len(given):
        for whole, candidate in by_length:
            bare = whole[1:] if at == 0 and whole[0] in ("the", "a", "an") else whole
            length = next((len(w) for w in (whole, bare) if folded[at : at + len(w)] == w), 0)
            if length and given[at] not in _COMMON:
                found.append(candidate)
                at += length
                break
        else:
            at += 1
    return found


def numbers(text: str) -> list[Value]:
    """The numbers that a clause states, behind its last "="; one that is not whole as it is written."""
    text = re.sub(r"[-=]+>|→", "=", text)
    said = re.sub(r"(?<!\S)(?:-|minus|negative)\s+(?=\d)", "-", text.rsplit("=", 1)[-1], flags=re.I)
    found: list[Value] = []
    changed = _COMPARED.search(text) is not None
    before = ("", "")  # the last word, and the last two
    for piece in said.split():
        bare = piece.strip("\"'*_$`").rstrip(".,;:!?\"'*_$`")
        word = bare.casefold()
        changed |= bool(_CHANGING & set(word.split("-")))
        if any(letter.isnumeric() for letter in bare):
            found.append(int(bare.replace(",", "")) if _WHOLE.fullmatch(bare) else bare)
            changed |= not _INEXACT.isdisjoint(before)
        elif word in _NUMBER_WORDS:
            found.append(_NUMBER_WORDS[word])
            changed |= not _INEXACT.isdisjoint(before)
        before = (word, f"{before[0]}-{word}")
    return [f"changed {value}" for value in found] if changed else found


def scores(item: Item, completion: str) -> dict[str, float]:
    """Each score of one completion, 0 to 1: exact_match, stated, and for summaries rouge_l."""
    found = {"exact_match": float(strict(item, completion)), "stated": float(stated(item, completion))}
    return {**found, "rouge_l": rouge_l(completion, item.answer)} if item.kind == "summary" else found
