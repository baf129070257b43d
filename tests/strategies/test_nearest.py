"""Prototypes against means and cosines worked by hand, and what a row's features may not depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from perdure.config import TrainingSettings
from perdure.errors import StrategyError
from perdure.models.adapters import tune
from perdure.models.objectives import collate
from perdure.strategies import PNN, Naive
from perdure.strategies.nearest import Prototypes, features
from perdure.training.learner import Learner
from perdure.types import IGNORE, Example, Task


def pairs(task: str, *points: tuple[float, float]) -> list[Example]:
    return [Example(f"{task}{i}", task, x=torch.tensor(p), y=torch.tensor(0)) for i, p in enumerate(points)]


def learnt(*tasks: list[Example], make: Callable[[], Prototypes] = Prototypes) -> tuple[Prototypes, Learner]:
    """Prototypes of rows that go straight into the last linear layer."""
    learner = Learner(nn.Sequential(nn.Linear(2, 2)), Naive(), "classification", TrainingSettings(), 0)
    found = make()
    for index, rows in enumerate(tasks):
        learner.begin_task(Task(rows[0].task, rows), index)
        assert learner.ctx is not None
        found.learn(learner.ctx)
    return found, learner


FIRST = pairs("a", (9.0, 12.0), (11.0, 10.0))
SECOND = pairs("b", (12.0, 9.0), (12.0, 9.0), (15.0, 9.0))


def check_by_hand(make: Callable[[], Prototypes] = Prototypes) -> None:
    """Means (10, 11) and (13, 9); their centre (11.5, 10), from which they point to (-1.5, 1) and (1.5, -1).

    The rows lie at (-0.5, 0.2), (0.5, -0.1), (8.5, 4) and (-6.5, -4.8) from it: a and b by the signs of both, then
    b, since 1.5 · 8.5 - 4 = 8.75 is above 0, and a, since 1.5 · 6.5 - 4.8 = 4.95 is.
    """
    found, learner = learnt(FIRST, SECOND, make=make)
    assert found.means["a"].tolist() == [10, 11]
    assert found.means["b"].tolist() == [13, 9]
    batch = collate(pairs("?", (11.0, 10.2), (12.0, 9.9), (20.0, 14.0), (5.0, 5.2)), "classification")
    assert found.nearest(learner.model, batch, "classification") == ["a", "b", "b", "a"]


def test_the_nearest_by_hand() -> None:
    check_by_hand()


class Uncentred(Prototypes):
    """Cosines from the origin."""

    def nearest(self, model: Any, batch: Any, objective: Any, serving: Any = None) -> list[str]:
        found = features(model, batch, objective)
        known = torch.stack(list(self.means.values()))
        cosines = nn.functional.normalize(found, dim=1) @ nn.functional.normalize(known, dim=1).T
        return [list(self.means)[i] for i in cosines.argmax(1).tolist()]


class LastRowOnly(Prototypes):
    def learn(self, ctx: Any, serving: Any = None) -> None:
        super().learn(ctx.but(task=Task(ctx.task.name, ctx.task.train[-1:])))


@pytest.mark.parametrize("mutant", [LastRowOnly])
def test_wrong_versions_are_caught(mutant: type[Prototypes]) -> None:
    with pytest.raises(AssertionError):
        check_by_hand(mutant)


def test_directions_are_from_the_centre() -> None:
    """All features point the same way but for a little: from the origin the larger norm's noise decides."""
    first, second = pairs("a", (100.0, 1.0)), pairs("b", (104.0, 1.0))
    batch = collate(pairs("?", (103.0, 0.9), (101.0, 1.1)), "classification")
    found, learner = learnt(first, second)
    assert found.nearest(learner.model, batch, "classification") == ["b", "a"]
    wrong, learner = learnt(first, second, make=Uncentred)
    again = collate(pairs("?", (103.0, 1.1), (101.0, 0.9)), "classification")
    assert found.nearest(learner.model, again, "classification") == ["b", "a"]
    assert wrong.nearest(learner.model, again, "classification") != ["b", "a"]


def test_without_any_no_task_is_named() -> None:
    """Nor is the row's own, which would be told in disguise."""
    found, learner = Prototypes(), learnt(FIRST)[1]
    assert found.nearest(learner.model, collate(FIRST, "classification"), "classification") == ["", ""]


def test_the_last_layer_is_found_behind_adapters_and_in_classifiers(make_lm: Any) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    from perdure.strategies.nearest import _last_linear

    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    classifier = BertForSequenceClassification(config)
    assert _last_linear(classifier) is classifier.classifier
    wrapped = get_peft_model(
        nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3)), LoraConfig(r=1, target_modules=["0", "1"])
    )
    found = _last_linear(wrapped)
    assert found is wrapped.base_model.model[1]
    assert found.base_layer.out_features == 3


def test_state_goes_through(tmp_path: Any) -> None:
    from perdure.training import checkpoint

    found, learner = learnt(SECOND, FIRST)
    checkpoint.save(tmp_path / "saved", found.state_dict())
    other = Prototypes()
    other.load_state_dict(checkpoint.load(tmp_path / "saved"))
    assert list(other.means) == ["b", "a"]
    batch = collate(FIRST, "classification")
    assert other.nearest(learner.model, batch, "classification") == ["a", "a"]


@pytest.mark.parametrize("tuning", [None, "lora", "soft-prompt"])
def test_features_of_text_are_the_prompts_alone(make_lm: Any, tuning: Any) -> None:
    """Against the model's own hidden states; neither the answer nor padding nor other rows change them."""
    model = make_lm("llama") if tuning is None else tune(make_lm("llama"), tuning)
    model.train()
    ids = torch.arange(3, 12)
    labels = torch.full((9,), IGNORE)
    labels[4:] = ids[4:]
    row = Example("1", "t", x=ids, y=labels)
    other = row.but(
        x=torch.cat([ids[:4], torch.tensor([30, 31])]), y=torch.cat([labels[:4], torch.tensor([30, 31])])
    )
    longer = Example("2", "t", x=torch.arange(1, 20), y=torch.arange(1, 20))
    alone = features(model, collate([row], "causal_lm"), "causal_lm")
    torch.testing.assert_close(features(model, collate([other], "causal_lm"), "causal_lm"), alone)
    torch.testing.assert_close(features(model, collate([longer, row], "causal_lm"), "causal_lm")[1:], alone)
    assert model.training
    if tuning is None:
        model.eval()
        hidden = model.model(input_ids=ids[None, :4]).last_hidden_state.detach()
        torch.testing.assert_close(alone, hidden.mean(1))


def test_a_rule_of_another_name_is_refused() -> None:
    with pytest.raises(StrategyError, match="infer"):
        PNN(infer="neares")  # type: ignore[arg-type]


def test_a_regression_is_inferred_by_what_is_nearest_only() -> None:
    for rule, can in (("nearest", True), ("surest", False)):
        learner = Learner(nn.Linear(2, 1), PNN(infer=rule), "regression", TrainingSettings(), 0)  # type: ignore[arg-type]
        assert learner.infers is can
