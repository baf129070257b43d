"""EWC against closed forms and brute force; the known wrong versions are planted and must be caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.config import TrainingSettings, validate
from perdure.errors import StrategyError
from perdure.strategies import EWC
from perdure.strategies.fisher import per_example_gradients
from perdure.training.learner import Learner
from perdure.types import Example, Task

pytestmark = pytest.mark.usefixtures("float64")


class Logistic(nn.Module):
    """Two classes with logits (0, w·x): logistic regression as a classifier."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.w
        return torch.stack([torch.zeros_like(z), z], -1)


def learner_of(model: nn.Module, strategy: EWC, rows: list[Example], objective: str = "classification") -> Learner:
    settings = validate(TrainingSettings, {"optimizer": {"type": "sgd", "lr": 0.1}}, "test")
    learner = Learner(model, strategy, objective, settings, 0)
    learner.begin_task(Task("t", rows), 0)
    return learner


def logistic_rows(n: int, seed: int = 0) -> list[Example]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=rng)
    y = torch.randint(0, 2, (n,), generator=rng)
    return [Example(str(i), "t", x=x[i], y=y[i]) for i in range(n)]


def fisher_of(w: Tensor, rows: list[Example], make: Callable[[], EWC]) -> Tensor:
    strategy = make()
    learner_of(Logistic(w.clone()), strategy, rows).end_task()
    return strategy.importance["w"]


def check_empirical(make: Callable[[], EWC]) -> None:
    """∂(−log p)/∂w of one row is (p − y)x, so F = Σ (p − y)²x²/n, whatever the batch size."""
    w, rows = torch.tensor([0.3, -0.7, 1.1]), logistic_rows(50)
    x, y = torch.stack([r.x for r in rows]), torch.stack([r.y for r in rows])
    expected = ((torch.sigmoid(x @ w) - y)[:, None] ** 2 * x**2).mean(0)
    torch.testing.assert_close(fisher_of(w, rows, make), expected, rtol=0, atol=1e-12)


def test_empirical_fisher_of_logistic_regression() -> None:
    check_empirical(EWC)


def test_true_fisher_of_logistic_regression_exactly() -> None:
    """At w = 0, p = ½ and (y − p)² = ¼ whichever y is drawn: F = Σx²p(1 − p)/n = Σx²/(4n) exactly."""
    rows = logistic_rows(50)
    x = torch.stack([r.x for r in rows])
    found = fisher_of(torch.zeros(3), rows, lambda: EWC(fisher="true"))
    torch.testing.assert_close(found, (x**2).mean(0) / 4, rtol=0, atol=1e-12)


def test_true_fisher_of_logistic_regression_in_the_mean() -> None:
    """Away from 0 the draws average to Σx²p(1 − p)/n; 20,000 rows leave an error of well under 3 %.

    The labels of the rows are random, so the empirical Fisher, Σ(p − y)²x²/n, is far from it: the mutant that uses
    them is caught.
    """
    w, rows = torch.tensor([0.9, -1.6, 0.4]), logistic_rows(20_000)
    x = torch.stack([r.x for r in rows])
    p = torch.sigmoid(x @ w)
    expected = (x**2 * (p * (1 - p))[:, None]).mean(0)
    torch.testing.assert_close(fisher_of(w, rows, lambda: EWC(fisher="true")), expected, rtol=0.04, atol=0)
    assert not torch.allclose(fisher_of(w, rows, EWC), expected, rtol=0.2)


class SquaredBatchMean(EWC):
    """Wrong: the batch's mean gradient, squared."""

    def _estimate(self, ctx: Any, rows: Any) -> dict[str, Tensor]:
        loss = ctx.loss_of(rows)
        names, parameters = zip(*ctx.model.named_parameters(), strict=True)
        return dict(zip(names, (g**2 for g in torch.autograd.grad(loss, parameters)), strict=True))


