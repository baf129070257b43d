"""What is rehearsed in the steps of a lesson: which rows, how often, and with what weight in the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.teaching.lesson import Matter
from perdure.teaching.marks import log_probabilities
from perdure.teaching.pupil import Pupil
from perdure.teaching.rehearse import EARLIER, GENERAL, Rehearsed
from perdure.types import IGNORE, Batch, Context, Example, Output, Task

CTX: Any = None  # which the draws do not look at
NEW = [Example("new")]
OLD = [Example(f"old{i}") for i in range(11)]
SURE = [(7 * i % 11) / 11 for i in range(11)]  # the least sure are rows 0, 8, 5, 2, 10, …


def made(cls: Any, earlier: int = 4, general: int = 3, rows: int = 7) -> Rehearsed:
    strategy: Rehearsed = cls(earlier, general, 1.0)
    held = [Example(f"general{i}") for i in range(rows)]
    strategy.hold(held, [torch.zeros(1)] * rows)
    return strategy


def drawn(strategy: Rehearsed, steps: int, lesson: str = "a", times: int = 1) -> list[list[tuple[str, str]]]:
    """Group and key of what each step adds."""
    strategy.begin(lesson, 0, OLD, SURE, times)
    found = [strategy.mix(CTX, list(NEW)) for _ in range(steps)]
    assert all(rows[0] is NEW[0] and rows[0].group == "task" for rows in found)
    return [[(row.group, row.key) for row in rows[1:]] for rows in found]


def check_draws(cls: Any) -> None:
    once = drawn(made(cls), 21)
    # At most so many a step, none twice, and each sort in its own group.
    for step in once:
        assert Counter(group for group, _ in step) == {EARLIER: 4, GENERAL: 3}
        assert len(set(step)) == len(step)
    # Half of the earlier ones are the two that are least sure, in every step; the other nine come in turn.
    counts = Counter(key for step in once for group, key in step if group == EARLIER)
    assert (counts.pop("old0"), counts.pop("old8")) == (21, 21)
    assert len(counts) == 9
    assert max(counts.values()) - min(counts.values()) <= 1
    for part in range(1, 22):
        general = Counter(key for step in once[:part] for group, key in step if group == GENERAL)
        often = [general[f"general{i}"] for i in range(7)]
        assert sum(often) == 3 * part
        assert max(often) - min(often) <= 1
    # Whatever was taught before, a lesson has the same draws; another one has others.
    strategy = made(cls)
    other = drawn(strategy, 5, "b")
    assert drawn(strategy, 21) == once
    assert [sorted(step) for step in other] != [sorted(step) for step in once[:5]]
    # "More replay" is twice of all.
    for step in drawn(made(cls), 3, times=2):
        assert Counter(group for group, _ in step) == {EARLIER: 8, GENERAL: 6}
        assert {"old0", "old8", "old5", "old2"} <= {key for _, key in step}


def test_draws_of_a_lesson() -> None:
    check_draws(Rehearsed)


class AlwaysTheFirst(Rehearsed):
    def mix(self, ctx: Context, examples: list[Example]) -> list[Example]:
        self._step = 0
        return super().mix(ctx, examples)


class OneOrder(Rehearsed):
    """Every lesson has the same draws."""

    def begin(self, lesson: str, *others: Any) -> None:
        super().begin("", *others)


class GoesOn(Rehearsed):
    """Where the lesson before stopped, the next one goes on: what is drawn hangs on what was taught before."""

    def begin(self, *given: Any) -> None:
        step = self._step
        super().begin(*given)
        self._step = step


class MostSure(Rehearsed):
    def begin(self, lesson: str, seed: int, earlier: Any, sure: Any, times: int = 1) -> None:
        super().begin(lesson, seed, earlier, [-x for x in sure], times)


class NeverTwice(Rehearsed):
    """As many rows, whatever the form."""

    def begin(self, lesson: str, seed: int, earlier: Any, sure: Any, times: int = 1) -> None:
        super().begin(lesson, seed, earlier, sure)


class OneGroup(Rehearsed):
    """What is rehearsed shares a mean with the lesson, which counts the less the more is rehearsed."""

    def mix(self, ctx: Context, examples: list[Example]) -> list[Example]:
        return [row.but(group="task") for row in super().mix(ctx, examples)]


@pytest.mark.parametrize("wrong", [AlwaysTheFirst, OneOrder, GoesOn, MostSure, NeverTwice, OneGroup])
def test_wrong_draws_are_caught(wrong: Any) -> None:
    with pytest.raises(AssertionError):
        check_draws(wrong)


@pytest.mark.parametrize(("earlier", "general", "rows"), [(0, 0, 7), (4, 3, 0), (3, 1, 2), (50, 50, 7)])
def test_fewer_rows_than_are_asked_for(earlier: int, general: int, rows: int) -> None:
    steps = drawn(made(Rehearsed, earlier, general, rows), 4)
    for step in steps:
        counts = Counter(group for group, _ in step)
        assert counts[EARLIER] == min(earlier, len(OLD))
        assert counts[GENERAL] == min(general, rows)
        assert len(set(step)) == len(step)


def test_a_step_that_is_not_taken_draws_again() -> None:
    strategy = made(Rehearsed)
    strategy.begin("a", 0, OLD, SURE)
    strategy.mix(CTX, list(NEW))
    mark = strategy.bookmark()
    second = [row.key for row in strategy.mix(CTX, list(NEW))]
    strategy.turn_back(mark)
    assert [row.key for row in strategy.mix(CTX, list(NEW))] == second


# The loss of a step

EARLIER_ROWS = [("w9 w8", "w7 w6"), ("w5", "w4"), ("w3 w2 w1", "w11 w12 w13")]


def check_gradient(make: Callable[..., Any]) -> None:
    """Row by row: the mean over the lesson's targets, that over the earlier rows', and 3 times the mean KL of the
    general rows' targets from what the base said."""
    pupil = make(anchor=3.0, earlier=2, general=2).pupil
    held = {row.key: row for row in pupil._rehearsed.rows[GENERAL]}
    base = dict(zip(held, log_probabilities(pupil.learner, list(held.values())), strict=True))
    pupil.learn(Matter("w1 w2 w3", "w30"), [], [])
    lesson, earlier = pupil.taught(Matter("w1 w5", "w31 w32")), [pupil.row(*pair) for pair in EARLIER_ROWS]
    pupil._rehearsed.begin("a", 0, earlier, [0.3, 0.2, 0.1])
    pupil.learner.begin_task(Task("lesson", lesson), 0)
    rows, *_ = pupil.learner._gradients(pupil.learner.ctx, lesson)
    found = {name: p.grad.clone() for name, p in pupil._trained().items()}
    assert Counter(row.group for row in rows) == {"task": 1, EARLIER: 2, GENERAL: 2}

    sums: dict[str, Any] = dict.fromkeys(("task", EARLIER, GENERAL), 0.0)
    counts: Counter[str] = Counter()
    for row in rows:
        logs = pupil.model(input_ids=row.x[None]).logits[0, :-1].log_softmax(-1)
        for place, label in enumerate(row.y[1:].tolist()):
            if label == IGNORE:
                continue
            if row.group == GENERAL:
                p = base[row.key][counts[row.key]].exp()
                term = (p * (p.log() - logs[place])).sum()
                counts[row.key] += 1
            else:
                term = -logs[place, label]
            sums[row.group] = sums[row.group] + term
            counts[row.group] += 1
    loss = sum((3.0 if group == GENERAL else 1.0) * total / counts[group] for group, total in sums.items())
    assert float(sums[GENERAL].detach()) > 1e-3, "the model has gone from the base"
    names = list(found)
    wanted = torch.autograd.grad(loss, [pupil._trained()[name] for name in names])
    for name, gradient in zip(names, wanted, strict=True):
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


