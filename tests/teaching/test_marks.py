"""Marks against greedy generation and single rows; the distance from the base against KL row by row."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.models.load import load
from perdure.teaching.lesson import Matter
from perdure.teaching.marks import Distance, Mark, cut, log_probabilities, marks
from perdure.teaching.probe import of_nano
from perdure.teaching.pupil import Pupil
from perdure.teaching.settings import TeachSettings
from perdure.types import IGNORE, Example

TAUGHT = Matter("Who found the red ball?", "Anna.")
# Prompts of 1 to 12 words with answers of 1 to 4.
RAGGED = [
    Matter(" ".join(f"w{(5 * i + j) % 37}" for j in range(1 + i)), " ".join(f"w{i + j}" for j in range(1 + i % 4)))
    for i in range(12)
]
SETTINGS = TeachSettings(probe_rows=60, general=2, earlier=2, max_steps=6, lr=1e-3)


@pytest.fixture(scope="module")
def nano() -> tuple[Pupil, list[Matter], list[Example]]:
    """nano, 60 rows of its probe, and the same rows encoded."""
    pupil = Pupil(load("nano"), SETTINGS)
    probe = of_nano(60, 8)
    rows = [pupil.row(row.prompt, row.answer) for row in probe.measured]
    pupil.rehearse([pupil.row(row.prompt, row.answer, "general") for row in probe.training])
    return pupil, list(probe.measured), rows


@pytest.fixture
def pupil(teacher: Callable[..., Any]) -> Pupil:
    found: Pupil = teacher().pupil
    return found


def ragged(pupil: Pupil) -> list[Example]:
    return [pupil.row(matter.prompt, matter.answer) for matter in RAGGED]


def logits_of(pupil: Pupil, row: Example) -> Tensor:
    """[T, V] in fp64, of one row alone, by the model itself."""
    assert row.x is not None
    with torch.no_grad():
        return pupil.model.eval()(input_ids=row.x[None]).logits[0].double()


def test_right_is_what_greedy_generation_gives(nano: tuple[Pupil, list[Matter], list[Example]]) -> None:
    pupil, matters, rows = nano
    found = [mark.right for mark in pupil.marks(rows)]
    answers = pupil.answers(rows)
    assert found == [answer == row.answer for answer, row in zip(answers, matters, strict=True)]
    assert 10 < sum(found) < 60, "both kinds are there"


def by_hand(pupil: Pupil, row: Example) -> Mark:
    """Token by token: its own probability is exp(logit) over the sum of all."""
    assert row.x is not None
    assert row.y is not None
    logits, values, firsts = logits_of(pupil, row), [], []
    for place in range(1, len(row.x)):
        if row.y[place] != IGNORE:
            own = logits[place - 1]
            values.append(float(own[row.y[place]].exp() / own.exp().sum()))
            firsts.append(int(own.argmax()) == int(row.y[place]))
    return Mark(all(firsts), min(values), -sum(map(math.log, values)) / len(values))


Marks = Callable[[Any, list[Example]], list[Mark]]


def check_marks(pupil: Pupil, of: Marks) -> None:
    """Rows of all lengths in one batch, against each alone."""
    rows = ragged(pupil)
    for matter in RAGGED[4:7]:  # so that some are right
        pupil.learn(matter, [], [])
    found, wanted = of(pupil.learner, rows), [by_hand(pupil, row) for row in rows]
    assert [mark.right for mark in found] == [mark.right for mark in wanted]
    assert 0 < sum(mark.right for mark in found) < len(rows)
    for mark, other in zip(found, wanted, strict=True):
        assert mark.sure == pytest.approx(other.sure, abs=1e-5)
        assert mark.loss == pytest.approx(other.loss, abs=1e-5)


def test_marks_of_ragged_rows(pupil: Pupil) -> None:
    check_marks(pupil, marks)
    alone = [marks(pupil.learner, [row])[0] for row in ragged(pupil)]
    for mark, other in zip(marks(pupil.learner, ragged(pupil)), alone, strict=True):
        assert mark.sure == pytest.approx(other.sure, abs=1e-5)
        assert mark.loss == pytest.approx(other.loss, abs=1e-5)
    assert marks(pupil.learner, []) == []


def test_batches_cost_least() -> None:
    """Against all ways to cut 9 rows: longest · rows + what a batch costs, summed over the batches."""
    rng = random.Random(0)
    for most, fixed in ((9, 3), (9, 12), (4, 12), (9, 1000), (9, 0)):
        lengths = tuple(sorted(rng.randint(1, 20) for _ in range(9)))
        costs = {}
        for ends in itertools.chain.from_iterable(itertools.combinations(range(1, 9), k) for k in range(9)):
            sizes = tuple(b - a for a, b in itertools.pairwise((0, *ends, 9)))
            if max(sizes) <= most:
                costs[sizes] = sum(
                    fixed + size * lengths[end - 1] for size, end in zip(sizes, (*ends, 9), strict=True)
                )
        assert costs[cut(lengths, most, fixed)] == min(costs.values())
    assert cut((), 64, 96) == ()


def check_known(pupil: Pupil) -> None:
    """After each change of the weights, marks are those of the model as it is."""
    rows, before = ragged(pupil), pupil.weights()
    for change in (
        lambda: None,
        lambda: pupil.learn(RAGGED[5], [], []),
        lambda: pupil.put(before),
        lambda: pupil.learn(RAGGED[7], [], []),
    ):
        change()
        assert pupil.marks(rows) == pupil.marks(rows) == marks(pupil.learner, rows)
    assert pupil.marks(rows[:3]) == marks(pupil.learner, rows[:3])


def test_what_is_known_goes_with_the_weights(pupil: Pupil) -> None:
    check_known(pupil)


def test_marks_that_outlive_the_weights_are_caught(pupil: Pupil, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[Any, Any] = {}
    monkeypatch.setattr(pupil, "_known", lambda: known)
    with pytest.raises(AssertionError):
        check_known(pupil)


def test_what_is_right_is_said_without_generating(
    nano: tuple[Pupil, list[Matter], list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pupil, _, rows = nano
    found, wanted = pupil.marks(rows), pupil.answers(rows)
    assert pupil.said(rows, found) == wanted
    assert any(len(answer.split()) > 1 for answer, mark in zip(wanted, found, strict=True) if mark.right)
    generated: list[int] = []
    replies = pupil.replies
    monkeypatch.setattr(
        pupil, "replies", lambda rows, most=None: generated.append(len(rows)) or replies(rows, most)
    )
    pupil.said(rows, found)
    assert generated == [sum(not mark.right for mark in found)]
    # An answer that is longer than what is generated is cut as generation cuts it.
    monkeypatch.setattr(pupil, "settings", pupil.settings.model_copy(update={"max_new_tokens": 1}))
    assert pupil.said(rows, found) == pupil.answers(rows) != wanted
    assert all(reply.cut for reply in pupil.replies(rows[:5]))


def in_batch_order(learner: Any, rows: list[Example]) -> list[Mark]:
    """Marks come as the batches do: by length."""
    return marks(learner, sorted(rows, key=lambda row: -len(row.x)))  # type: ignore[arg-type]


def of_the_prompt_too(learner: Any, rows: list[Example]) -> list[Mark]:
    """The prompt's own tokens count."""
    return marks(learner, [row.but(y=row.x) for row in rows])


