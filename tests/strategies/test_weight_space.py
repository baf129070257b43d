"""EWC in the space of the full weights that LoRA changes, against the same on the weights themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.config import TrainingSettings, validate
from perdure.errors import StrategyError
from perdure.models.adapters import tune
from perdure.strategies import EWC, weight_space
from perdure.training.learner import Learner
from perdure.types import Example, Task

STRENGTH = 3.0


pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def tuned(make_lm: Callable[..., Any]) -> tuple[Any, list[Example]]:
    """A LoRA-tuned Llama in float64 whose adapters do something, and ragged rows."""
    model = tune(make_lm("llama"), "lora", r=2, alpha=6, dropout=0.3).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    rows = []
    for i, length in enumerate((5, 8, 6)):
        ids = (torch.arange(length) * (i + 3)) % 37
        labels = ids.clone()
        labels[: i + 1] = -100
        rows.append(Example(str(i), "t", x=ids, y=labels))
    return model, rows


def learnt(model: Any, rows: list[Example], strategy: EWC) -> Learner:
    """A learner that has just ended its first task without moving a weight."""
    settings = {"optimizer": {"type": "sgd", "lr": 0.1}}
    learner = Learner(model, strategy, "causal_lm", validate(TrainingSettings, settings, "test"), 0)
    learner.begin_task(Task("t", rows), 0)
    learner.end_task()
    learner.begin_task(Task("u", rows), 1)
    return learner


def deltas(model: Any) -> dict[str, Tensor]:
    """ΔW = (alpha / r) B·A of every adapted layer, written out."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[f"{name}.base_layer.weight"] = 3.0 * b @ a
    return found


def test_importance_is_the_fisher_of_the_merged_weights(tuned: tuple[Any, list[Example]]) -> None:
    """Row by row through a model without adapters, whose weights are W + ΔW."""
    model, rows = tuned
    strategy = EWC(STRENGTH, space="weight")
    learnt(model, rows, strategy)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    for p in merged.parameters():
        p.requires_grad_(True)
    expected: dict[str, Tensor] = {}
    for row in rows:
        logits = merged(input_ids=row.x[None]).logits[0, :-1]  # type: ignore[index]
        loss = F.cross_entropy(logits, row.y[1:], reduction="sum")  # type: ignore[index]
        merged.zero_grad()
        loss.backward()
        for name, p in merged.named_parameters():
            if p.grad is not None:
                expected[name] = expected.get(name, torch.zeros(())) + p.grad**2 / 3
    assert strategy.importance
    for name, value in strategy.importance.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        torch.testing.assert_close(value, expected[plain], rtol=0, atol=1e-12)
    for name, delta in deltas(model).items():
        torch.testing.assert_close(strategy.anchor[name], delta.detach(), rtol=0, atol=1e-14)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def check_pull(tuned: tuple[Any, list[Example]], make: Callable[[], EWC]) -> None:
    """The gradient of λ/2 Σ F (ΔW − ΔW*)² by A and B, through autograd, on weights that have moved on."""
    model, rows = tuned
    strategy = make()
    learner = learnt(model, rows, strategy)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    penalty = torch.zeros(())
    for name, delta in deltas(model).items():
        penalty = penalty + STRENGTH / 2 * (strategy.importance[name] * (delta - strategy.anchor[name]) ** 2).sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(penalty, trained)
    learner.optimizer.zero_grad()  # type: ignore[union-attr]
    learner._logged.clear()
    strategy.gradient(learner.ctx, [])  # type: ignore[arg-type]
    for p, g in zip(trained, expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-12)
    assert learner._logged["penalty"] == pytest.approx(float(penalty.detach()), rel=1e-12)


def test_the_pull_reaches_the_factors(tuned: tuple[Any, list[Example]]) -> None:
    check_pull(tuned, lambda: EWC(STRENGTH, space="weight"))


class NoScaling(EWC):
    """Wrong: alpha / r is left out of the chain rule."""

    def push(self, model: nn.Module, pulls: Any) -> None:
        super().push(model, {name: pull / 3.0 for name, pull in pulls.items()})


class OneFactor(EWC):
    """Wrong: the pull reaches B alone, as if A were a constant."""

    def push(self, model: nn.Module, pulls: Any) -> None:
        super().push(model, pulls)
        for layer in weight_space.layers(model).values():
            layer.lora_A["default"].weight.grad.zero_()


class OnTheFactors(EWC):
    """Wrong: the pull on ΔW is projected onto the factors by least squares instead of the chain rule."""

    def push(self, model: nn.Module, pulls: Any) -> None:
        for name, pull in pulls.items():
            layer = weight_space.layers(model)[name]
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.grad = STRENGTH * (torch.linalg.pinv(b.detach()) @ pull)
            b.grad = STRENGTH * (pull @ torch.linalg.pinv(a.detach()))


