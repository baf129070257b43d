"""A lesson: what was taught, and what it did; plain frozen values."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from perdure.errors import DataError
from perdure.teaching.gate import Fall

WHOLE, REPLAY = "whole", "more replay"
SCALES = ("0.5", "0.25")
FORMS = (WHOLE, REPLAY, *SCALES)
PROBE = "probe"  # the form of an entry that is a row of the probe


@dataclass(frozen=True, slots=True)
class Matter:
    """What a lesson teaches.

    Attributes:
        prompt: the question, in the wording in which it was asked.
        answer: the right answer.
        wordings: other wordings of the question that are taught too.
        held_out: further ones that are never taught: they show whether the lesson is more than memorised.
    """

    prompt: str
    answer: str
    wordings: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()

    @property
    def taught(self) -> tuple[str, ...]:
        """All wordings that are taught."""
        return (self.prompt, *self.wordings)

    @property
    def key(self) -> str:
        """A hash of all of it."""
        return digest(asdict(self))

    def check(self) -> None:
        """DataError where something is empty or stands twice."""
        texts = [*self.taught, *self.held_out]
        if not all(text.strip() for text in (*texts, self.answer)):
            raise DataError("a lesson needs a prompt and an answer, and no wording of it may be empty")
        for text in (*texts, self.answer):
            check_text(text)
        plain = [" ".join(text.split()) for text in texts]
        for text in plain:
            if plain.count(text) > 1:
                raise DataError(f"the wording {text!r} stands twice in the lesson; leave one out")


def spelt(text: str) -> str:
    """A text without regard to case and the amount of white space."""
    return " ".join(text.split()).casefold()


def check_text(text: str) -> None:
    """DataError where a text cannot be written as UTF-8, as half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{text[:40]!r}: not a text that can be written: {error.reason}") from error


def digest(value: Any) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Answer:
    """The taught answer to one wording, before and after.

    Attributes:
        prompt: the wording.
        before: the model's greedy answer before the lesson.
        after: after it.
        right: whether it is the right one after it.
        was_right: whether it was before.
    """

    prompt: str
    before: str
    after: str
    right: bool
    was_right: bool


@dataclass(frozen=True, slots=True)
class Broken:
    """An answer that was right before the lesson and is wrong after it.

    Attributes:
        of: "lesson 3", or "probe".
        prompt: the question.
        answer: the right answer.
        now: the model's answer.
    """

    of: str
    prompt: str
    answer: str
    now: str


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a lesson taught and what it cost.

    Attributes:
        number: counted from 1; never given again.
        matter: what was taught.
        kept: whether the model has it.
        form: "whole", "more replay", or a scale such as "0.5".
        steps: optimizer steps.
        seconds: of all of it, gate included.
        answers: the taught wordings, before and after.
        held_out: wordings that were not taught, before and after.
        loss: of the right answer before and after, mean over the tokens of all taught wordings, in nats.
        earlier: how the rows of earlier lessons fared.
        wordings: how the held-out wordings of earlier lessons fared.
        right: of earlier lessons, how many are right after it.
        earlier_lessons: how many there are.
        probe: how the probe fared.
        since_start: how it fared since before the first lesson.
        probe_right: share of the probe that is right before and after; NaN without a probe.
        kl: KL(base ‖ model) of the next token on new prompts, after it, in nats.
        why: why it was not kept; empty if it was.
        broken: answers that it broke.
        replaces: the number of an earlier lesson of the same prompt, which this one takes the place of.
    """

    number: int
    matter: Matter
    kept: bool
    form: str
    steps: int
    seconds: float
    answers: tuple[Answer, ...]
    held_out: tuple[Answer, ...]
    loss: tuple[float, float]
    earlier: Fall
    wordings: Fall
    right: int
    earlier_lessons: int
    probe: Fall
    since_start: Fall
    probe_right: tuple[float, float]
    kl: float
    why: tuple[str, ...] = ()
    broken: tuple[Broken, ...] = ()
    replaces: int | None = None

    @property
    def learnt(self) -> bool:
        """Whether all taught wordings are answered rightly."""
        return all(answer.right for answer in self.answers)

    @property
    def generalised(self) -> bool | None:
        """Whether most of the held-out wordings are answered rightly too; None where there are none."""
        if not self.held_out:
            return None
        return 2 * sum(answer.right for answer in self.held_out) > len(self.held_out)

    def plain(self) -> dict[str, Any]:
        """Plain values, for the journal and for programs."""
        values = {
            key: value
            for key, value in asdict(self).items()
            if key not in ("earlier", "wordings", "probe", "since_start")
        }
        for name in ("earlier", "wordings", "probe", "since_start"):
            fall: Fall = getattr(self, name)
            values[name] = {**asdict(fall), "share": fall.share, "harmful": fall.harmful}
        return {**values, "learnt": self.learnt, "generalised": self.generalised, "kl": _known(self.kl)} | {
            "probe_right": [_known(x) for x in self.probe_right]
        }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True, slots=True)
class Entry:
    """One link of the chain that makes the model: a lesson in the form in which it was kept, or a row of the probe.

    Attributes:
        number: of the lesson; 0 for a row of the probe.
        matter: what was taught; of a row of the probe its prompt and answer.
        form: see `Lesson`; "probe" for a row of the probe.
        forms: those that it may be taught in, the first that is kept counting.
    """

    number: int
    matter: Matter
    form: str = WHOLE
    forms: tuple[str, ...] = (WHOLE,)

    def address(self, before: str) -> str:
        """The name of the state after it, given that before it; a lesson's number is no part of it."""
        return digest([before, asdict(self.matter), self.form])


def matter_of(values: Mapping[str, Any], place: str) -> Matter:
    """What a line of a JSONL file teaches.

    Raises:
        DataError: a key is missing or unknown, or not text.
    """
    known = {"prompt": str, "answer": str, "wordings": list, "held_out": list}
    for key in ("prompt", "answer"):
        if key not in values:
            raise DataError(f'{place}: no {key!r}; a lesson is {{"prompt": …, "answer": …}}')
    for key, value in values.items():
        if key not in known:
            raise DataError(f"{place}: unknown key {key!r}; a lesson has {', '.join(known)}")
        texts = value if isinstance(value, list) else [value]
        if not isinstance(value, known[key]) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{place}: {key} must be {'a list of texts' if known[key] is list else 'a text'}")
    matter = Matter(
        values["prompt"], values["answer"], *(tuple(values.get(key, ())) for key in ("wordings", "held_out"))
    )
    try:
        matter.check()
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    return matter