def without_the_end(learner: Any, rows: list[Example]) -> list[Mark]:
    """An answer that does not end where it should counts as right."""
    return marks(learner, [row.but(y=torch.cat([row.y[:-1], torch.tensor([IGNORE])])) for row in rows])  # type: ignore


def not_shifted(learner: Any, rows: list[Example]) -> list[Mark]:
    """Each token is looked for at its own place."""
    return marks(
        learner, [row.but(y=torch.cat([torch.tensor([IGNORE]), row.y[:-1]])) for row in rows]  # type: ignore
    )  # fmt: skip


@pytest.mark.parametrize("wrong", [in_batch_order, of_the_prompt_too, without_the_end, not_shifted])
def test_wrong_marks_are_caught(pupil: Pupil, wrong: Marks) -> None:
    with pytest.raises(AssertionError):
        check_marks(pupil, wrong)


def test_log_probabilities_of_ragged_rows(pupil: Pupil) -> None:
    rows = ragged(pupil)
    for row, found in zip(rows, log_probabilities(pupil.learner, rows), strict=True):
        assert row.y is not None
        wanted = logits_of(pupil, row)[:-1][row.y[1:] != IGNORE].log_softmax(-1)
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() < 1e-5


def check_distance(pupil: Pupil, cls: Any) -> None:
    """0 at the start; after a lesson Σ p·(log p − log q) over all words, a mean over the tokens of all rows."""
    rows = ragged(pupil)
    distance = cls(pupil.learner, rows)
    base = [logits_of(pupil, row)[:-1] for row in rows]
    assert distance(pupil.learner) == pytest.approx(0, abs=1e-7)
    pupil.learn(Matter("w1 w2 w3", "w30"), [], [])
    total, tokens = 0.0, 0
    for row, before in zip(rows, base, strict=True):
        p, now = before.softmax(-1), logits_of(pupil, row)[:-1]
        for place in range(len(p)):
            total += float((p[place] * (p[place] / now[place].softmax(-1)).log()).sum())
            tokens += 1
    assert total / tokens > 0.01
    assert distance(pupil.learner) == pytest.approx(total / tokens, rel=1e-4)