@pytest.mark.parametrize("mutant", [NoScaling, OneFactor, OnTheFactors])
def test_wrong_chain_rules_are_caught(tuned: tuple[Any, list[Example]], mutant: type[EWC]) -> None:
    with pytest.raises(AssertionError):
        check_pull(tuned, lambda: mutant(STRENGTH, space="weight"))


def test_which_factors_say_it_does_not_matter(tuned: tuple[Any, list[Example]]) -> None:
    """(A, B) → (2A, B/2) leaves ΔW as it is: no penalty in weight space, some in parameter space."""
    model, rows = tuned
    in_weights, in_parameters = EWC(STRENGTH, space="weight"), EWC(STRENGTH)
    learners = [learnt(model, rows, strategy) for strategy in (in_weights, in_parameters)]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(2.0 if "lora_A" in name else 0.5)
    values = []
    for learner, strategy in zip(learners, (in_weights, in_parameters), strict=True):
        learner._logged.clear()
        strategy.gradient(learner.ctx, [])  # type: ignore[arg-type]
        values.append(learner._logged["penalty"])
    assert values[0] < 1e-20 < 1e-3 < values[1]


def test_other_trained_weights_are_held_as_they_are(tuned: tuple[Any, list[Example]]) -> None:
    model, rows = tuned
    model.base_model.model.model.norm.weight.requires_grad_(True)
    strategy = EWC(STRENGTH, space="weight")
    learnt(model, rows, strategy)
    plain = EWC(STRENGTH)
    learnt(model, rows, plain)
    name = "base_model.model.model.norm.weight"
    torch.testing.assert_close(strategy.importance[name], plain.importance[name], rtol=0, atol=1e-12)
    assert not any("lora_" in key for key in strategy.importance)


def test_several_tasks_add_up_exactly(tuned: tuple[Any, list[Example]]) -> None:
    """After two tasks the pull is the sum of two pulls, by autograd on both."""
    model, rows = tuned
    strategy = EWC(STRENGTH, space="weight")
    learner = learnt(model, rows[:2], strategy)
    first = {
        name: (strategy.importance[name].clone(), strategy.anchor[name].clone()) for name in strategy.importance
    }

    def move() -> None:
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))

    move()
    learner.begin_task(Task("u", rows[2:]), 1)
    second_strategy = EWC(STRENGTH, space="weight")
    learnt(model, rows[2:], second_strategy)
    learner.end_task()
    learner.begin_task(Task("v", rows), 2)
    move()
    penalty = torch.zeros(())
    for name, delta in deltas(model).items():
        for importance, anchor in (first[name], (second_strategy.importance[name], second_strategy.anchor[name])):
            penalty = penalty + STRENGTH / 2 * (importance * (delta - anchor) ** 2).sum()
    learner._logged.clear()
    learner.optimizer.zero_grad()  # type: ignore[union-attr]
    strategy.gradient(learner.ctx, [])  # type: ignore[arg-type]
    trained = [p for p in model.parameters() if p.requires_grad]
    for p, g in zip(trained, torch.autograd.grad(penalty, trained), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-11)
    assert learner._logged["penalty"] == pytest.approx(float(penalty.detach()), rel=1e-11)


def test_a_frozen_factor_gets_no_pull(tuned: tuple[Any, list[Example]]) -> None:
    model, rows = tuned
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    learnt(model, rows, EWC(STRENGTH, space="weight")).step(rows)
    learner = learnt(model, rows, EWC(STRENGTH, space="weight"))
    learner.strategy.gradient(learner.ctx, [])  # type: ignore[arg-type]
    grads = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert all((grad is None) == ("lora_A" in name) for name, grad in grads.items())


def test_a_weight_shared_by_layers_is_refused(make_lm: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = make_lm("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(StrategyError, match="lm_head is shared with another layer"):
        Learner(model, EWC(space="weight"), "causal_lm", validate(TrainingSettings, {}, "test"), 0)


def test_models_without_lora_are_refused(make_lm: Callable[..., Any]) -> None:
    with pytest.raises(StrategyError, match="the model has no LoRA adapter"):
        Learner(make_lm("llama"), EWC(space="weight"), "causal_lm", validate(TrainingSettings, {}, "test"), 0)


def test_adapters_of_another_kind_are_refused(make_lm: Callable[..., Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_lm("llama"), LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(StrategyError, match="q_proj is no plain LoRA"):
        Learner(model, EWC(space="weight"), "causal_lm", validate(TrainingSettings, {}, "test"), 0)
