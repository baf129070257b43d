"""Other wordings: those that are taught, and those that are held out and show whether a lesson generalised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from perdure.teaching.lesson import Lesson, Matter
from perdure.teaching.pupil import Pupil
from perdure.teaching.trial import Rows, of_held_out
from perdure.training.learner import Learner, StepResult

Make = Callable[..., Any]
NEAR = (["w1 w2 w4", "w1 w2 w6"], ["w1 w2 w7", "w1 w2 w8", "w20 w21"])  # two of three go with those that are taught
FAR = ([], ["w21 w12 w7", "w13 w22 w8"])


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The ids of all rows of each step that is taken, rehearsed ones included."""
    found: list[set[str]] = []
    step = Learner.step

    def watched(self: Learner, rows: Any) -> StepResult:
        result = step(self, rows)
        found.append({str(row.x) for row in result.examples})
        return result

    monkeypatch.setattr(Learner, "step", watched)
    return found


def check_held_out(make: Make, steps: list[set[str]]) -> None:
    """All taught wordings are in every step of their lesson; held-out ones in none, nor in a later lesson's."""
    one = make()
    lesson = one.teach("w1 w2 w3", "w30", *NEAR)
    assert lesson.steps == len(steps) > 0
    taught, held = ({str(one.pupil.row(p, "w30").x) for p in texts} for texts in (lesson.matter.taught, NEAR[1]))
    assert (len(taught), len(held)) == (3, 3)
    assert all(taught <= step for step in steps)
    one.teach("w11 w2 w3", "w31", *FAR)
    held |= {str(one.pupil.row(p, "w31").x) for p in FAR[1]}
    one.teach("w15 w11 w5", "w25")
    rows = set.union(*steps)
    assert taught <= rows
    assert not held & rows


def test_held_out_wordings_are_never_trained_on(teacher: Make, steps: list[set[str]]) -> None:
    check_held_out(teacher, steps)


class TeachesAll(Pupil):
    """Held-out wordings are taught too: each lesson generalises."""

    def learn(self, matter: Matter, *others: Any, **more: Any) -> int:
        return super().learn(
            Matter(matter.prompt, matter.answer, matter.wordings + matter.held_out), *others, **more
        )


def test_taught_held_out_wordings_are_caught(
    teacher: Make, steps: list[set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.teaching.assemble.Pupil", TeachesAll)
    with pytest.raises(AssertionError):
        check_held_out(teacher, steps)


def test_all_wordings_of_a_lesson_are_answered_and_measured(teacher: Make) -> None:
    one = teacher()
    lesson = one.teach("w1 w2 w3", "w30", *NEAR)
    assert lesson.kept
    assert [answer.prompt for answer in lesson.answers] == ["w1 w2 w3", *NEAR[0]]
    assert [answer.prompt for answer in lesson.held_out] == NEAR[1]
    for answer in (*lesson.answers, *lesson.held_out):
        assert answer.after == one.ask(answer.prompt)
        assert answer.right == (answer.after == "w30")
        assert not answer.was_right
    assert [answer.right for answer in lesson.held_out] == [True, True, False]
    assert (lesson.learnt, lesson.generalised) == (True, True)
    assert one.teach("w11 w2 w3", "w31", *FAR).generalised is False, "it was memorised"
    assert one.teach("w15 w11 w5", "w25").generalised is None


def test_a_wording_that_breaks_counts_its_lesson_as_wrong(teacher: Make) -> None:
    """Three rows of one lesson: of the next lesson's earlier rows there are three, of its earlier lessons one."""
    one = teacher()
    one.teach("w1 w2 w3", "w30", *NEAR)
    lesson = one.teach("w15 w11 w5", "w25")
    assert (lesson.earlier.rows, lesson.earlier_lessons, lesson.right) == (3, 1, 1)
    assert one.right() == {1: True, 2: True}
    harmful = teacher(earlier=0, general=0, gate=False)
    harmful.teach("w1 w2 w3", "w30", *NEAR)
    lesson = harmful.teach("w3 w3 w5", "w21")
    assert lesson.earlier.broken > 0
    assert "lesson 1" in {broken.of for broken in lesson.broken}
    assert (lesson.right, harmful.right()) == (0, {1: False, 2: True})


@pytest.mark.parametrize(
    ("right", "generalised"),
    [("", None), ("1", True), ("0", False), ("10", False), ("11", True), ("110", True), ("100", False)],
)
def test_most_held_out_wordings_must_be_right(teacher: Make, right: str, generalised: bool | None) -> None:
    lesson: Lesson = teacher(max_steps=1).teach("w1 w2 w3", "w30", held_out=["w4"])
    (answer,) = lesson.held_out
    changed = replace(lesson, held_out=tuple(replace(answer, right=mark == "1") for mark in right))
    assert changed.generalised is generalised
    assert changed.plain()["generalised"] is generalised


def check_contradicted(make: Make) -> None:
    """Six lessons with a held-out wording each; then one other answer to all of those.

    The first is the new lesson's prompt: a correction of what was asked. The five others contradict it: all that
    were right break.
    """
    one = make(sure=0.8, max_steps=60)
    stems = [f"w{4 * i} w{5 * i + 1}" for i in range(6)]
    held = [f"{stem} w7" for stem in stems]
    for i, stem in enumerate(stems):
        assert one.teach(f"{stem} w3", f"w{20 + i}", [f"{stem} w4", f"{stem} w6"], [held[i]]).kept
    rows = of_held_out(one.pupil, one.current(), Matter(held[0], "w36", tuple(held[1:])))
    assert [matter.prompt for matter in rows.matters] == held[1:]
    known = sum(mark.right for mark in one.pupil.marks(rows.rows))
    assert known >= 3, "else there is nothing to break"
    lesson = one.teach(held[0], "w36", held[1:])
    assert lesson.learnt
    assert lesson.wordings.broken == known
    assert any("other wordings of earlier questions" in why for why in lesson.why)
    alone = one.teach(held[0], "w36")
    assert held[0] not in {broken.prompt for broken in alone.broken}


def test_held_out_wordings_with_another_answer_are_contradicted(teacher: Make) -> None:
    check_contradicted(teacher)


def test_contradictions_that_are_left_out_are_caught(teacher: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new lesson's wordings do not count, whatever they contradict."""

    def without(pupil: Any, entries: Any, new: Matter) -> Any:
        rows = of_held_out(pupil, entries, new)
        kept = [i for i, matter in enumerate(rows.matters) if matter.prompt not in new.taught]
        return Rows(*(tuple(values[i] for i in kept) for values in (rows.of, rows.matters, rows.rows)))

    monkeypatch.setattr("perdure.teaching.course.of_held_out", without)
    with pytest.raises(AssertionError):
        check_contradicted(teacher)
