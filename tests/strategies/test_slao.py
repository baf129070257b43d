"""SLAO by hand and by its definition; the known wrong versions are planted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perdure.config import TrainingSettings, validate
from perdure.errors import StrategyError
from perdure.strategies import SLAO
from perdure.strategies.merge import Merging, write
from perdure.strategies.slao import orthonormal_rows
from perdure.training.learner import Learner
from perdure.types import Task

pytestmark = pytest.mark.usefixtures("float64")


class Adapted(nn.Module):
    """A layer with factors named as PEFT names them, and a head beside."""

    def __init__(self, rank: int = 2, width: int = 2) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(width, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, 2, bias=False)})
        self.head = nn.Linear(2, 2, bias=False)

    def factors(self) -> list[Tensor]:
        layers = (self.lora_A["default"], self.lora_B["default"], self.head)
        return [layer.weight.detach().clone() for layer in layers]  # type: ignore[union-attr]


def drive(
    strategy: Merging, ends: list[tuple[Tensor, Tensor]], model: Adapted
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """A, B and head where each task starts, and as served after it; task t ends at ends[t], the head at its B."""
    learner = Learner(model, strategy, "classification", validate(TrainingSettings, {}, "test"), 0)
    starts, served = [], []
    for index, (a, b) in enumerate(ends):
        learner.begin_task(Task(str(index), []), index)
        starts.append(model.factors())
        names = ("lora_A.default.weight", "lora_B.default.weight", "head.weight")
        write(dict(model.named_parameters()), dict(zip(names, (a, b, b), strict=True)))
        learner.end_task()
        served.append(model.factors())
    return starts, served


def check_by_hand(make: Callable[[], Merging]) -> None:
    """A₁ = [[3, 4], [0, 5]]: the first row over its length 5 is (0.6, 0.8).

    (0, 5) less 4 times that is (−2.4, 1.8), over its length 3 (−0.8, 0.6). So the second task begins with
    [[0.6, 0.8], [−0.8, 0.6]].

    B₁ = [[1, 2], [3, 4]] and B₂ = B₁ + √2·[[1, 0], [−1, 2]] merge to M₂ = [[2, 2], [2, 6]];
    B₃ = M₂ + √3·[[0, 1], [1, −1]] to M₃ = [[2, 3], [3, 5]]; B₄ = M₃ + 2·[[1, 1], [1, 1]] to [[3, 4], [4, 6]].
    A is always the newest: A₂ = [[0, 2], [3, 0]], whose rows are orthogonal, so [[0, 1], [1, 0]] begins the third.
    """
    a = [torch.tensor(one) for one in ([[3.0, 4.0], [0.0, 5.0]], [[0.0, 2.0], [3.0, 0.0]])]
    b1, m2 = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[2.0, 2.0], [2.0, 6.0]])
    m3, m4 = torch.tensor([[2.0, 3.0], [3.0, 5.0]]), torch.tensor([[3.0, 4.0], [4.0, 6.0]])
    b2 = b1 + 2**0.5 * (m2 - b1)
    b3 = m2 + 3**0.5 * (m3 - m2)
    b4 = m3 + 2 * (m4 - m3)
    ends = [(a[0], b1), (a[1], b2), (a[0], b3), (a[1], b4)]
    model = Adapted()
    before = model.factors()
    starts, served = drive(make(), ends, model)
    q = [torch.tensor([[0.6, 0.8], [-0.8, 0.6]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])]
    for found, expected in (
        *zip(starts, [before, [q[0], b1, b1], [q[1], b2, b2], [q[0], b3, b3]], strict=True),
        *zip(served, [[a[0], b1, b1], [a[1], m2, m2], [a[0], m3, m3], [a[1], m4, m4]], strict=True),
    ):
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    assert all(torch.equal(one, two) for one, two in zip(starts[0], before, strict=True))


def test_four_tasks_by_hand() -> None:
    check_by_hand(SLAO)


def check_rows(orthonormal: Callable[[Tensor], Tensor]) -> None:
    """QQᵀ = I; the projector on the rows is that of A, A⁺A; A = LQ, L lower triangular with a diagonal above 0."""
    for seed, shape in enumerate([(3, 7), (1, 5), (4, 4), (8, 40)]):
        a = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        q = orthonormal(a)
        assert q.shape == a.shape
        torch.testing.assert_close(q @ q.T, torch.eye(len(a)), rtol=0, atol=1e-12)
        torch.testing.assert_close(q.T @ q, torch.linalg.pinv(a) @ a, rtol=0, atol=1e-11)
        lower = a @ q.T
        torch.testing.assert_close(lower, lower.tril(), rtol=0, atol=1e-12)
        assert bool((lower.diagonal() > 0).all())


def test_rows_are_orthonormal_and_span_what_they_spanned() -> None:
    check_rows(orthonormal_rows)


def columns(a: Tensor) -> Tensor:
    """Wrong: columns are made orthonormal, or as many as there can be."""
    q = torch.linalg.qr(a)[0]
    return torch.cat([q, torch.zeros(len(a), a.shape[1] - q.shape[1])], dim=1)


def any_sign(a: Tensor) -> Tensor:
    """Wrong: the signs are those that LAPACK happens to give."""
    return torch.linalg.qr(a.T)[0].T


def unit_rows(a: Tensor) -> Tensor:
    """Wrong: rows of length 1, not orthogonal."""
    return a / a.norm(dim=1, keepdim=True)


def random_rows(a: Tensor) -> Tensor:
    """Wrong: orthonormal rows with another span."""
    return orthonormal_rows(torch.randn(a.shape, generator=torch.Generator().manual_seed(9)))


@pytest.mark.parametrize("mutant", [columns, any_sign, unit_rows, random_rows])
def test_wrong_rows_are_caught(mutant: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_rows(mutant)


class OneOverT(SLAO):
    """Wrong: 1/t, the mean of all tasks, in place of 1/√t."""

    def fold(self, trained: Any) -> None:
        merged = self.held["merged"]
        for name, new in trained.items():
            merged[name] = torch.lerp(merged[name], new, 1 / self.tasks) if name in merged else new


class AveragesA(SLAO):
    """Wrong: A is merged as B is."""

    def takes_part(self, name: str) -> bool:
        return True


class FromMerged(SLAO):
    """Wrong: the next task begins with the merged B."""

    def prepare(self, ctx: Any) -> None:
        self.last = {}
        super().prepare(ctx)


class NoOrthogonalBeginning(SLAO):
    """Wrong: A goes on as it is."""

    def prepare(self, ctx: Any) -> None:
        Merging.prepare(self, ctx)


class OrthogonalFirst(SLAO):
    """Wrong: the first task too begins with orthonormal rows, so that it is no plain training."""

    def prepare(self, ctx: Any) -> None:
        self.tasks += 1
        super().prepare(ctx)
        self.tasks -= 1


class CountsFromTwo(SLAO):
    """Wrong: the second task is merged as the third."""

    def fold(self, trained: Any) -> None:
        self.tasks += 1
        super().fold(trained)
        self.tasks -= 1


class AgainstTheLast(SLAO):
    """Wrong: B is merged with the B of the task before, not with the merged one."""

    def fold(self, trained: Any) -> None:
        before = self.__dict__.setdefault("before", {})
        for name, new in trained.items():
            old = before.get(name, new)
            self.held["merged"][name] = torch.lerp(old, new, self.tasks**-0.5)
            before[name] = new


@pytest.mark.parametrize(
    "mutant",
    [OneOverT, AveragesA, FromMerged, NoOrthogonalBeginning, OrthogonalFirst, CountsFromTwo, AgainstTheLast],
)
def test_wrong_versions_are_caught(mutant: type[SLAO]) -> None:
    with pytest.raises(AssertionError):
        check_by_hand(mutant)


def test_it_may_begin_at_the_merged_factor() -> None:
    ends = [(torch.eye(2), torch.full((2, 2), float(i))) for i in range(3)]
    starts, served = drive(SLAO(start="merged"), ends, Adapted())
    assert torch.equal(starts[2][1], served[1][1])
    assert not torch.equal(starts[2][1], ends[1][1])


def test_what_is_held_does_not_grow_with_the_tasks() -> None:
    """B and the head: once in a task, twice between tasks."""
    strategy = SLAO()
    ends = [(torch.eye(2), torch.full((2, 2), float(i))) for i in range(6)]
    drive(strategy, ends, Adapted())
    state = strategy.state_dict()
    assert not state["base"]
    assert sum(v.numel() for v in state["last"].values()) == 8
    assert sum(v.numel() for values in state["held"].values() for v in values.values()) == 8


def test_the_products_of_a_real_adapter(make_lm: Callable[..., Any]) -> None:
    """PEFT's ΔW after two tasks is scaling · (B₁ + (B₂ − B₁)/√2) · A₂ in every layer."""
    from perdure.models.adapters import tune

    torch.manual_seed(0)
    model = tune(make_lm("llama"), "lora", r=2, alpha=4)
    learner = Learner(model, SLAO(), "causal_lm", validate(TrainingSettings, {}, "test"), 0)
    ends: list[dict[str, Tensor]] = []
    for index in range(2):
        learner.begin_task(Task(str(index), []), index)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        ends.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        learner.end_task()
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    assert layers
    for name, layer in layers.items():
        a, (b1, b2) = ends[1][f"{name}.lora_A.default.weight"], (e[f"{name}.lora_B.default.weight"] for e in ends)
        expected = 2 * (b1 + (b2 - b1) / 2**0.5) @ a
        torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=0, atol=1e-5)


def test_models_that_cannot_are_refused() -> None:
    for model, message in (
        (nn.Linear(2, 2), "slao: the model has no LoRA adapter"),
        (Adapted(rank=3), "has rank 3 and an input of 2"),
    ):
        with pytest.raises(StrategyError, match=message):
            Learner(model, SLAO(), "classification", validate(TrainingSettings, {}, "test"), 0)
    with pytest.raises(StrategyError, match="slao: start must be last or merged, got 'base'"):
        SLAO(start="base")  # type: ignore[arg-type]
