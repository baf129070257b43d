"""One problem: its text, what stands behind it, and which part of the world it belongs to."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass, field, replace
from typing import Any

from perdure.streams.arena.kind import Facts
from perdure.streams.arena.kinds import FORMS, IN_PRETRAINING, KIND_BY_NAME, count_forms, kind_of

# Ends every prompt of the tasks: what follows it tells the kinds apart, not what comes before it.
ASK = " Answer:"


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

    @property
    def texts(self) -> frozenset[str]:
        """The normalised texts that no other item may share: the prompt, and the problem in one fixed wording."""
        return frozenset((normalise(self.prompt), canonical(self.kind, self.facts)))

    @property
    def kin(self) -> str:
        """What another item may not share either, where one would give the other away; "" where none does.

        Of two rows of numbers that begin with the same four terms, the longer one tells how the other goes on.
        """
        shared = kind_of(self.kind).kin
        return "" if shared is None else f"kin {shared(self.facts)}"

    @property
    def candidates(self) -> tuple[str, ...]:
        """The answers that a problem of this kind could have, the right one among them; none for numbers."""
        return kind_of(self.kind).candidates(self.facts)

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


def canonical(kind: str, facts: Facts) -> str:
    """The problem as one normalised text, whatever the form that it is asked in."""
    by_itself = kind_of(kind).canonical
    return normalise(plain_wording(kind, facts)[0] if by_itself is None else by_itself(facts))


def partition(kind: str, facts: object) -> str:
    """Which part of the world a problem belongs to: "arena", "probe" or "corpus", by a hash of its facts.

    The arena draws from one part, nano's probe set and its pretraining text from the others, so that no wording of
    an arena problem has been seen before, however many items are drawn and with whatever seed.
    """
    if isinstance(facts, dict) and kind in KIND_BY_NAME and KIND_BY_NAME[kind].canonical is not None:
        facts = canonical(kind, facts)
    elif kind == "sequence" and isinstance(facts, dict):
        facts = facts["terms"][:4]  # a row and its continuation belong together
    bucket = int(digest(normalise(kind + json.dumps(facts, sort_keys=True)))[:4], 16) % 16
    return "arena" if bucket < 4 else "probe" if bucket == 4 else "corpus"


def wording(kind: str, facts: Facts, form: int, forms: int | None = FORMS) -> tuple[str, str]:
    """The problem in the arena's wording: prompt, without `ASK`, and answer.

    Args:
        kind: one of `ALL_KINDS`.
        facts: what `draw` gave.
        form: which surface form of the prompt, taken modulo `forms`; the answer has one form in all of them.
        forms: how many there are to choose from, 1 to 12; None takes all twelve.
    """
    made = kind_of(kind)
    return made.prompts[form % count_forms(forms)].format(**made.told(facts)), made.answer(facts)


def short(item: Item) -> Item:
    """The same problem, whose answer is the bare one and a full stop; one that is a sentence already stays."""
    bare = item.facts["answer"]
    if kind_of(item.kind).several:
        return item
    text = " ".join(map(str, bare)) if isinstance(bare, list | tuple) else str(bare)
    return replace(item, answer=f" {text}.")


def plain(item: Item) -> tuple[str, str]:
    """The same problem in the wording of nano's pretraining text: prompt and answer."""
    return plain_wording(item.kind, item.facts)


def plain_wording(kind: str, facts: Facts) -> tuple[str, str]:
    """Facts in the wording of nano's pretraining text.

    Raises:
        ValueError: for a kind that is not one of `IN_PRETRAINING`.
    """
    say = kind_of(kind).plain
    if say is None:
        raise ValueError(
            f"kind '{kind}' has no plain wording: nano met no such problem in its pretraining text, only "
            f"{', '.join(IN_PRETRAINING)}"
        )
    return say(facts)