class WeightedByProbability(EWC):
    """Wrong: each row's squared gradient weighted by p(y)."""

    def _estimate(self, ctx: Any, rows: Any) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for row in rows:
            weight = torch.exp(-ctx.loss_of([row]).detach())
            for gradients in per_example_gradients(ctx, [row]):
                for name, g in gradients.items():
                    total[name] = total.get(name, torch.zeros(())) + weight * g[0] ** 2 / len(rows)
        return total


class NotSquared(EWC):
    """Wrong: absolute gradients."""

    def _estimate(self, ctx: Any, rows: Any) -> dict[str, Tensor]:
        found = list(per_example_gradients(ctx, rows))
        return {name: torch.cat([g[name].abs() for g in found]).mean(0) for name in found[0]}


@pytest.mark.parametrize("mutant", [SquaredBatchMean, WeightedByProbability, NotSquared])
def test_wrong_fishers_are_caught(mutant: type[EWC]) -> None:
    with pytest.raises(AssertionError):
        check_empirical(mutant)


class Tokens(nn.Module):
    """A causal LM without attention: the next token from the present one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.drop(self.embed(ids)))


def lm_rows() -> list[Example]:
    rows = []
    for i, length in enumerate((4, 7, 5, 9)):
        ids = (torch.arange(length) * (i + 2)) % 7
        labels = ids.clone()
        labels[: i + 1] = -100
        rows.append(Example(str(i), "t", x=ids, y=labels))
    return rows


def brute_force_lm(model: nn.Module, rows: list[Example]) -> dict[str, Tensor]:
    """One row at a time, unpadded, eval mode: log p summed over answer tokens, then squared, then averaged."""
    model.eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        model.zero_grad()
        logits = model(row.x[None])[0, :-1]
        F.cross_entropy(logits, row.y[1:], ignore_index=-100, reduction="sum").backward()
        for name, p in model.named_parameters():
            total[name] += p.grad**2 / len(rows)
    model.zero_grad()
    return total


def check_lm(make: Callable[[], EWC]) -> None:
    model, strategy = Tokens(), make()
    expected = brute_force_lm(model, lm_rows())
    learner = learner_of(model, strategy, lm_rows(), "causal_lm")
    model.train()
    learner.end_task()
    assert model.training
    for name, value in expected.items():
        torch.testing.assert_close(strategy.importance[name], value, rtol=0, atol=1e-12)


def test_fisher_of_a_language_model_by_brute_force() -> None:
    """Ragged rows, a model with dropout in training mode: padding and dropout must not count."""
    check_lm(EWC)


class TokenMean(EWC):
    """Wrong: squares the mean over tokens, so that long answers count less."""

    def _estimate(self, ctx: Any, rows: Any) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for row in rows:
            count = int((row.y[1:] != -100).sum())
            for gradients in per_example_gradients(ctx, [row]):
                for name, g in gradients.items():
                    total[name] = total.get(name, torch.zeros(())) + (g[0] / count) ** 2 / len(rows)
        return total


class TrainMode(EWC):
    """Wrong: dropout is on."""

    def _estimate(self, ctx: Any, rows: Any) -> dict[str, Tensor]:
        loss_of = lambda row: ctx.loss_of([row], reduction="sum", train=True)  # noqa: E731
        names, parameters = zip(*ctx.model.named_parameters(), strict=True)
        found = [torch.autograd.grad(loss_of(row), parameters) for row in rows]
        return {name: sum(g[i] ** 2 for g in found) / len(rows) for i, name in enumerate(names)}


@pytest.mark.parametrize("mutant", [TokenMean, TrainMode, SquaredBatchMean])
def test_wrong_language_model_fishers_are_caught(mutant: type[EWC]) -> None:
    with pytest.raises(AssertionError):
        check_lm(mutant)


def test_vectorised_equals_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from perdure.strategies import fisher

    model = Tokens()
    ctx = learner_of(model, EWC(), lm_rows(), "causal_lm").ctx
    assert ctx is not None

    def collect() -> dict[str, Tensor]:
        found = list(per_example_gradients(ctx, lm_rows()))
        return {name: torch.cat([g[name] for g in found]) for name in found[0]}

    together = collect()
    monkeypatch.setattr(fisher, "HELD", 1)
    alone = collect()
    for name, value in together.items():
        torch.testing.assert_close(alone[name], value, rtol=0, atol=1e-13)


class Vector(nn.Module):
    """Predicts θ itself, row by row chosen by x: its loss is a diagonal quadratic in θ."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.theta).sum(-1)


