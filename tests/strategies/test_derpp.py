"""DER++ against numbers by hand and brute force; the known wrong versions are planted and must be caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.config import TrainingSettings, validate
from perdure.errors import StrategyError
from perdure.models.objectives import answers
from perdure.strategies import DERpp
from perdure.training.learner import Learner
from perdure.types import Example, Output, Task

ALPHA, BETA = 0.3, 0.7


pytestmark = pytest.mark.usefixtures("float64")


def begun(
    model: nn.Module, first: list[Example], second: list[Example], objective: str, strategy: DERpp
) -> Learner:
    """A learner in its second task whose weights have moved on since the first ended."""
    settings = {"optimizer": {"type": "sgd", "lr": 0.1}, "batch_size": 4}
    learner = Learner(model, strategy, objective, validate(TrainingSettings, settings, "test"), 0)
    learner.begin_task(Task("first", first), 0)
    learner.end_task()
    learner.begin_task(Task("second", second), 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return learner


class Scale(nn.Module):
    """Logits (0, wx) of one number."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), self.w * x], 1)


def test_a_number_by_hand() -> None:
    """w was 1 when x = 2 was kept: z₁ = (0, 2). Now w = 0: every loss is ln 2, ‖z − z₁‖² = 4.

    One new row, x₁ and x₂ are the one kept row: ln 2 + α · 4 + β · ln 2; the gradient by w is
    new (½ − 1)·1 + α · 2 · (0 − 2) · 2 + β (½ − 1) · 2.
    """
    kept = [Example("k", "t", x=torch.tensor([2.0]), y=torch.tensor(1))]
    new = [Example("n", "t", x=torch.tensor([1.0]), y=torch.tensor(1))]
    model = Scale(1.0)
    learner = begun(model, kept, new, "classification", DERpp(alpha=ALPHA, beta=BETA))
    with torch.no_grad():
        model.w.zero_()
    result = learner.step(new)
    ln2 = float(torch.tensor(2.0).log())
    assert result.loss == pytest.approx(ln2 + ALPHA * 4 + BETA * ln2, abs=1e-12)
    gradient = -0.5 + ALPHA * 2 * -2 * 2 + BETA * -0.5 * 2
    assert float(model.w.detach()) == pytest.approx(-0.1 * gradient, abs=1e-12)
    assert (result.rows, result.replayed_rows) == (3, 2)


class Tokens(nn.Module):
    """A causal LM without attention: the next token from the present one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(4, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.drop(self.embed(ids)))


def texts(task: str) -> list[Example]:
    rows = []
    for i, length in enumerate((4, 9, 5, 7, 6)):
        ids = (torch.arange(length) * (i + 2) + len(task)) % 7
        labels = ids.clone()
        labels[: i + 1] = -100
        rows.append(Example(f"{task}{i}", task, x=ids, y=labels))
    return rows


def check_text(make: Callable[[], DERpp], top: int) -> None:
    """Row by row: mean CE of new tokens + α · mean over x₁ of Σ_{k largest} (z − z₁)² + β · mean CE of x₂."""
    model = Tokens()
    first, second = texts("first"), texts("second")[:3]
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = begun(model, first, second, "causal_lm", make())
    result = learner_step(learner, second)
    with torch.no_grad():
        totals: dict[str, list[float]] = {"task": [0.0, 0.0], "derpp-logits": [0.0, 0.0], "derpp-rows": [0.0, 0.0]}
        for row in result.examples:
            learnt = row.y[1:] != -100
            now = result.logits(row)[:-1][learnt]
            if row.group == "derpp-logits":
                before = torch.func.functional_call(model, old, (row.x[None],))[0, :-1][learnt]
                best = before.topk(top).indices
                totals[row.group][0] += float((now - before).square().gather(1, best).sum())
            else:
                totals[row.group][0] += float(F.cross_entropy(now, row.y[1:][learnt], reduction="sum"))
            totals[row.group][1] += int(learnt.sum())
    mean = {group: value / max(count, 1) for group, (value, count) in totals.items()}
    expected = mean["task"] + ALPHA * mean["derpp-logits"] + BETA * mean["derpp-rows"]
    assert result.loss == pytest.approx(expected, rel=1e-12)
    drawn = {g: [row.key for row in result.examples if row.group == g] for g in ("derpp-logits", "derpp-rows")}
    assert len(drawn["derpp-logits"]) == len(drawn["derpp-rows"]) == 3
    assert drawn["derpp-logits"] != drawn["derpp-rows"]  # drawn apart (this seed's draws do differ)


class Stepped:
    def __init__(self, loss: float, examples: Any, logits: Callable[[Example], Tensor]) -> None:
        self.loss, self.examples, self.logits = loss, examples, logits


def learner_step(learner: Learner, rows: list[Example]) -> Stepped:
    """A step, and what the model said of each row before it."""
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    result = learner.step(rows)
    return Stepped(
        result.loss,
        result.examples,
        lambda row: torch.func.functional_call(learner.model, before, (row.x[None],))[0],  # type: ignore[index]
    )


@pytest.mark.parametrize("top", [7, 2])
def test_a_language_model_by_brute_force(top: int) -> None:
    check_text(lambda: DERpp(alpha=ALPHA, beta=BETA, top_k=top), top)


class OneDraw(DERpp):
    """Wrong: x₁ and x₂ are the same rows."""

    def mix(self, ctx: Any, examples: list[Example]) -> list[Example]:
        drawn = self.draw(ctx, examples)
        return [*examples, *(row.but(source=self.name, group=g) for g in self.weights for row in drawn)]


class OneMean(DERpp):
    """Wrong: the kept rows' loss is in one mean with the new rows'."""

    def mix(self, ctx: Any, examples: list[Example]) -> list[Example]:
        found = super().mix(ctx, examples)
        return [row.but(group="task") if row.group == "derpp-rows" else row for row in found]


class Counted(DERpp):
    """Wrong: the rows whose logits are matched count with their own loss too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.weights = {"derpp-rows": self.beta}


