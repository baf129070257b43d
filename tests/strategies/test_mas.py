"""MAS against a closed form and brute force; the known wrong versions are planted and must be caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perdure.config import TrainingSettings, validate
from perdure.errors import StrategyError
from perdure.strategies import MAS
from perdure.strategies.fisher import per_example_gradients
from perdure.strategies.mas import squared_norm
from perdure.training.learner import Learner
from perdure.types import Example, Task

pytestmark = pytest.mark.usefixtures("float64")


def importance(model: nn.Module, rows: list[Example], make: Callable[[], MAS], objective: str) -> dict[str, Tensor]:
    strategy = make()
    learner = Learner(model, strategy, objective, validate(TrainingSettings, {}, "test"), 0)
    learner.begin_task(Task("t", rows), 0)
    learner.end_task()
    return strategy.importance


def vectors(n: int = 20) -> list[Example]:
    return [Example(str(i), "t", x=torch.randn(3), y=torch.tensor(i % 2)) for i in range(n)]


def check_linear(make: Callable[[], MAS]) -> None:
    """f = Wx: ∂‖f‖²/∂W = 2(Wx)xᵀ, so Ω = mean over rows of |2(Wx)xᵀ|."""
    model, rows = nn.Linear(3, 2, bias=False), vectors()
    x = torch.stack([row.x for row in rows])  # type: ignore[misc]
    each = 2 * (x @ model.weight.detach().T)[:, :, None] * x[:, None, :]
    expected = each.abs().mean(0)
    torch.testing.assert_close(
        importance(model, rows, make, "classification")["weight"], expected, rtol=0, atol=1e-12
    )


def test_a_linear_model_in_closed_form() -> None:
    check_linear(MAS)


class Tokens(nn.Module):
    """A causal LM without attention: the next token from the present one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.drop(self.embed(ids)))


def texts() -> list[Example]:
    rows = []
    for i, length in enumerate((4, 7, 5, 9)):
        ids = (torch.arange(length) * (i + 2)) % 7
        labels = ids.clone()
        labels[: i + 1] = -100
        rows.append(Example(str(i), "t", x=ids, y=labels))
    return rows


def check_tokens(make: Callable[[], MAS]) -> None:
    """Row by row, unpadded, without dropout, over the logits that predict a learnt token."""
    model, rows = Tokens(), texts()
    total: dict[str, Tensor] = {}
    model.eval()
    for row in rows:
        logits = model(row.x)[:-1][row.y[1:] != -100]  # type: ignore[index]
        found = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), found, strict=True):
            total[name] = total.get(name, torch.zeros(())) + g.abs() / len(rows)
    model.train()
    for name, value in importance(model, rows, make, "causal_lm").items():
        torch.testing.assert_close(value, total[name], rtol=0, atol=1e-12)


def test_a_language_model_by_brute_force() -> None:
    check_tokens(MAS)


class BatchMeanFirst(MAS):
    """Wrong: gradients are averaged over rows before their absolute value is taken."""

    def _estimate(self, ctx: Any, rows: Any) -> dict[str, Tensor]:
        found = list(per_example_gradients(ctx, rows, value=squared_norm))
        return {name: torch.cat([g[name] for g in found]).mean(0).abs() for name in found[0]}


class NormNotSquared(MAS):
    """Wrong: the gradient of ‖f‖ instead of ‖f‖²."""

    def _estimate(self, ctx: Any, rows: Any) -> dict[str, Tensor]:
        def norm(*given: Any) -> Tensor:
            return squared_norm(*given).sqrt()

        found = list(per_example_gradients(ctx, rows, value=norm))
        return {name: torch.cat([g[name].abs() for g in found]).mean(0) for name in found[0]}


class OfTheLoss(MAS):
    """Wrong: the gradient of the loss."""

    def _estimate(self, ctx: Any, rows: Any) -> dict[str, Tensor]:
        found = list(per_example_gradients(ctx, rows))
        return {name: torch.cat([g[name].abs() for g in found]).mean(0) for name in found[0]}


class AllPositions(MAS):
    """Wrong: prompt and padding count too."""

    def _estimate(self, ctx: Any, rows: Any) -> dict[str, Tensor]:
        found = list(per_example_gradients(ctx, rows, value=lambda output, *_: output.logits.square().sum()))
        return {name: torch.cat([g[name].abs() for g in found]).mean(0) for name in found[0]}


@pytest.mark.parametrize("mutant", [BatchMeanFirst, NormNotSquared, OfTheLoss])
def test_wrong_versions_are_caught(mutant: type[MAS]) -> None:
    with pytest.raises(AssertionError):
        check_linear(mutant)


@pytest.mark.parametrize("mutant", [AllPositions, OfTheLoss, BatchMeanFirst])
def test_wrong_versions_on_text_are_caught(mutant: type[MAS]) -> None:
    with pytest.raises(AssertionError):
        check_tokens(mutant)


def test_importance_adds_up_in_two_tensors_a_weight() -> None:
    """Four tasks have the same rows and the model does not move: Ω is four times that of one."""
    model, rows, strategy = nn.Linear(3, 2), vectors(), MAS()
    learner = Learner(model, strategy, "classification", validate(TrainingSettings, {}, "test"), 0)
    for index in range(4):
        learner.begin_task(Task(f"{index}", rows), index)
        learner.end_task()
        if not index:
            first = strategy.importance["weight"].clone()
    torch.testing.assert_close(strategy.importance["weight"], 4 * first, rtol=1e-12, atol=0)
    assert torch.equal(strategy.anchor["weight"], model.weight)
    held = [t for part in strategy.state_dict().values() if isinstance(part, dict) for t in part.values()]
    assert sum(t.numel() for t in held) == 2 * sum(p.numel() for p in model.parameters())


def test_the_anchor_is_the_newest() -> None:
    model, rows, strategy = nn.Linear(3, 2), vectors(), MAS()
    learner = Learner(model, strategy, "classification", validate(TrainingSettings, {}, "test"), 0)
    for index in range(2):
        learner.begin_task(Task(f"{index}", rows), index)
        with torch.no_grad():
            model.bias.add_(1.0)
        learner.end_task()
    assert torch.equal(strategy.anchor["bias"], model.bias)


@pytest.mark.parametrize(("settings", "message"), [({"strength": -1}, "strength"), ({"samples": 0}, "samples")])
def test_settings_that_cannot_be_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(StrategyError, match=f"mas: {message}"):
        MAS(**settings)
