"""Lessons kept, refused, replaced and forgotten: always the bytes of a model that was never taught otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from perdure.errors import ConfigError, DataError
from perdure.teaching import Teacher
from perdure.teaching import course as room
from perdure.teaching.chain import Chain
from perdure.teaching.gate import Fall
from perdure.teaching.lesson import Entry, Lesson, digest
from perdure.teaching.pupil import Pupil, scaled
from perdure.teaching.rehearse import Rehearsed
from perdure.teaching.trial import _why
from perdure.training.learner import Learner

Make = Callable[..., Any]
Fact = tuple[str, str]
HARMFUL = {"earlier": 0, "general": 0}  # without rehearsal the second fact breaks the first


def told(teacher: Teacher, facts: Sequence[Fact]) -> list[Lesson]:
    """Lessons, all of which must be kept, lest a test were of nothing."""
    lessons = [teacher.teach(*fact) for fact in facts]
    assert all(lesson.kept for lesson in lessons), [lesson.why for lesson in lessons]
    return lessons


def same(one: Teacher, other: Teacher) -> bool:
    """To the bit, under one name, and with the same marks of the probe."""
    first, second = one.pupil.weights(), other.pupil.weights()
    equal = all(first[name].numpy().tobytes() == second[name].numpy().tobytes() for name in second)
    return equal and first.keys() == second.keys() and one.address == other.address


def sequence(facts: list[Fact]) -> list[Fact]:
    """Four facts, of which the last takes the place of the second."""
    return [*facts[:3], (facts[1][0].upper().lower() + " ", "w9")]


def check_forget(make: Make, lessons: list[Fact], cls: Any = Teacher) -> None:
    """Each of them against its absence, with a row of the probe that was added after the second."""
    for gone in range(1, len(lessons) + 1):
        teacher, never = make(cls=cls), make(cls=cls)
        told(teacher, lessons[:2])
        teacher.add_probe("w30 w31", "w32")
        told(teacher, lessons[2:])
        entry, dropped = teacher.forget(gone)
        assert (entry.number, dropped) == (gone, [])
        told(never, [fact for number, fact in enumerate(lessons[:2], 1) if number != gone])
        never.add_probe("w30 w31", "w32")
        told(never, [fact for number, fact in enumerate(lessons[2:], 3) if number != gone])
        assert [e.number for e in teacher.lessons] == [n for n in range(1, len(lessons) + 1) if n != gone]
        assert same(teacher, never), gone
        assert teacher.probe_right() == never.probe_right()
        assert teacher.distance() == never.distance()


def test_a_forgotten_lesson_was_never_taught(teacher: Make, facts: list[Fact]) -> None:
    """The first, one that was replaced, and the newest, which replaced it."""
    check_forget(teacher, [*facts[:2], sequence(facts)[-1]])


def test_few_states_are_enough_to_forget(teacher: Make, facts: list[Fact], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the newest state and the first are held: what is between them is taught again."""
    monkeypatch.setattr("perdure.teaching.book.NEWEST", 1)
    monkeypatch.setattr("perdure.teaching.book.EACH", 100)
    one, never = teacher(), teacher()
    told(one, facts[:4])
    assert len(one._chain.held) == 2
    one.forget(3)
    told(never, [*facts[:2], facts[3]])
    assert same(one, never)
    one.undo()
    one.undo()
    assert same(one, _taught(teacher(), facts[:1]))


def _taught(teacher: Teacher, facts: Sequence[Fact]) -> Teacher:
    told(teacher, facts)
    return teacher


class Subtracted(Teacher):
    """What the lesson added is taken off again, the others left as they were."""

    def forget(self, number: int) -> tuple[Entry, list[int]]:
        at = next(i for i, entry in enumerate(self._chain.entries) if entry.number == number)
        before, after = (self._chain.weights(address) for address in self._chain.addresses[at : at + 2])
        now = self.pupil.weights()
        gone, dropped = super().forget(number)
        self.pupil.put({name: now[name] - (after[name] - before[name]) for name in now})
        return gone, dropped


def test_a_lesson_that_is_subtracted_is_caught(teacher: Make, facts: list[Fact]) -> None:
    with pytest.raises(AssertionError):
        check_forget(teacher, facts[:2], Subtracted)


class GoesOn(Learner):
    """The optimizer's moments go on from one lesson to the next."""

    def _build_optimizer(self, carried: Any) -> None:
        if self.optimizer is None:
            super()._build_optimizer(carried)