class OverClasses(DERpp):
    """Wrong: a mean over the logits too."""

    def penalty(self, ctx: Any, batch: Any, output: Any) -> dict[str, Tensor]:
        return {group: value / 7 for group, value in super().penalty(ctx, batch, output).items()}


class OverTheStep(DERpp):
    """Wrong: the logits' term is divided by all targets of the step."""

    def penalty(self, ctx: Any, batch: Any, output: Any) -> Any:
        return sum(super().penalty(ctx, batch, output).values(), start=torch.zeros(()))


class ShiftedPlaces(DERpp):
    """Wrong: the kept logits are compared with those of another position."""

    def penalty(self, ctx: Any, batch: Any, output: Any) -> dict[str, Tensor]:
        rows = [row.but(extras={**row.extras, "places": row.extras["places"].roll(1, 0)}) for row in batch.examples
                if "places" in row.extras]  # fmt: skip
        others = [row for row in batch.examples if "places" not in row.extras]
        return super().penalty(ctx, type(batch)((*others, *rows), batch.x, batch.y, batch.counts, 0), output)


@pytest.mark.parametrize("mutant", [OneDraw, OneMean, Counted, OverClasses, OverTheStep, ShiftedPlaces])
def test_wrong_versions_are_caught(mutant: Callable[..., DERpp]) -> None:
    with pytest.raises(AssertionError):
        check_text(lambda: mutant(alpha=ALPHA, beta=BETA, top_k=7), 7)


def check_kept(make: Callable[..., DERpp]) -> None:
    model = Tokens()
    model.drop.p = 0.5
    strategy = make(top_k=3)
    rows = texts("first")
    learner = Learner(model, strategy, "causal_lm", validate(TrainingSettings, {}, "test"), 0)
    learner.begin_task(Task("first", rows), 0)
    learner.step(rows)
    learner.end_task()
    model.eval()
    assert strategy.buffer is not None
    assert len(strategy.buffer) == 5
    for row in strategy.buffer:
        said = model(row.x[None])[0, :-1][row.y[1:] != -100].detach()
        best = said.topk(3)
        torch.testing.assert_close(row.extras["logits"], best.values, rtol=0, atol=1e-13)
        assert torch.equal(row.extras["places"].long(), best.indices)


def test_logits_are_kept_in_eval_mode_at_the_end_of_the_task() -> None:
    check_kept(DERpp)


class InTrainMode(DERpp):
    """Wrong: dropout is on when logits are kept."""

    def _with_logits(self, ctx: Any, rows: Any) -> Any:
        for row in rows:
            ctx.model.train()
            batch = ctx.collate([row])
            logits = answers(Output(ctx.forward(ctx.model, batch).logits.detach()), batch, ctx.objective)
            kept = logits.topk(3)
            yield row.but(extras={"logits": kept.values, "places": kept.indices})


