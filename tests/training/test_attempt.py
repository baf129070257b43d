"""An answer by one pass and what must be generated after it, against generating it all."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from perdure.config import EvaluationSettings, TrainingSettings
from perdure.evaluation.generate import generate, ids_of
from perdure.models.adapters import tune
from perdure.models.load import load
from perdure.strategies import Naive
from perdure.streams.arena import KINDS, short
from perdure.streams.arena import generate as draw
from perdure.streams.encode import Encoder
from perdure.training import attempt as module
from perdure.training.attempt import attempt
from perdure.training.learner import Learner
from perdure.training.measure import Measure
from perdure.types import Example, Segment, Task


@pytest.fixture(scope="module", params=["full", "soft-prompt"])
def measure(request: Any) -> Measure:
    """Nano after a few steps on problems, so that some answers are right, some begin right, and some do not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        language = load("nano")
        model = tune(language.model, request.param)
        encoder = Encoder(language.tokenizer, language.max_length - 8)
        settings = TrainingSettings.model_validate({"optimizer": {"lr": 3e-4 if request.param == "full" else 0.1}})
        learner = Learner(model, Naive(), "causal_lm", settings, 0)
        found = Measure(learner, encoder, EvaluationSettings(), 0)
        learner.begin_task(Task("a", rows(found, 7)), 0)
        for row in rows(found, 7):
            learner.step([row])
    return found


def rows(measure: Measure, seed: int, count: int = 6) -> list[Example]:
    items = [short(item) for kind in KINDS for item in draw(kind, count, seed)]
    examples = [Example(i.key, i.kind, (Segment(i.prompt), Segment(i.answer, learn=True))) for i in items]
    return [row for row in measure.encoder.encode_many(examples) if row is not None]


def alone(measure: Measure, row: Example, limit: int) -> str:
    """The row's greedy answer, generated from its prompt token by token."""
    prompt = measure.prompt(row)
    assert prompt is not None
    [tokens] = generate(measure.learner.model, [ids_of(prompt)], limit, measure.encoder.eos)
    return measure.text(tokens)


@pytest.mark.parametrize("limit", [2, 30])
def test_it_is_the_greedy_answer(measure: Measure, limit: int) -> None:
    asked = rows(measure, 1)
    found = [attempt(measure, row, limit) for row in asked]
    assert [one.text for one in found] == [alone(measure, row, limit) for row in asked]
    references = [measure.encoder.reference(row) for row in asked]
    assert [one.right for one in found] == [
        a.text.split() == b.split() for a, b in zip(found, references, strict=True)
    ]
    if limit > 2:
        assert 0 < sum(one.right for one in found) < len(found), "the check must see both"


def test_its_loss_is_the_row_s(measure: Measure) -> None:
    for row in rows(measure, 2, 1):
        assert attempt(measure, row, 8).loss == pytest.approx(measure.learner.score([row])["loss"], abs=1e-5)


def test_a_right_answer_costs_one_pass(measure: Measure) -> None:
    right = next(row for row in rows(measure, 3) if attempt(measure, row, 30).right)
    with patch.object(Measure, "tokens", side_effect=AssertionError("nothing need be generated")):
        assert attempt(measure, right, 30).right


def test_the_model_is_left_as_it_was(measure: Measure) -> None:
    model = measure.learner.model
    model.train()
    before = [parameter.grad for parameter in model.parameters()]
    attempt(measure, rows(measure, 4, 1)[0], 10)
    assert model.training
    assert [parameter.grad for parameter in model.parameters()] == before


def test_an_answer_without_a_question_is_not_right(measure: Measure) -> None:
    row = measure.encoder.encode(Example("bare", "a", (Segment("Anna.", learn=True),)))
    assert row is not None
    if measure.encoder.bos:
        assert attempt(measure, row, 5).text == alone(measure, row, 5)
    else:
        assert attempt(measure, row, 5) == module.Attempt("", pytest.approx(attempt(measure, row, 5).loss), False)