def check_two_quadratics(make: Callable[..., EWC]) -> None:
    """Task 2 is Σ h₂/2 (θ − θ₂)²; with the penalty of task 1 the minimum is (H₁ + H₂)⁻¹(H₁θ₁ + H₂θ₂).

    Row i has x = √(3h₂ᵢ)·eᵢ and y = √(3h₂ᵢ)·θ₂ᵢ, so that the mean over three rows of ½(p − y)² is that quadratic.
    """
    h1, t1 = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([1.0, -2.0, 0.3])
    h2, t2 = torch.tensor([1.0, 3.0, 0.2]), torch.tensor([-1.0, 0.5, 2.0])
    strength = 4.0
    root = (3 * h2).sqrt()
    rows = [Example(str(i), "t", x=torch.eye(3)[i] * root[i], y=root[i] * t2[i]) for i in range(3)]
    strategy = make(strength=strength)
    learner = learner_of(Vector(torch.zeros(3)), strategy, rows, "regression")
    strategy.importance, strategy.anchor = {"theta": h1.clone()}, {"theta": t1.clone()}
    for _ in range(800):
        result = learner.step(rows)
    theta = learner.model.theta.detach()
    expected = (strength * h1 * t1 + h2 * t2) / (strength * h1 + h2)
    torch.testing.assert_close(theta, expected, rtol=0, atol=1e-10)
    penalty = strength / 2 * (h1 * (theta - t1) ** 2).sum()
    task = (h2 / 2 * (theta - t2) ** 2).sum()
    assert result.loss == pytest.approx(float(task + penalty), abs=1e-9)


def test_two_quadratics_meet_in_the_middle() -> None:
    check_two_quadratics(EWC)


class NoHalf(EWC):
    """Wrong: the gradient of strength·ΣF(θ − θ*)²."""

    def gradient(self, ctx: Any, batches: object) -> None:
        super().gradient(ctx, batches)
        super().gradient(ctx, batches)


@pytest.mark.parametrize("mutant", [NoHalf])
def test_wrong_penalties_are_caught(mutant: type[EWC]) -> None:
    with pytest.raises(AssertionError):
        check_two_quadratics(mutant)


def three_tasks(decay: float, make: type[EWC] = EWC) -> tuple[EWC, Learner, list[tuple[Tensor, Tensor]]]:
    """EWC after three tasks of logistic regression; and each task's own F and θ*."""
    strategy = make(strength=3.0, decay=decay)
    model = Logistic(torch.tensor([0.1, 0.2, 0.3]))
    settings = validate(TrainingSettings, {"optimizer": {"type": "sgd", "lr": 0.3}}, "test")
    learner = Learner(model, strategy, "classification", settings, 0)
    alone = []
    for i in range(3):
        rows = logistic_rows(20, seed=i)
        learner.begin_task(Task(str(i), rows), i)
        for _ in range(5):
            learner.step(rows)
        learner.end_task()
        here = model.w.detach().clone()
        alone.append((fisher_of(here, rows, EWC), here))
    return strategy, learner, alone


def test_sum_over_three_tasks_is_exact() -> None:
    """Gradient Σ λF_k(θ − θ_k) and value λ/2 ΣΣ F_k(θ − θ_k)², from two tensors."""
    strategy, learner, alone = three_tasks(1.0)
    w = learner.model.w
    with torch.no_grad():
        w.copy_(torch.tensor([5.0, -4.0, 2.0]))
    w.grad = torch.zeros_like(w)
    logged: dict[str, float] = {}
    assert learner.ctx is not None
    strategy.gradient(learner.ctx.but(log=lambda name, value: logged.update({name: float(value)})), [])
    expected = sum(3.0 * f * (w.detach() - t) for f, t in alone)
    torch.testing.assert_close(w.grad, expected, rtol=1e-12, atol=1e-12)
    value = sum(1.5 * float((f * (w.detach() - t) ** 2).sum()) for f, t in alone)
    assert logged["penalty"] == pytest.approx(value, rel=1e-12)


