"""Scores of greedy answers: what is generated for, how answers are read, and which rule they are scored by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from perdure.config import EvaluationSettings, TrainingSettings
from perdure.strategies import Naive
from perdure.streams.encode import Encoder
from perdure.training.learner import Learner
from perdure.training.measure import Measure
from perdure.types import Example, Segment


@pytest.fixture
def measure(make_lm: Any) -> Measure:
    """With a tokenizer that has no BOS and tidies spaces before punctuation away."""
    names = ["?", "a", "</s>", ",", *(f"w{i}" for i in range(36))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", eos_token="</s>", clean_up_tokenization_spaces=True
    )
    learner = Learner(make_lm(seed=3, spread=0.3), Naive(), "causal_lm", TrainingSettings(), 0)
    return Measure(learner, Encoder(wrapped, 16), EvaluationSettings(), 0)


def row(measure: Measure, key: str, prompt: str, answer: str) -> Example:
    found = measure.encoder.encode(Example(key, "t", (Segment(prompt), Segment(answer, learn=True))))
    assert found is not None
    return found


def test_an_answer_keeps_its_spaces(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers with the reference's own tokens is right."""
    question = row(measure, "1", "w1 w2 ", "a , a")
    assert question.y is not None
    answer = question.y[question.y != -100][:-1].tolist()
    monkeypatch.setattr("perdure.training.measure.generate", lambda *_: [answer])
    assert measure("t", [question])["exact_match"] == 1


def test_each_set_is_scored_by_its_own_rule(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers "a a w1" and "w2" to "w1" and "w2".

    Without the article "a", HotpotQA's rule finds both right: "w1" is left of the first. By white space alone the
    first is wrong: 1/2. Against "w1 w3" and "w2" one of two words is common: P = 1, R = 1/2, F1 = 2/3, mean 5/6.
    """
    monkeypatch.setattr(measure, "answers", lambda prompts, *_: ["a a w1", "w2"][: len(prompts)])
    measure.rules.update(hotpot="hotpot", math="math")
    rows = [row(measure, "1", "w5 ", "w1"), row(measure, "2", "w6 ", "w2")]
    more = [row(measure, "3", "w5 ", "w1 w3"), row(measure, "4", "w6 ", "w2")]
    found = {name: measure(name, rows) for name in ("plain", "hotpot", "math")}
    for values in found.values():
        values.pop("loss")
    assert found == {
        "plain": {"exact_match": 0.5},
        "hotpot": {"exact_match": 1.0, "f1": 1.0},
        "math": {"exact_match": 0.5},
    }
    measure.rules["more"] = "hotpot"
    found = measure("more", more)
    assert (found["exact_match"], found["f1"]) == (0.5, pytest.approx(5 / 6))


def test_a_rule_holds_told_and_inferred(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second row is taken for one of another task, and its answer there is wrong: 1 told, 1/2 inferred."""
    rows = [row(measure, "1", "w5 ", "w1"), row(measure, "2", "w6 ", "w2")]

    def answers(prompts: Any, *_: Any) -> list[str]:
        return [("a w1" if prompt.key == "1" else "w2") if prompt.task == "t" else "w3" for prompt in prompts]

    def identified(given: Any) -> list[Example]:
        return [r.but(task="u") if r.key == "2" else r for r in given]

    monkeypatch.setattr(measure, "answers", answers)
    monkeypatch.setattr(measure.learner, "identified", identified)
    monkeypatch.setattr(type(measure.learner), "infers", property(lambda _: True))
    measure.rules["t"] = "hotpot"
    found = {metric: value for metric, value in measure("t", rows).items() if "loss" not in metric}
    assert found == {"exact_match": 1.0, "f1": 1.0, "exact_match_inferred": 0.5, "f1_inferred": 0.5}
    untold = {metric: value for metric, value in measure("t", rows, told=False).items() if "loss" not in metric}
    assert untold == {"exact_match": 0.5, "f1": 0.5}


def test_rows_with_nothing_before_the_answer_are_scored_by_their_loss(measure: Measure) -> None:
    """Without BOS an empty prompt has no token to go on from."""
    empty, other = row(measure, "1", "", "w3 w4"), row(measure, "2", "w1 w2 ", "a")
    assert set(measure("empty", [empty])) == {"loss"}
    assert measure("both", [empty, other])["exact_match"] == measure("other", [other])["exact_match"]


def test_no_row_is_gone_on_with_past_the_longest_that_is_allowed(measure: Measure) -> None:
    """A long prompt beside a long answer: together they are 15 + 15 tokens, of 16 that are allowed."""
    rows = [row(measure, "1", "w1 " * 14, "a"), row(measure, "2", "w2 ", "w3 " * 14)]
    seen: list[int] = []
    hook = measure.learner.model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            seen.append(int(kwargs["position_ids"].max())) if "position_ids" in kwargs else None
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        measure("t", rows)
    hook.remove()
    assert max(seen) < 16
