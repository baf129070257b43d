"""One attempt at a lesson: teach it in some form, look at what it did, and say whether it may be kept."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from perdure.teaching import gate
from perdure.teaching.lesson import REPLAY, SCALES, Answer, Broken, Entry, Lesson, Matter, spelt
from perdure.teaching.marks import Distance, Mark
from perdure.teaching.pupil import Pupil, scaled
from perdure.types import Example


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows that a lesson must not harm.

    Attributes:
        of: what each belongs to: "lesson 3", or "probe".
        matters: question and answer of each.
        rows: encoded.
    """

    of: tuple[str, ...]
    matters: tuple[Matter, ...]
    rows: tuple[Example, ...]

    def right(self, marks: Sequence[Mark]) -> int:
        """How many of what they belong to have all their rows right."""
        wrong = {of for of, mark in zip(self.of, marks, strict=True) if not mark.right}
        return len(set(self.of) - wrong)


def of_entries(pupil: Pupil, entries: Sequence[Entry]) -> Rows:
    """The taught rows of lessons."""
    return _of(pupil, [(entry, prompt) for entry in entries for prompt in entry.matter.taught])


def of_held_out(pupil: Pupil, entries: Sequence[Entry], new: Matter) -> Rows:
    """The rows of lessons' held-out wordings, but for those that one of them teaches, and the prompt of a new one.

    A prompt is a correction of what was asked, as where a lesson takes the place of another; further wordings that
    were held out with another answer contradict it.
    """
    taught = {spelt(new.prompt)} | {spelt(prompt) for entry in entries for prompt in entry.matter.taught}
    held = [(entry, prompt) for entry in entries for prompt in entry.matter.held_out]
    return _of(pupil, [(entry, prompt) for entry, prompt in held if spelt(prompt) not in taught])


def _of(pupil: Pupil, told: Sequence[tuple[Entry, str]]) -> Rows:
    matters = [Matter(prompt, entry.matter.answer) for entry, prompt in told]
    return rows_of(pupil, [f"lesson {entry.number}" for entry, _ in told], matters)


def rows_of(pupil: Pupil, of: Sequence[str], matters: Sequence[Matter]) -> Rows:
    """Encoded rows of questions and answers."""
    encoded = tuple(pupil.row(matter.prompt, matter.answer) for matter in matters)
    return Rows(tuple(of), tuple(matters), encoded)


@dataclass(frozen=True, slots=True, eq=False)
class Situation:
    """What a lesson meets.

    Attributes:
        earlier: the rows of earlier lessons.
        held: the rows of their held-out wordings.
        probe: the probe's rows.
        probe_marks: how they stand before the lesson.
        start_marks: how they stood before the first one.
        distance: from the base.
        replaces: the number of the earlier lesson of the same prompt.
    """

    earlier: Rows
    held: Rows
    probe: Rows
    probe_marks: Sequence[Mark]
    start_marks: Sequence[Mark]
    distance: Distance
    replaces: int | None


def attempt(pupil: Pupil, number: int, matter: Matter, form: str, met: Situation) -> tuple[Lesson, list[Mark]]:
    """Teach a lesson in a form, and measure. The model is left as the lesson made it, kept or not.

    Returns:
        The lesson, and how the probe's rows stand after it.
    """
    clock, before = time.perf_counter(), pupil.weights()
    taught, held = pupil.taught(matter), pupil.held_out(matter)
    own, earlier = [*taught, *held], met.earlier
    were, marks = [*pupil.marks(taught), *pupil.marks(held)], pupil.marks(earlier.rows)
    texts = pupil.said(own, were)
    held_marks = pupil.marks(met.held.rows)
    steps = pupil.learn(matter, earlier.rows, [mark.sure for mark in marks], form == REPLAY)
    if form in SCALES:
        pupil.put(scaled(before, pupil.weights(), float(form)))
    both = pupil.marks([*earlier.rows, *taught])  # in the order in which the next lesson looks at them
    after, now = both[: len(earlier.rows)], [*both[len(earlier.rows) :], *pupil.marks(held)]
    probe, kl = pupil.marks_and_distance(met.probe.rows, met.distance)
    held_after = pupil.marks(met.held.rows)
    broken = (
        *_broken(earlier, marks, after),
        *_broken(met.held, held_marks, held_after),
        *_broken(met.probe, met.probe_marks, probe),
    )
    said = pupil.said([*own, *(rows.rows[i] for rows, i, _ in broken)], [*now, *(mark for *_, mark in broken)])
    answers = tuple(
        Answer(prompt, old, new, mark.right, was.right)
        for prompt, old, new, mark, was in zip(
            (*matter.taught, *matter.held_out), texts, said[: len(own)], now, were, strict=True
        )
    )
    cut, limits = len(taught), (pupil.settings.tolerance, pupil.settings.alpha)
    lesson = Lesson(
        number=number,
        matter=matter,
        kept=False,
        form=form,
        steps=steps,
        seconds=0.0,
        answers=answers[:cut],
        held_out=answers[cut:],
        loss=(_mean([mark.loss for mark in were[:cut]]), _mean([mark.loss for mark in now[:cut]])),
        earlier=gate.of_lessons(_right(marks), _right(after), *limits),
        wordings=gate.of_sample(_right(held_marks), _right(held_after), *limits),
        right=earlier.right(after),
        earlier_lessons=len(set(earlier.of)),
        probe=gate.of_sample(_right(met.probe_marks), _right(probe), *limits),
        since_start=gate.of_sample(_right(met.start_marks), _right(probe), *limits),
        probe_right=(_mean(_right(met.probe_marks)), _mean(_right(probe))),
        kl=kl,
        replaces=met.replaces,
        broken=tuple(
            Broken(rows.of[i], rows.matters[i].prompt, rows.matters[i].answer, text)
            for (rows, i, _), text in zip(broken, said[len(own) :], strict=True)
        ),
    )
    why = tuple(_why(lesson, pupil.settings.gate))
    seconds = round(time.perf_counter() - clock, 3)
    return replace(lesson, why=why, kept=not why, seconds=seconds), probe


def _why(lesson: Lesson, gated: bool) -> Iterator[str]:
    """Reasons not to keep a lesson."""
    if not lesson.learnt:
        yield f"it was not learnt in {lesson.steps} steps"
    if not gated:
        return
    if lesson.earlier.harmful:
        fall = lesson.earlier
        yield f"it breaks {fall.broken} of {fall.rows} earlier answers (p = {fall.p:.2g})"
    if lesson.wordings.harmful:
        fall = lesson.wordings
        yield f"other wordings of earlier questions: {fall.broken} of {fall.rows} break (p = {fall.p:.2g})"
    if lesson.probe.harmful:
        yield f"the probe falls by {100 * lesson.probe.share:.1f} points (p = {lesson.probe.p:.2g})"
    elif lesson.since_start.harmful and lesson.probe.share > 0:
        fall = lesson.since_start
        yield f"the probe would stand {100 * fall.share:.1f} points below its start (p = {fall.p:.2g})"


def _broken(rows: Rows, were: Sequence[Mark], now: Sequence[Mark]) -> list[tuple[Rows, int, Mark]]:
    """The places of rows that were right and are wrong now, and how they stand."""
    pairs = enumerate(zip(were, now, strict=True))
    return [(rows, i, mark) for i, (was, mark) in pairs if was.right and not mark.right]


def _right(marks: Sequence[Mark]) -> list[bool]:
    return [mark.right for mark in marks]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