def check_online(make: type[EWC]) -> None:
    """F ← γF + F_new twice is γ²F₁ + γF₂ + F₃; the anchor is the last θ*."""
    strategy, _, alone = three_tasks(0.5, make)
    (f1, _), (f2, _), (f3, t3) = alone
    torch.testing.assert_close(strategy.importance["w"], 0.25 * f1 + 0.5 * f2 + f3, rtol=1e-12, atol=0)
    assert torch.equal(strategy.anchor["w"], t3)


def test_online_has_one_anchor_and_a_decaying_fisher() -> None:
    check_online(EWC)


class DecaysTheNew(EWC):
    """Wrong: F ← F + γF_new."""

    def fold(self, ctx: Any, new: Any, decay: float = 1.0, newest: bool = False) -> None:
        super().fold(ctx, {name: decay * value for name, value in new.items()}, 1.0, newest)


class MeanAnchor(EWC):
    """Wrong: the anchor of the exact sum under a decaying F."""

    def fold(self, ctx: Any, new: Any, decay: float = 1.0, newest: bool = False) -> None:
        super().fold(ctx, new, decay)


@pytest.mark.parametrize("mutant", [DecaysTheNew, MeanAnchor])
def test_wrong_online_versions_are_caught(mutant: type[EWC]) -> None:
    with pytest.raises(AssertionError):
        check_online(mutant)


def test_after_one_task_the_anchor_is_where_it_ended() -> None:
    strategy = EWC()
    learner = learner_of(Logistic(torch.tensor([0.1, 0.2, 0.3])), strategy, logistic_rows(8))
    learner.step(logistic_rows(8))
    learner.end_task()
    assert torch.equal(strategy.anchor["w"], learner.model.w.detach())