class Counted(Rehearsed):
    """Draws are keyed by how many lessons there were."""

    count = 0

    def begin(self, lesson: str, *others: Any) -> None:
        self.count += 1
        super().begin(str(self.count), *others)


class Numbered(Entry):
    """A state's name holds the lesson's number, which its absence changes."""

    def address(self, before: str) -> str:
        return digest([before, self.number, self.matter.key, self.form])


@pytest.mark.parametrize("wrong", [GoesOn, Counted, Numbered])
def test_what_hangs_on_the_past_is_caught(
    teacher: Make, facts: list[Fact], monkeypatch: pytest.MonkeyPatch, wrong: type
) -> None:
    place = {GoesOn: "pupil.Learner", Counted: "pupil.Rehearsed", Numbered: "course.Entry"}[wrong]
    monkeypatch.setattr(f"perdure.teaching.{place}", wrong)
    with pytest.raises(AssertionError):
        check_forget(teacher, facts[:2])


def test_undo_goes_back_lesson_by_lesson(teacher: Make, facts: list[Fact]) -> None:
    one = teacher()
    states = [(one.address, one.pupil.weights())]
    for fact in facts[:3]:
        told(one, [fact])
        states.append((one.address, one.pupil.weights()))
    for number in (3, 2, 1):
        assert one.undo().number == number
        address, weights = states[number - 1]
        assert one.address == address
        assert all(torch.equal(weights[name], now) for name, now in one.pupil.weights().items())
    with pytest.raises(DataError, match="no lesson to take back"):
        one.undo()
    assert told(one, facts[:1])[0].number == 4, "a number is never given again"
    assert one.address == states[1][0]


def test_a_lesson_of_the_same_prompt_replaces_the_earlier_one(teacher: Make, facts: list[Fact]) -> None:
    one = teacher()
    lessons = told(one, sequence(facts))
    assert [lesson.replaces for lesson in lessons] == [None, None, None, 2]
    assert [lesson.earlier_lessons for lesson in lessons] == [0, 1, 2, 2]
    assert lessons[3].broken == (), "the old answer is meant to break"
    assert [entry.number for entry in one.current()] == [1, 3, 4]
    assert one.ask(facts[1][0]) == "w9"
    assert one.right() == {1: True, 3: True, 4: True}
    one.forget(4)
    assert [entry.number for entry in one.current()] == [1, 2, 3]
    assert one.ask(facts[1][0]) == facts[1][1]
    assert one.right() == {1: True, 2: True, 3: True}


# What is refused


def test_a_refused_lesson_leaves_everything_as_it_was(teacher: Make, facts: list[Fact]) -> None:
    one, never = teacher(**HARMFUL), teacher(**HARMFUL)
    told(one, facts[:1])
    told(never, facts[:1])
    before = one.pupil.weights()
    lesson = one.teach(*facts[1])
    assert (lesson.kept, lesson.learnt, lesson.number) == (False, True, 2)
    assert lesson.why == ("it breaks 1 of 1 earlier answers (p = 0.02)",)
    (broken,) = lesson.broken
    assert (broken.of, broken.prompt, broken.answer) == ("lesson 1", *facts[0])
    assert broken.now != facts[0][1]
    assert (lesson.right, lesson.earlier_lessons) == (0, 1)
    assert all(torch.equal(before[name], now) for name, now in one.pupil.weights().items())
    assert same(one, never)
    assert [entry.number for entry in one.lessons] == [1]
    # and what is taught next is as if it had not been
    assert one.teach(*facts[3]).number == 3
    never.teach(*facts[3])
    assert same(one, never)


def test_without_the_gate_a_harmful_lesson_is_kept(teacher: Make, facts: list[Fact]) -> None:
    one = teacher(gate=False, **HARMFUL)
    told(one, facts[:1])
    lesson = one.teach(*facts[1])
    assert (lesson.kept, lesson.why) == (True, ())
    assert lesson.earlier.harmful
    assert [broken.of for broken in lesson.broken] == ["lesson 1"]
    assert one.right() == {1: False, 2: True}


@pytest.mark.parametrize("gate", [True, False])
def test_what_is_not_learnt_is_refused(teacher: Make, facts: list[Fact], gate: bool) -> None:
    one = teacher(max_steps=1, gate=gate)
    lesson = one.teach(*facts[0])
    assert (lesson.kept, lesson.steps) == (False, 1)
    assert lesson.why == ("it was not learnt in 1 steps",)
    assert one.lessons == []
    assert one.distance() == pytest.approx(0, abs=1e-7)


