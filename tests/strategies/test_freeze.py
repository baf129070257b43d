"""What freeze-bottom freezes, in models of several kinds, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from perdure.config import TrainingSettings, validate
from perdure.errors import StrategyError
from perdure.models.adapters import tune
from perdure.strategies import FreezeBottom
from perdure.training.learner import Learner
from perdure.types import Example, Task


def trained_in_second(
    model: nn.Module, strategy: FreezeBottom, objective: str = "causal_lm"
) -> tuple[set[str], Any]:
    """Names of what still changes in the second task, looked at bit by bit, and the learner."""
    ids = torch.tensor([3, 4, 5, 6])
    text = [Example(str(i), "t", x=ids + i, y=ids + i) for i in range(4)]
    vector = [Example(str(i), "t", x=torch.randn(3), y=torch.tensor(i % 2)) for i in range(4)]
    rows = text if objective == "causal_lm" else vector
    settings = {"optimizer": {"lr": 0.01, "weight_decay": 0.1}}
    learner = Learner(model, strategy, objective, validate(TrainingSettings, settings, "test"), 0)
    learner.begin_task(Task("first", rows), 0)
    learner.step(rows)
    learner.end_task()
    learner.begin_task(Task("second", rows), 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        learner.step(rows)
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}, learner


def test_embeddings_and_the_lower_half_of_a_llama_stay(make_lm: Callable[..., Any]) -> None:
    model = make_lm("llama")
    moved, _ = trained_in_second(model, FreezeBottom())
    count = model.config.num_hidden_layers
    assert any(name.startswith(f"model.layers.{count - 1}.") for name in moved)
    assert not any(name.startswith(("model.layers.0.", "model.embed_tokens")) for name in moved)
    assert "model.norm.weight" in moved


def test_adapters_in_frozen_blocks_stay(make_lm: Callable[..., Any]) -> None:
    model = tune(make_lm("llama"), "lora", r=2, alpha=4)
    moved, _ = trained_in_second(model, FreezeBottom(layers=1))
    assert any(".layers.1." in name for name in moved)
    assert not any(".layers.0." in name for name in moved)


def check_statistics(make: Callable[..., FreezeBottom]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    moved, _ = trained_in_second(model, make(layers=2), "classification")
    assert moved == {"2.weight", "2.bias", "3.weight", "3.bias", "4.weight", "4.bias",
                     "3.running_mean", "3.running_var", "3.num_batches_tracked"}  # fmt: skip


def test_running_statistics_of_frozen_blocks_stay() -> None:
    check_statistics(FreezeBottom)


class ZeroGradients(FreezeBottom):
    """Wrong: gradients are set to zero, and weight decay goes on moving the weights."""

    def prepare(self, ctx: Any) -> None:
        self._held = self._bottom(ctx.model) if ctx.index else []

    def gradient(self, ctx: Any, batches: Any) -> None:
        for module in self._held:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()


class StatisticsMove(FreezeBottom):
    """Wrong: running statistics of frozen blocks move on."""

    def mix(self, ctx: Any, examples: list[Example]) -> list[Example]:
        return examples


@pytest.mark.parametrize("mutant", [ZeroGradients, StatisticsMove])
def test_freezing_by_half_is_caught(mutant: type[FreezeBottom]) -> None:
    with pytest.raises(AssertionError):
        check_statistics(mutant)


def test_the_first_task_trains_all_of_it_unless_asked_otherwise() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    learner = trained_in_second(model, FreezeBottom(start=2), "classification")[1]
    assert all(p.requires_grad for p in learner.model.parameters())
    learner.begin_task(learner.ctx.task.__class__("third", learner.ctx.task.train), 2)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_a_share_counts_as_the_decimal_that_was_written() -> None:
    """0.58 of 50 blocks is 29; as a float it comes to less."""
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(50)))
    assert len(FreezeBottom(0.58)._bottom(model)) == 29


def test_the_longest_stack_is_not_a_mixture_of_experts() -> None:
    """The list that holds most weights counts, not one of many small members inside it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(expert(x) for expert in self.experts)  # type: ignore[return-value]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.head = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    moved, _ = trained_in_second(Net(), FreezeBottom(), "classification")
    assert {name.split(".")[1] for name in moved if name.startswith("blocks")} == {"1"}


@pytest.mark.parametrize(
    ("model", "strategy", "message"),
    [
        (nn.Linear(3, 2), FreezeBottom(), "has no stack of blocks"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), FreezeBottom(layers=2), "would freeze all of them"),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), FreezeBottom(layers=0.3), "would freeze none of them"),
    ],
)
def test_models_without_a_bottom_are_refused(model: nn.Module, strategy: FreezeBottom, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        Learner(model, strategy, "classification", validate(TrainingSettings, {}, "test"), 0)


def test_a_prompt_is_not_in_the_bottom() -> None:
    model = nn.ModuleDict({"prompt": nn.Linear(2, 2), "net": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    model["net"].requires_grad_(False)
    with pytest.raises(StrategyError, match="none of what is trained lies in the model's lowest blocks"):
        Learner(model, FreezeBottom(), "classification", validate(TrainingSettings, {}, "test"), 0)
    model["prompt"].requires_grad_(False)
    model["net"][0].requires_grad_(True)
    with pytest.raises(StrategyError, match="nothing would be left to train"):
        Learner(model, FreezeBottom(), "classification", validate(TrainingSettings, {}, "test"), 0)


@pytest.mark.parametrize(
    ("settings", "message"), [({"layers": 0}, "layers"), ({"layers": 1.5}, "layers"), ({"start": -1}, "start")]
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(StrategyError, match=f"freeze-bottom: {message}"):
        FreezeBottom(**settings)  # type: ignore[arg-type]
