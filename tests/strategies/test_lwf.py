"""LwF against closed forms and brute force; the known wrong versions are planted and must be caught."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.config import TrainingSettings, validate
from perdure.errors import StrategyError
from perdure.models import objectives
from perdure.strategies import LwF, distillation, lwf
from perdure.training.learner import Learner
from perdure.types import Batch, Example, Output, Task

T = 3.0


pytestmark = pytest.mark.usefixtures("float64")


def test_a_number_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2 = 0.1308…, 4 times at T = 2."""
    teacher, student = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(distillation(student, teacher, 1.0)) == pytest.approx(expected, abs=1e-12)
    assert float(distillation(2 * student, 2 * teacher, 2.0)) == pytest.approx(4 * expected, abs=1e-12)


def check_limit(distill: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """As T grows, T²·KL tends to ‖Δz centred‖² / 2V with an error of order 1/T, which 2f(2T) − f(T) takes out."""
    student, teacher = torch.randn(6, 9), torch.randn(6, 9)
    gap = student - teacher
    expected = float((gap - gap.mean(1, keepdim=True)).square().sum(1).mean() / 18)
    near, nearer = float(distill(student, teacher, 1e4)), float(distill(student, teacher, 2e4))
    assert nearer == pytest.approx(expected, rel=1e-2)
    assert 2 * nearer - near == pytest.approx(expected, rel=1e-6)


def check_direction(distill: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Σ p_teacher (log p_teacher − log p_student), term by term."""
    student, teacher = 3 * torch.randn(6, 9), 3 * torch.randn(6, 9)
    total = 0.0
    for said, taught in zip(student / T, teacher / T, strict=True):
        p = (taught.exp() / taught.exp().sum()).tolist()
        q = (said.exp() / said.exp().sum()).tolist()
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)) / 6
    assert float(distill(student, teacher, T)) == pytest.approx(T * T * total, rel=1e-12)


def test_closed_forms() -> None:
    check_limit(distillation)
    check_direction(distillation)


def test_gradient_is_the_difference_of_probabilities() -> None:
    """∂/∂z = T (softmax(z/T) − softmax(z_teacher/T)) / B, and none flows into the teacher."""
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    distillation(student, teacher, T).backward()
    expected = T * ((student / T).softmax(1) - (teacher / T).softmax(1)).detach() / 4
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-12)
    assert teacher.grad is None


def swapped(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return distillation(teacher.detach(), student, temperature)


def without_square(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return distillation(student, teacher, temperature) / temperature**2


def over_elements(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return distillation(student, teacher, temperature) / student.shape[1]


@pytest.mark.parametrize("wrong", [swapped, without_square, over_elements])
def test_wrong_distances_are_caught(wrong: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    def both() -> None:
        check_limit(wrong)
        check_direction(wrong)

    with pytest.raises(AssertionError):
        both()


class Tokens(nn.Module):
    """A causal LM that looks one token back, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        here = self.embed(ids)
        before = torch.cat([torch.zeros_like(here[:, :1]), here[:, :-1]], 1)
        return self.head(self.drop(torch.cat([here, before], -1)))


def texts() -> list[Example]:
    rows = []
    for i, length in enumerate((4, 9, 5, 7)):
        ids = (torch.arange(length) * (i + 2) + i) % 7
        labels = ids.clone()
        labels[: i + 1] = -100
        rows.append(Example(str(i), "t", x=ids, y=labels))
    return rows


def prepared(model: nn.Module, rows: list[Example], objective: str, strategy: LwF) -> tuple[Learner, nn.Module]:
    """A learner in its second task whose weights have moved on, and the model as the first task left it."""
    learner = Learner(model, strategy, objective, validate(TrainingSettings, {"batch_size": 4}, "test"), 0)
    learner.begin_task(Task("first", rows), 0)
    learner.step(rows)
    learner.end_task()
    teacher = copy.deepcopy(model).eval()
    learner.begin_task(Task("second", rows), 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return learner, teacher


def check_text(make: Callable[[], LwF] = lambda: LwF(2.0, T)) -> None:
    """Row by row, unpadded, the teacher in eval mode: T²·KL at each position that predicts a learnt token.

    Rows come in two batches of another order than they were in when the teacher was made.
    """
    model, rows = Tokens(), texts()
    learner, teacher = prepared(model, rows, "causal_lm", make())
    for chosen in ([rows[2], rows[0]], [rows[3], rows[1]]):
        batch = learner.collate(chosen)
        expected = 0.0
        for row in chosen:
            assert row.x is not None
            assert row.y is not None
            with torch.no_grad():
                said, taught = model.eval()(row.x[None])[0], teacher(row.x[None])[0]
            for position in range(len(row.x) - 1):
                if row.y[position + 1] != -100:
                    p, q = (taught[position] / T).softmax(0), (said[position] / T).log_softmax(0)
                    expected += 2.0 * T * T * float((p * (p.log() - q)).sum())
        output = objectives.forward(model.eval(), batch)
        model.train()  # as in a step: the teacher must not mind
        found = learner.strategy.penalty(learner.ctx, batch, output).item()  # type: ignore
        assert found == pytest.approx(expected, rel=1e-10)
        assert model.training


def test_a_language_model_by_brute_force() -> None:
    check_text()


def in_train_mode(ctx: Any, values: Any, batch: Batch) -> Output:
    with torch.no_grad():
        return ctx.forward(ctx.model.train(), batch) if not values else _swap(ctx, values, batch)


def _swap(ctx: Any, values: Any, batch: Batch) -> Output:
    other = copy.deepcopy(ctx.model).train()
    other.load_state_dict(dict(values), strict=False)
    return ctx.forward(other, batch)


def every_position(output: Output, batch: Batch, objective: str) -> Tensor:
    return output.logits[:, :-1].flatten(0, 1)


def not_shifted(output: Output, batch: Batch, objective: str) -> Tensor:
    return output.logits[batch.y != -100]


class ByStep:
    """The teacher's answers, worked out once and matched by the number of the step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ctx: Any, values: Any, batch: Batch) -> Output:
        rows = texts()
        first = ctx.collate([rows[2 * self.calls], rows[2 * self.calls + 1]])
        self.calls += 1
        other = copy.deepcopy(ctx.model).eval()
        other.load_state_dict(dict(values), strict=False)
        with torch.no_grad():
            found = ctx.forward(other, first).logits
        wide = torch.zeros(*batch.y.shape, 7)
        width = min(wide.shape[1], found.shape[1])
        wide[:, :width] = found[:, :width]
        return Output(wide)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("distillation", swapped),
        ("distillation", without_square),
        ("forward_with", in_train_mode),
        ("forward_with", ByStep()),
        ("answers", every_position),
        ("answers", not_shifted),
    ],
)
def test_wrong_versions_are_caught(place: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lwf, place, wrong)
    with pytest.raises(AssertionError):
        check_text()


def test_the_loss_takes_the_mean_over_targets() -> None:
    """The logged loss is cross-entropy and term, each a mean over the step's learnt tokens, at any padding."""
    model, rows = Tokens(), texts()
    model.drop.p = 0.0
    learner, teacher = prepared(model, rows, "causal_lm", LwF(0.7, T))
    ce = term = count = 0.0
    for row in rows:
        with torch.no_grad():
            said, taught = model(row.x[None])[0, :-1], teacher(row.x[None])[0, :-1]  # type: ignore[index]
        learnt = row.y[1:] != -100  # type: ignore[index]
        ce += float(F.cross_entropy(said[learnt], row.y[1:][learnt], reduction="sum"))  # type: ignore[index]
        term += float(distillation(said[learnt], taught[learnt], T)) * int(learnt.sum())
        count += int(learnt.sum())
    assert learner.step(rows).loss == pytest.approx((ce + 0.7 * term) / count, rel=1e-12)


def test_a_classifier_is_taught_over_the_classes_it_has_met() -> None:
    """Three outputs, two met: the third has no part in the term."""
    rows = [Example(str(i), "t", x=torch.randn(3), y=torch.tensor(2 * (i % 2))) for i in range(6)]
    learner, teacher = prepared(nn.Linear(3, 3), rows, "classification", LwF(1.0, T))
    assert isinstance(learner.strategy, LwF)
    assert learner.strategy.classes == [0, 2]
    batch = learner.collate(rows)
    output = objectives.forward(learner.model, batch)
    assert learner.ctx is not None
    found = learner.strategy.penalty(learner.ctx, batch, output)
    expected = 6 * distillation(output.logits[:, [0, 2]], teacher(batch.x)[:, [0, 2]], T)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_regression_is_held_by_half_the_squared_difference() -> None:
    rows = [Example(str(i), "t", x=torch.randn(3), y=torch.randn(())) for i in range(6)]
    learner, teacher = prepared(nn.Linear(3, 1), rows, "regression", LwF(3.0, T))
    batch = learner.collate(rows)
    output = objectives.forward(learner.model, batch)
    assert learner.ctx is not None
    found = learner.strategy.penalty(learner.ctx, batch, output)
    expected = 1.5 * (output.logits - teacher(batch.x)).square().sum()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_holds_one_copy_of_what_is_trained_and_no_base(make_lm: Callable[..., Any]) -> None:
    """With LoRA the teacher is the same base with the old adapter: its bytes are the adapter's."""
    from perdure.models.adapters import tune

    torch.set_default_dtype(torch.float32)
    model = tune(make_lm("llama"), "lora", r=2, alpha=4)
    strategy = LwF()
    rows = [Example("a", "t", x=torch.tensor([3, 4, 5]), y=torch.tensor([-100, 4, 5]))]
    learner = Learner(model, strategy, "causal_lm", validate(TrainingSettings, {}, "test"), 0)
    for index in range(3):
        learner.begin_task(Task(str(index), rows), index)
        learner.step(rows)
        learner.end_task()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(strategy.teacher) >= set(trained)
    assert sum(t.nbytes for t in strategy.teacher.values()) == sum(p.nbytes for p in trained.values())


def test_what_is_trained_only_later_has_a_teacher_too() -> None:
    """A layer frozen in the first task and trained in the second: the teacher has it as it was when that began."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    rows = [Example(str(i), "t", x=torch.randn(3), y=torch.tensor(i % 2)) for i in range(6)]
    learner = Learner(model, LwF(1.0, T), "classification", validate(TrainingSettings, {}, "test"), 0)
    learner.begin_task(Task("first", rows), 0)
    learner.step(rows)
    learner.end_task()
    model[0].requires_grad_(True)
    teacher = copy.deepcopy(model).eval()
    learner.begin_task(Task("second", rows), 1)
    learner.step(rows)
    batch = learner.collate(rows)
    output = objectives.forward(model, batch)
    assert learner.ctx is not None
    found = learner.strategy.penalty(learner.ctx, batch, output)
    torch.testing.assert_close(found, 6 * distillation(output.logits, teacher(batch.x), T), rtol=1e-12, atol=0)


def test_a_step_without_targets_has_no_term() -> None:
    model, rows = Tokens(), texts()
    learner, _ = prepared(model, rows, "causal_lm", LwF(1.0, T))
    bare = [row.but(y=torch.full_like(row.y, -100)) for row in rows if row.y is not None]
    assert learner.step(bare).loss == 0.0


def test_running_statistics_of_the_teacher_are_its_own() -> None:
    """Batch norm: the student's statistics move on; the teacher keeps those of the first task, and moves none."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    rows = [Example(str(i), "t", x=torch.randn(3), y=torch.tensor(i % 2)) for i in range(8)]
    learner, teacher = prepared(model, rows, "classification", LwF(1.0, T))
    learner.step(rows)
    batch = learner.collate(rows)
    output = objectives.forward(model.eval(), batch)
    model.train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    assert learner.ctx is not None
    found = learner.strategy.penalty(learner.ctx, batch, output)
    torch.testing.assert_close(found, 8 * distillation(output.logits, teacher(batch.x), T), rtol=1e-12, atol=0)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize(
    ("settings", "message"), [({"strength": -1}, "strength"), ({"temperature": 0}, "temperature")]
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(StrategyError, match=f"lwf: {message}"):
        LwF(**settings)