class BeforeTheTask(DERpp):
    """Wrong: logits are those of the model before it learnt the task."""

    def prepare(self, ctx: Any) -> None:
        super().prepare(ctx)
        self.rows = list(super()._with_logits(ctx, ctx.task.train))

    def _with_logits(self, ctx: Any, rows: Any) -> Any:
        return iter(self.rows)


@pytest.mark.parametrize("mutant", [InTrainMode, BeforeTheTask])
def test_logits_of_another_model_are_caught(mutant: type[DERpp]) -> None:
    with pytest.raises(AssertionError):
        check_kept(mutant)


def test_a_buffer_without_logits_is_refused() -> None:
    from perdure.memory import ReservoirBuffer
    from perdure.strategies import Chain, Replay

    buffer = ReservoirBuffer(3)
    buffer.extend(texts("old"))
    learner = Learner(Tokens(), DERpp(buffer), "causal_lm", validate(TrainingSettings, {}, "test"), 0)
    with pytest.raises(StrategyError, match="holds rows without logits"):
        learner.begin_task(Task("first", texts("first")), 0)
    with pytest.raises(StrategyError, match="share one buffer"):
        Chain([Replay(buffer), DERpp(buffer)])


def test_the_own_loss_of_a_row_that_is_matched_does_not_count_even_where_it_is_infinite() -> None:
    rows = [Example(str(i), "t", x=torch.randn(3), y=torch.tensor([1e200])) for i in range(3)]
    new = [Example("n", "t", x=torch.randn(3), y=torch.zeros(1))]
    learner = begun(nn.Linear(3, 1), rows, new, "regression", DERpp(alpha=1.0, beta=0.0))
    assert learner.step(new).loss < 1e6


def test_rows_go_through_the_model_in_bounded_parts() -> None:
    from perdure.strategies.parts import parts as in_parts

    rows = [Example(str(i), x=torch.zeros(n)) for i, n in enumerate([3000, 1000, 900, 5000, *[10] * 70])]
    parts = list(in_parts(rows))
    assert [row.key for part in parts for row in part] == [row.key for row in rows]
    assert all(len(part) == 1 or len(part) * max(len(row.x) for row in part) <= 4096 for part in parts)  # type: ignore
    assert max(map(len, parts)) == 32


def test_a_ring_keeps_the_newest_rows() -> None:
    strategy = DERpp(capacity=2, memory="ring")
    rows = texts("first")
    learner = Learner(Tokens(), strategy, "causal_lm", validate(TrainingSettings, {}, "test"), 0)
    learner.begin_task(Task("first", rows), 0)
    learner.end_task()
    assert strategy.buffer is not None
    assert sorted(row.key for row in strategy.buffer) == ["first3", "first4"]


def test_a_regression_keeps_its_prediction() -> None:
    """α · mean (p − p₁)² + β · mean ½(p − y)², with two outputs: means over values."""
    model = nn.Linear(3, 2)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [Example(str(i), "t", x=torch.randn(3), y=torch.randn(2)) for i in range(6)]
    learner = begun(model, rows[:3], rows[3:], "regression", DERpp(alpha=ALPHA, beta=BETA, top_k=1))
    found = learner_step(learner, rows[3:])
    parts = {
        group: torch.cat(
            [
                (
                    found.logits(row)
                    - (torch.func.functional_call(model, old, (row.x[None],))[0] if matched else row.y)
                )  # type: ignore[index]
                for row in found.examples
                if row.group == group
            ]
        )
        for group, matched in (("task", False), ("derpp-logits", True), ("derpp-rows", False))
    }
    means = {group: gap.detach().square().mean() for group, gap in parts.items()}
    expected = means["task"] / 2 + ALPHA * means["derpp-logits"] + BETA * means["derpp-rows"] / 2
    assert found.loss == pytest.approx(float(expected), rel=1e-12)


def test_a_weight_of_zero_draws_nothing() -> None:
    rows = texts("first")
    learner = begun(Tokens(), rows, texts("second"), "causal_lm", DERpp(alpha=0.0, beta=1.0))
    assert {row.group for row in learner.step(texts("second")).examples} == {"task", "derpp-rows"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"alpha": -1}, "alpha"), ({"beta": float("inf")}, "beta"), ({"top_k": 0}, "top_k"), ({"ratio": 0}, "ratio")],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StrategyError, match=f"derpp: {message}"):
        DERpp(**settings)