def test_a_probe_that_falls_is_told(teacher: Make, facts: list[Fact]) -> None:
    """Rows of the probe that the model answers by itself, and a lesson that breaks most of them."""
    base = teacher(probe=[], max_new_tokens=20)
    prompts = [f"w{i} w{j}" for j in (1, 2, 3, 4) for i in range(37)]
    answers = base.pupil.answers([base.pupil.row(prompt, "?") for prompt in prompts])
    known = [(p, a) for p, a in zip(prompts, answers, strict=True) if 0 < len(a.split()) < 20 and "?" not in a]
    marks = base.pupil.marks([base.pupil.row(p, a) for p, a in known])
    known = [pair for pair, mark in zip(known, marks, strict=True) if mark.right]
    probe = [{"prompt": p, "answer": a} for p, a in known]
    found = []
    for gate in (True, False):
        one = teacher(probe=probe, gate=gate, max_steps=40, sure=0.99, lr=0.1, **HARMFUL)
        before, _ = one.probe_right()
        found.append(one.teach(*facts[0]))
        assert found[-1].probe_right[0] == before > 0.5
    refused, kept = found
    assert refused.probe == kept.probe
    assert (refused.kept, kept.kept) == (False, True)
    fall = refused.probe
    assert refused.why == (f"the probe falls by {100 * fall.share:.1f} points (p = {fall.p:.2g})",)
    assert [broken.of for broken in refused.broken] == ["probe"] * fall.broken
    assert all(broken.answer == dict(known)[broken.prompt] != broken.now for broken in refused.broken)


# Other forms


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The forms that are tried; the first two are refused, whatever they did."""
    forms: list[str] = []
    attempt = room.attempt

    def watched(pupil: Pupil, number: int, matter: Any, form: str, met: Any) -> Any:
        lesson, marks = attempt(pupil, number, matter, form, met)
        forms.append(form)
        kept = len(forms) > 2
        return replace(lesson, kept=kept, why=() if kept else ("for the test",)), marks

    monkeypatch.setattr(room, "attempt", watched)
    return forms


def test_forms_are_tried_in_order(teacher: Make, facts: list[Fact], tried: list[str]) -> None:
    one = teacher()
    lesson = one.teach(*facts[0], otherwise=["0.25", "more replay", "0.5"])
    assert tried == ["whole", "0.25", "more replay"]
    assert (lesson.kept, lesson.form, lesson.number) == (True, "more replay", 1)
    assert [(entry.number, entry.form) for entry in one.lessons] == [(1, "more replay")]


def test_a_refused_lesson_is_taught_again_in_another_form(
    teacher: Make, facts: list[Fact], tried: list[str]
) -> None:
    one = teacher()
    with pytest.raises(ConfigError, match="no lesson waits"):
        one.again("0.5")
    assert not one.teach(*facts[0]).kept
    assert not one.again("0.25").kept
    lesson = one.again("0.5")
    assert tried == ["whole", "0.25", "0.5"]
    assert (lesson.kept, lesson.form, lesson.number, lesson.matter.prompt) == (True, "0.5", 3, facts[0][0])
    with pytest.raises(ConfigError, match="no lesson waits"):
        one.again("0.5")


def check_scaled(make: Make, facts: list[Fact]) -> None:
    """before + s·(after − before), number by number, where `after` is what the whole lesson makes."""
    whole = make()
    told(whole, facts[:1])
    before = whole.pupil.weights()
    told(whole, facts[1:2])
    after = whole.pupil.weights()
    for form in ("0.5", "0.25"):
        one = make()
        told(one, facts[:1])
        one._refused = whole.lessons[1].matter
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("perdure.teaching.trial._why", lambda lesson, gated: iter(()))
            assert one.again(form).kept
        now = one.pupil.weights()
        for name in before:
            wanted = before[name] + float(form) * (after[name] - before[name])
            assert torch.equal(now[name], wanted), (form, name)
        assert one.address != whole.address


def test_a_scaled_lesson_goes_that_share_of_the_way(teacher: Make, facts: list[Fact]) -> None:
    check_scaled(teacher, facts)


def other_share(before: Any, after: Any, scale: float) -> Any:
    """The other end: the more is asked for, the less is left."""
    return scaled(after, before, scale)


def of_all(before: Any, after: Any, scale: float) -> Any:
    """Earlier lessons are scaled down too."""
    return {name: scale * after[name] for name in after}


@pytest.mark.parametrize("wrong", [other_share, of_all])
def test_wrong_scales_are_caught(
    teacher: Make, facts: list[Fact], monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    monkeypatch.setattr("perdure.teaching.trial.scaled", wrong)
    with pytest.raises(AssertionError):
        check_scaled(teacher, facts)


def test_a_later_lesson_in_another_form_is_taught_as_it_would_have_been(
    teacher: Make, facts: list[Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside an earlier lesson it is kept with more replay only; without that one it is kept whole."""
    one, never = teacher(), teacher()
    attempt = room.attempt

    def refusing(pupil: Pupil, number: int, matter: Any, form: str, met: Any) -> Any:
        lesson, marks = attempt(pupil, number, matter, form, met)
        return replace(lesson, kept=form != "whole" or not met.earlier.rows), marks

    monkeypatch.setattr(room, "attempt", refusing)
    for fact in facts[:2]:
        one.teach(*fact, otherwise=["more replay"])
    assert [entry.form for entry in one.lessons] == ["whole", "more replay"]
    one.forget(1)
    told(never, facts[1:2])
    assert [(entry.number, entry.form) for entry in one.lessons] == [(2, "whole")]
    assert same(one, never)