def test_the_distance_is_kl_from_the_base(pupil: Pupil) -> None:
    check_distance(pupil, Distance)
    assert math.isnan(Distance(pupil.learner, [])(pupil.learner))


def test_one_look_for_marks_and_distance(pupil: Pupil) -> None:
    """The distance is taken on those of its rows that are looked at."""
    rows = ragged(pupil)
    distance, fewer = Distance(pupil.learner, rows[:6]), Distance(pupil.learner, rows[:4])
    pupil.learn(Matter("w1 w2 w3", "w30"), [], [])
    found, kl = distance.beside(pupil.learner, rows)
    assert found == marks(pupil.learner, rows)
    assert kl == pytest.approx(distance(pupil.learner), rel=1e-5)
    assert distance.beside(pupil.learner, [*rows[:4], *rows[6:]])[1] == pytest.approx(
        fewer(pupil.learner), rel=1e-5
    )
    assert math.isnan(distance.beside(pupil.learner, rows[6:])[1])


class Swapped(Distance):
    """KL(model ‖ base)."""

    def __call__(self, learner: Any) -> float:
        found = [
            d
            for row, base in zip(self._rows, self._base.values(), strict=True)
            for d in self._each(learner, row, base)
        ]
        return float(torch.stack(found).mean())

    def _each(self, learner: Any, row: Example, base: Tensor) -> list[Tensor]:
        with torch.no_grad():
            now = learner.model.eval()(input_ids=row.x[None]).logits[0, :-1].log_softmax(-1)  # type: ignore[index]
        return [self.between(one, other) for one, other in zip(base, now, strict=True)]

    def between(self, base: Tensor, now: Tensor) -> Tensor:
        return (now.exp() * (now - base)).sum()


class OverTheWords(Swapped):
    """A mean over the vocabulary too, as PyTorch's `reduction="mean"` takes it."""

    def between(self, base: Tensor, now: Tensor) -> Tensor:
        return (base.exp() * (base - now)).mean()


class RowByRow(Swapped):
    """Right, but that each row counts alike, however long it is."""

    def __call__(self, learner: Any) -> float:
        means = [
            torch.stack(self._each(learner, row, base)).mean()
            for row, base in zip(self._rows, self._base.values(), strict=True)
        ]
        return float(torch.stack(means).mean())

    def between(self, base: Tensor, now: Tensor) -> Tensor:
        return (base.exp() * (base - now)).sum()


@pytest.mark.parametrize("wrong", [Swapped, OverTheWords, RowByRow])
def test_wrong_distances_are_caught(pupil: Pupil, wrong: Any) -> None:
    with pytest.raises(AssertionError):
        check_distance(pupil, wrong)


def test_a_lesson_on_nano_is_learnt_and_moves_it(nano: tuple[Pupil, list[Matter], list[Example]]) -> None:
    pupil, _, rows = nano
    before, distance = pupil.weights(), pupil.distance(rows[:8])
    assert distance(pupil.learner) == pytest.approx(0, abs=1e-6)
    assert 0 < pupil.learn(TAUGHT, [], []) <= SETTINGS.max_steps
    assert pupil.learn(TAUGHT, [], []) == 0, "what is known takes no steps"
    taught = pupil.taught(TAUGHT)
    assert pupil.answers(taught) == ["Anna."]
    assert pupil.marks(taught)[0].right
    assert distance(pupil.learner) > 1e-5
    pupil.put(before)
    assert distance(pupil.learner) == pytest.approx(0, abs=1e-6)


def test_a_large_vocabulary_leaves_room_for_fewer_rows(pupil: Pupil, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 words and rows of T tokens (T − 1)·40 numbers each are held, until they are more than there is room."""
    rows = ragged(pupil)
    lengths = [len(row.x) - 1 for row in rows]  # type: ignore[arg-type]
    monkeypatch.setattr("perdure.teaching.marks.FEW", 40 * sum(lengths[:5]))
    distance = Distance(pupil.learner, rows)
    assert len(distance._rows) == 5