def test_the_gradient_of_a_step(teacher: Callable[..., Any]) -> None:
    check_gradient(teacher)


class WithAnswers(Rehearsed):
    """The general rows' own answers are learnt too."""

    weights: Mapping[str, float] = MappingProxyType({})


class FromTheModel(Rehearsed):
    """KL(model ‖ base)."""

    def penalty(self, ctx: Context, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        total = torch.zeros(())
        for i, row in enumerate(batch.examples):
            if row.group == GENERAL:
                now = output.logits[i, :-1][batch.y[i, 1:] != IGNORE].log_softmax(-1)
                total = total + (now.exp() * (now - self._base[row.key])).sum()
        return {GENERAL: self.anchor * total}


class OverTheStep(Rehearsed):
    """The penalty is a mean over all rows' targets, so that it weighs less the more is learnt."""

    def penalty(self, ctx: Context, batch: Batch, output: Output) -> Any:
        return sum(super().penalty(ctx, batch, output).values())


class Unanchored(Rehearsed):
    def penalty(self, ctx: Context, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        return {}


@pytest.mark.parametrize("wrong", [WithAnswers, FromTheModel, OverTheStep, Unanchored])
def test_wrong_losses_are_caught(
    teacher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, wrong: type[Rehearsed]
) -> None:
    monkeypatch.setattr("perdure.teaching.pupil.Rehearsed", wrong)
    with pytest.raises(AssertionError):
        check_gradient(teacher)


# When a lesson ends


def check_ends(make: Callable[..., Any], facts: list[tuple[str, str]], cls: type[Pupil] = Pupil) -> None:
    """Eight lessons on end: one that ends before its steps do leaves itself sure and each earlier one right.

    At least once something else broke while what had been wrong was mended.
    """
    pupil = make(max_steps=60, lr=0.06, earlier=2).pupil
    pupil.__class__ = cls
    rows: list[Example] = []
    for prompt, answer in facts:
        sure = [mark.sure for mark in Pupil.marks(pupil, rows)]
        steps = pupil.learn(Matter(prompt, answer), rows, sure)
        rows.append(pupil.row(prompt, answer))
        found = Pupil.marks(pupil, rows)
        if steps < 60:
            assert found[-1].sure >= pupil.settings.sure
            assert all(mark.right for mark in found)


def test_a_lesson_ends_when_nothing_is_wrong(teacher: Callable[..., Any], facts: list[tuple[str, str]]) -> None:
    check_ends(teacher, facts)


class AloneSure(Pupil):
    """A lesson ends as soon as it is sure itself."""

    def learn(self, matter: Matter, earlier: Any, sure: Any, more: bool = False) -> int:
        return super().learn(matter, [], [])


class NeverAgain(Pupil):
    """Those that were wrong at the first look at all are mended; what breaks meanwhile is not seen."""

    whole, looks = 0, 0

    def learn(self, matter: Matter, earlier: Any, sure: Any, more: bool = False) -> int:
        self.whole, self.looks = len(earlier) + 1, 0
        try:
            return super().learn(matter, earlier, sure, more)
        finally:
            self.whole = 0

    def marks(self, rows: Any) -> Any:
        found = super().marks(rows)
        self.looks += len(rows) == self.whole > 1
        return found if self.looks < 2 else [replace(mark, right=True) for mark in found]


@pytest.mark.parametrize("wrong", [AloneSure, NeverAgain])
def test_lessons_that_end_too_soon_are_caught(
    teacher: Callable[..., Any], facts: list[tuple[str, str]], wrong: type[Pupil]
) -> None:
    with pytest.raises(AssertionError):
        check_ends(teacher, facts, wrong)