def test_a_lesson_that_may_not_be_kept_any_more_is_dropped(
    teacher: Make, facts: list[Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, never = teacher(), teacher()
    told(one, facts[:3])
    attempt = room.attempt

    def refusing(pupil: Pupil, number: int, matter: Any, form: str, met: Any) -> Any:
        lesson, marks = attempt(pupil, number, matter, form, met)
        return replace(lesson, kept=number != 2), marks

    monkeypatch.setattr(room, "attempt", refusing)
    assert one.forget(1)[1] == [2]
    told(never, [facts[2]])
    assert same(one, never)


# What is broken off


@pytest.mark.parametrize("act", ["teach", "forget", "undo", "probe"])
def test_what_is_broken_off_leaves_everything_as_it_was(
    teacher: Make, facts: list[Fact], monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """Ctrl-C in a step, or, where none is taken, as the state is written down."""
    one, never = teacher(), teacher()
    for each in (one, never):
        told(each, facts[:2])
    steps = []

    def pressed(self: Any, *_: Any, **__: Any) -> Any:
        steps.append(1)
        raise KeyboardInterrupt

    acts: dict[str, Callable[[], Any]] = {
        "teach": lambda: one.teach(*facts[3]),
        "forget": lambda: one.forget(1),
        "undo": one.undo,
        "probe": lambda: one.add_probe("w1", "w2"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*((Learner, "step") if act in ("teach", "forget") else (Chain, "commit")), pressed)
        with pytest.raises(KeyboardInterrupt):
            acts[act]()
    assert steps
    assert same(one, never)
    assert [entry.number for entry in one.lessons] == [1, 2]
    told(one, facts[3:4])
    told(never, facts[3:4])
    assert same(one, never)


# Why a lesson is refused

FINE, NONE = Fall(200, 2, 1, 0.5, 0.02), Fall(200, 0, 0, 1.0, 0.02)
HARM = Fall(200, 12, 0, 0.001, 0.02)


@pytest.mark.parametrize(
    ("earlier", "probe", "since_start", "why"),
    [
        (NONE, FINE, FINE, []),
        (HARM, FINE, FINE, ["it breaks 12 of 200 earlier answers (p = 0.001)"]),
        (NONE, HARM, HARM, ["the probe falls by 6.0 points (p = 0.001)"]),
        # Many lessons that each break a little: the one that takes the sum too far is refused, one that takes
        # nothing is not.
        (NONE, FINE, HARM, ["the probe would stand 6.0 points below its start (p = 0.001)"]),
        (NONE, NONE, HARM, []),
        (NONE, Fall(200, 1, 2, 1.0, 0.02), HARM, []),
        (
            HARM,
            HARM,
            FINE,
            ["it breaks 12 of 200 earlier answers (p = 0.001)", "the probe falls by 6.0 points (p = 0.001)"],
        ),
    ],
)
def test_reasons(
    teacher: Make, facts: list[Fact], earlier: Fall, probe: Fall, since_start: Fall, why: list[str]
) -> None:
    (lesson,) = told(teacher(probe=[]), facts[:1])
    changed = replace(lesson, earlier=earlier, probe=probe, since_start=since_start)
    assert list(_why(changed, True)) == why
    assert list(_why(changed, False)) == []
    wrong = replace(changed, answers=(replace(lesson.answers[0], right=False),))
    for gated in (True, False):
        assert list(_why(wrong, gated)) == [f"it was not learnt in {lesson.steps} steps", *(why if gated else [])]
