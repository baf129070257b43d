"""A lesson and its cost in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from perdure.report import words

if TYPE_CHECKING:
    from rich.table import Table

    from perdure.teaching import Lesson, Teacher
    from perdure.teaching.lesson import Answer, Entry


def gauge(lesson: Lesson) -> str:
    """What a lesson did and what it cost, in one line."""
    parts = [f"{lesson.steps} {'step' if lesson.steps == 1 else 'steps'}, {lesson.seconds:.1f} s"]
    if len(lesson.answers) > 1:
        parts.append(f"wordings {_right(lesson.answers)}")
    if lesson.held_out:
        word = "generalised" if lesson.generalised else "memorised"
        parts.append(f"held-out wordings {_right(lesson.held_out)}: {word}")
    if lesson.earlier_lessons:
        parts.append(f"earlier lessons {lesson.right} of {lesson.earlier_lessons} right")
    before, after = lesson.probe_right
    if not math.isnan(after):
        parts.append(f"probe {_percent(after)} ({words.value('exact_match', after - before, signed=True)})")
    if not math.isnan(lesson.kl):
        parts.append(f"KL {lesson.kl:.4f}")
    if lesson.broken:
        parts.append(f"broke {len(lesson.broken)} (/why)")
    return " · ".join(parts)


def headline(lesson: Lesson) -> str:
    """Whether it was kept, and in what form, or why not."""
    if not lesson.kept:
        return f"lesson {lesson.number} is not kept: {'; '.join(lesson.why)}"
    form = "" if lesson.form == "whole" else f", {_form(lesson.form)}"
    place = f"; it takes the place of lesson {lesson.replaces}" if lesson.replaces else ""
    return f"lesson {lesson.number} is kept{form}{place}"


def offers() -> str:
    """What may be done about a lesson that was refused."""
    return "/replay: teach it with more replay · /scale 0.5: keep half of the change · /drop: leave it · /why"


def broken(lesson: Lesson, most: int = 20) -> list[str]:
    """The answers that a lesson broke, a line each."""
    found = [
        f"{one.of}: {_short(one.prompt)} {one.answer} -> {one.now or '(nothing)'}" for one in lesson.broken[:most]
    ]
    more = len(lesson.broken) - most
    return [*found, f"and {more} more"] if more > 0 else found


def table(teacher: Teacher) -> Table:
    """All lessons, and whether each is still right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    right = teacher.right()
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("", justify="right")
    for head in ("question", "answer", "now"):
        found.add_column(head, overflow="fold")
    for entry in teacher.lessons:
        now = _state(entry, right)
        found.add_row(str(entry.number), Text(entry.matter.prompt), Text(entry.matter.answer), now)
    return found


def _state(entry: Entry, right: dict[int, bool]) -> str:
    if entry.number not in right:
        return "replaced"
    state = "right" if right[entry.number] else "wrong"
    return state if entry.form == "whole" else f"{state} ({_form(entry.form)})"


def _form(form: str) -> str:
    return f"with {form}" if form == "more replay" else f"scaled by {form}"


def _right(answers: Sequence[Answer]) -> str:
    return f"{sum(answer.right for answer in answers)} of {len(answers)}"


def _percent(share: float) -> str:
    return words.value("exact_match", share)


def _short(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
