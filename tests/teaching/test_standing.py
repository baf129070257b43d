"""A row of the probe whose question a lesson teaches is neither measured nor rehearsed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from perdure.errors import DataError
from perdure.teaching import Teacher
from perdure.teaching.lesson import spelt
from perdure.teaching.rehearse import GENERAL
from perdure.training.learner import Learner, StepResult

Make = Callable[..., Any]


def measured(teacher: Teacher) -> set[str]:
    return {matter.prompt for matter in teacher._course.probe_rows().matters}


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The keys of the general rows of each step."""
    found: list[set[str]] = []
    step = Learner.step

    def watched(self: Learner, rows: Any) -> StepResult:
        result = step(self, rows)
        found.append({row.key for row in result.examples if row.group == GENERAL})
        return result

    monkeypatch.setattr(Learner, "step", watched)
    return found


def test_a_taught_row_is_not_measured_until_it_is_forgotten(teacher: Make, facts: list[tuple[str, str]]) -> None:
    one, never = teacher(), teacher()
    every = measured(one)
    taught = sorted(every)[0]
    assert one.teach(*facts[0]).probe.rows == len(every)
    lesson = one.teach(taught.upper().lower(), "w33", wordings=["w36 w36 w36"])
    assert lesson.kept
    assert lesson.probe.rows == lesson.since_start.rows == len(every) - 1
    assert "probe" not in {broken.of for broken in lesson.broken if spelt(broken.prompt) == spelt(taught)}
    assert measured(one) == every - {taught}
    assert one.probe_count == len(every) - 1
    again = one.probe_right(), one.distance()
    one._standing._now = ("", {}, 0.0)
    assert (one.probe_right(), one.distance()) == again, "what the lesson found is what there is"
    one.forget(2)
    never.teach(*facts[0])
    assert measured(one) == every
    assert one.probe_right() == never.probe_right()
    assert one.address == never.address


def test_a_taught_row_is_not_rehearsed(teacher: Make, rehearsed: list[set[str]]) -> None:
    """All of the training side is in each step, but for the row that is taught; later lessons leave it out too."""
    one = teacher(general=50)
    (matter, row), *others = one._standing._training
    rest = {other.key for _, other in others}
    assert one.teach("w1 w2 w3", "w30").steps > 0
    assert set.union(*rehearsed) == rest | {row.key}
    rehearsed.clear()
    lesson = one.teach("w20 w21", "w33", wordings=[matter.prompt])
    assert lesson.kept
    assert lesson.steps == len(rehearsed) > 0
    assert all(step == rest for step in rehearsed)
    rehearsed.clear()
    assert one.teach("w7 w8 w9", "w11").steps > 0
    assert all(step == rest for step in rehearsed)


def test_what_a_lesson_teaches_is_no_row_for_the_probe(teacher: Make, facts: list[tuple[str, str]]) -> None:
    one = teacher()
    assert one.teach(*facts[0]).kept
    before = one.address
    with pytest.raises(DataError, match="lesson 1 teaches the answer to"):
        one.add_probe(*facts[0])
    assert one.address == before
    one.add_probe("w30 w31", "w32")
    assert "w30 w31" in measured(one)
    assert one.teach("w30 w31", "w9").kept
    assert "w30 w31" not in measured(one)