def check_bytes(make: Callable[[], EWC]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    strategy = make()
    settings = validate(TrainingSettings, {}, "test")
    learner = Learner(model, strategy, "classification", settings, 0)
    for i in range(4):
        rows = logistic_rows(6, seed=i)
        learner.begin_task(Task(str(i), rows), i)
        learner.step(rows)
        learner.end_task()
    held = [v for part in strategy.state_dict().values() if isinstance(part, dict) for v in part.values()]
    assert set(strategy.importance) == {"1.weight", "1.bias"}
    assert sum(v.numel() for v in held) == 2 * sum(p.numel() for p in model[1].parameters())


def test_holds_two_tensors_a_trainable_weight_and_nothing_frozen() -> None:
    check_bytes(EWC)


class KeepsFrozen(EWC):
    """Wrong: frozen weights are saved with the rest."""

    def fold(self, ctx: Any, new: Any, decay: float = 1.0, newest: bool = False) -> None:
        frozen = {n: torch.zeros_like(p) for n, p in ctx.model.named_parameters() if not p.requires_grad}
        self.importance |= frozen
        super().fold(ctx, new, decay, newest)


class TwoATask(EWC):
    """Wrong: importance and anchor of every task are kept apart."""

    def fold(self, ctx: Any, new: Any, decay: float = 1.0, newest: bool = False) -> None:
        super().fold(ctx, new, decay, newest)
        self.all = [*getattr(self, "all", []), {n: torch.stack([v, v]) for n, v in new.items()}]

    def state_dict(self) -> dict[str, Any]:
        tasks = {f"task{i}{n}": v for i, each in enumerate(self.all) for n, v in each.items()}
        return {**super().state_dict(), "importance": tasks, "anchor": {}}


@pytest.mark.parametrize("mutant", [KeepsFrozen, TwoATask])
def test_holding_more_is_caught(mutant: type[EWC]) -> None:
    with pytest.raises(AssertionError):
        check_bytes(mutant)


def check_where_it_is_taken(make: Callable[..., EWC]) -> None:
    """Over two tasks of steps, F is what brute force finds at the weights of each end, summed."""
    rows = [logistic_rows(8, seed=i) for i in range(2)]
    model, strategy = Logistic(torch.tensor([0.5, -0.2, 0.1])), make(strength=5.0)
    settings = validate(TrainingSettings, {"optimizer": {"type": "sgd", "lr": 0.5}}, "test")
    learner = Learner(model, strategy, "classification", settings, 0)
    expected = torch.zeros(3)
    for index, each in enumerate(rows):
        learner.begin_task(Task(str(index), each), index)
        for _ in range(5):
            learner.step(each)
        w = model.w.detach().clone()
        x, y = torch.stack([r.x for r in each]), torch.stack([r.y for r in each])
        expected = expected + ((torch.sigmoid(x @ w) - y)[:, None] ** 2 * x**2).mean(0)
        learner.end_task()
    torch.testing.assert_close(strategy.importance["w"], expected, rtol=0, atol=1e-12)


def test_fisher_is_taken_at_the_end_of_each_task() -> None:
    check_where_it_is_taken(EWC)


class AlongTheWay(EWC):
    """Wrong: squared gradients are summed over the steps, the penalty's own in them."""

    def gradient(self, ctx: Any, batches: Any) -> None:
        super().gradient(ctx, batches)
        sums, count = getattr(self, "way", ({}, 0))
        self.way = ({n: sums.get(n, 0.0) + p.grad**2 for n, p in ctx.model.named_parameters()}, count + 1)

    def _estimate(self, ctx: Any, rows: Any) -> dict[str, Tensor]:
        sums, count = self.way
        del self.way
        return {n: total / count for n, total in sums.items()}


class BeforeTheTask(EWC):
    """Wrong: at the weights that the task began with."""

    def prepare(self, ctx: Any) -> None:
        self.before = super()._estimate(ctx, ctx.task.train)

    def _estimate(self, ctx: Any, rows: Any) -> dict[str, Tensor]:
        return self.before


@pytest.mark.parametrize("mutant", [AlongTheWay, BeforeTheTask, SquaredBatchMean])
def test_a_fisher_of_elsewhere_is_caught(mutant: type[EWC]) -> None:
    with pytest.raises(AssertionError):
        check_where_it_is_taken(mutant)


def test_a_weight_that_got_no_gradient_is_still_pulled_back() -> None:
    """A parameter that this step's loss does not reach has no gradient of its own; the penalty's must still act."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x @ self.used, torch.zeros(len(x))], -1)

    rows = [Example("0", "t", x=torch.ones(2), y=torch.tensor(1))]
    strategy = EWC(strength=1.0)
    learner = learner_of(Two(), strategy, rows)
    strategy.importance = {"unused": torch.ones(2)}
    strategy.anchor = {"unused": torch.zeros(2)}
    learner.step(rows)
    torch.testing.assert_close(learner.model.unused.detach(), torch.full((2,), 0.9))


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": -1.0},
        {"strength": float("nan")},
        {"decay": 0.0},
        {"decay": 1.5},
        {"fisher": "x"},
        {"samples": 0},
    ],
)
def test_bad_settings_are_refused_in_words(settings: dict[str, Any]) -> None:
    with pytest.raises(StrategyError, match=f"ewc: {next(iter(settings))}"):
        EWC(**settings)


def test_a_loaded_state_may_lie_elsewhere_than_the_model() -> None:
    """A run taken up after a task's last step takes no other before the estimate: devices must agree by then.

    Two devices on any machine: the model is on "meta", the state on the CPU.
    """
    strategy = EWC(decay=0.5)
    model = Logistic(torch.zeros(3))
    learner = learner_of(model, strategy, logistic_rows(4))
    learner.end_task()
    state = strategy.state_dict()
    ctx = learner.ctx
    assert ctx is not None
    there = Logistic(torch.zeros(3, device="meta"))
    strategy._estimate = lambda ctx, rows: {"w": torch.zeros(3, device="meta")}  # type: ignore[method-assign]
    strategy.load_state_dict(state)
    strategy.after_task(ctx.but(model=there))
    assert {strategy.importance["w"].device.type, strategy.anchor["w"].device.type} == {"meta"}
