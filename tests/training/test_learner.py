"""One optimizer step against loops written by hand: accumulation, groups, clipping, non-finite values."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.config import TrainingSettings, validate
from perdure.errors import ConfigError, ModelError, NonFiniteError, UsageError
from perdure.models.objectives import total_loss
from perdure.strategies import Naive, Strategy
from perdure.training.learner import Learner
from perdure.types import Context, Example, Output, Task


def learner(model: nn.Module, objective: str, strategy: Strategy | None = None, **settings: Any) -> Learner:
    found = Learner(model, strategy or Naive(), objective, validate(TrainingSettings, settings, "test"), 0)
    found.begin_task(Task("t", ()), 0)
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def lm_loss(model: Any, rows: Any) -> Tensor:
    """By hand: every row alone, its summed loss, over the targets of all."""
    total, targets = torch.zeros(()), 0
    for row in rows:
        logits = model(input_ids=row.x[None], use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, row.y[1:], reduction="sum")
        targets += int((row.y[1:] != -100).sum())
    return total / targets


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("micro", [None, 1, 2, 3, 8])
def test_micro_batches_are_the_big_batch(
    make_lm: Any, make_lm_rows: Any, dtype: torch.dtype, tolerance: float, micro: int | None
) -> None:
    """Eight ragged rows in any cut: loss, gradient norm and weights of one SGD step by hand, row by row."""
    rows = make_lm_rows(8, longest=20)
    assert len({len(row.x) for row in rows}) > 3
    by_hand = make_lm(spread=0.3).to(dtype)
    loss = lm_loss(by_hand, rows)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in by_hand.parameters()]).norm()
    one = learner(
        make_lm(spread=0.3).to(dtype), "causal_lm", micro_batch_size=micro, optimizer={"type": "sgd", "lr": 0.05}
    )
    result = one.step(rows)
    assert result.loss == pytest.approx(float(loss.detach()), abs=tolerance)
    assert result.gradient_norm == pytest.approx(float(norm), rel=tolerance)
    for name, parameter in by_hand.named_parameters():
        expected = parameter.detach() - 0.05 * parameter.grad
        torch.testing.assert_close(one.model.get_parameter(name).detach(), expected, rtol=0, atol=tolerance)


def check_mean(make_lm: Any) -> None:
    """Rows of 1 and 9 targets: a mean of micro-batch means would weigh the first row nine times as much."""
    model = make_lm(spread=0.3)
    short = Example("a", "t", x=torch.tensor([3, 4]), y=torch.tensor([-100, 4]))
    long = Example("b", "t", x=torch.arange(10, 20), y=torch.arange(10, 20))
    with torch.no_grad():
        each = [float(lm_loss(model, [row])) for row in (short, long)]
    right, wrong = (each[0] + 9 * each[1]) / 10, (each[0] + each[1]) / 2
    assert abs(right - wrong) > 0.05
    result = learner(copy.deepcopy(model), "causal_lm", micro_batch_size=1).step([short, long])
    assert result.loss == pytest.approx(right, abs=1e-5)
    assert (result.tokens, result.rows) == (12, 2)


def test_the_mean_is_over_the_steps_targets_not_over_micro_batches(make_lm: Any) -> None:
    check_mean(make_lm)


def test_a_mean_of_micro_batch_means_is_caught(make_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: each micro-batch's mean, divided by their number."""
    place = "perdure.training.learner"
    monkeypatch.setattr(f"{place}.group_counts", lambda batches: {"task": len(batches)})
    monkeypatch.setattr(
        f"{place}.group_losses",
        lambda output, batch, objective: {"task": total_loss(output, batch, objective) / sum(batch.counts)},
    )
    with pytest.raises(AssertionError):
        check_mean(make_lm)


class TwoGroups(Strategy):
    """Adds rows of a second group that weighs a quarter."""

    name = "two-groups"
    weights = MappingProxyType({"old": 0.25})

    def __init__(self, added: Sequence[Example]) -> None:
        self.added = added

    def mix(self, ctx: Context, examples: list[Example]) -> list[Example]:
        return [*examples, *(row.but(group="old", source=self.name) for row in self.added)]


def point(x: float, y: float) -> Example:
    return Example(f"{x}-{y}", "t", x=torch.tensor([float(x)]), y=torch.tensor([float(y)]))


def slope(value: float = 0.0) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


@pytest.mark.parametrize("micro", [None, 1, 2])
def test_groups_by_hand(micro: int | None) -> None:
    """p = w·x at w = 0, ½(p − y)². Task rows (1, 2): loss 2, gradient −2. Old rows (1, 4), (2, 1), (0, 3): losses

    8, ½, 4½, mean 13/3; gradients −4, −2, 0, mean −2. Loss 2 + ¼·13/3 = 37/12; gradient −2 − ½ = −2½, so SGD at 0.1
    goes to 0.25. One mean over all four rows would give 15/4 and −2.
    """
    one = learner(
        slope(),
        "regression",
        TwoGroups([point(1, 4), point(2, 1), point(0, 3)]),
        micro_batch_size=micro,
        optimizer={"type": "sgd", "lr": 0.1},
    )
    result = one.step([point(1, 2)])
    assert result.loss == pytest.approx(37 / 12)
    assert one.model.get_parameter("weight").item() == pytest.approx(0.25)
    assert (result.rows, result.replayed_rows, result.replayed_targets) == (4, 3, 3)


class Penalised(Strategy):
    """A penalty of 6 a micro-batch row, and a logged one in closed form."""

    name = "penalised"

    def penalty(self, ctx: Context, batch: Any, output: Output) -> Tensor:
        return 6.0 * len(batch.examples) * ctx.model.get_parameter("weight").sum()

    def gradient(self, ctx: Context, batches: Sequence[Any]) -> None:
        ctx.model.get_parameter("weight").grad.add_(5.0)  # type: ignore[union-attr]
        ctx.log("penalty", 0.5)
        ctx.log("seen", len(batches))


@pytest.mark.parametrize("micro", [None, 1])
def test_penalties_by_hand(micro: int | None) -> None:
    """w = 1, rows (1, 1) and (1, 1): loss 0, gradient 0. Penalty 6·2·w over 2 targets: 6, gradient 6; and ½, 5.

    So the loss is 6½, the gradient 11, and w = 1 − 0.1·11.
    """
    one = learner(
        slope(1.0), "regression", Penalised(), micro_batch_size=micro, optimizer={"type": "sgd", "lr": 0.1}
    )
    result = one.step([point(1, 1), point(1, 1)])
    assert result.loss == pytest.approx(6.5)
    assert result.gradient_norm == pytest.approx(11)
    assert result.logged == {"seen": 2 if micro else 1}
    assert one.model.get_parameter("weight").item() == pytest.approx(-0.1)


@pytest.mark.parametrize(("clip", "expected"), [(1.0, (0.6, 0.8)), (10.0, (3.0, 4.0)), (None, (3.0, 4.0))])
def test_clipping_by_hand(clip: float | None, expected: tuple[float, float]) -> None:
    """x = (3, 4), y = −1, w = 0: gradient (p − y)·x = (3, 4) of norm 5; clipped to 1 it is (0.6, 0.8)."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    one = learner(model, "regression", clip=clip, optimizer={"type": "sgd", "lr": 1.0})
    result = one.step([Example("a", x=torch.tensor([3.0, 4.0]), y=torch.tensor(-1.0))])
    assert result.gradient_norm == pytest.approx(5)
    assert model.weight.detach()[0].tolist() == pytest.approx([-value for value in expected], abs=1e-5)


def test_the_norm_is_over_all_parameters_together() -> None:
    """x = 3, p = 0, y = −1: gradients 3 of the weight and 1 of the bias, norm √10; clipped to half of it."""
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    one = learner(model, "regression", clip=math.sqrt(10) / 2, optimizer={"type": "sgd", "lr": 1.0})
    assert one.step([point(3, -1)]).gradient_norm == pytest.approx(math.sqrt(10))
    assert [model.weight.item(), model.bias.item()] == pytest.approx([-1.5, -0.5], abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_non_finite_step_is_stopped_before_the_update(value: float) -> None:
    """1e30 has a loss beyond fp32 (½·1e60): the third step, told with its task and row, leaves all as it was."""
    torch.manual_seed(0)
    one = learner(nn.Linear(1, 1), "regression", optimizer={"type": "adam", "lr": 0.1})
    good = [point(1, 2), point(2, 3)]
    one.step(good)
    one.step(good)
    before, moments = weights(one.model), copy.deepcopy(one.state_dict()["optimizer"])
    bad = Example("the bad row", "t", x=torch.tensor([1.0]), y=torch.tensor([value]))
    with pytest.raises(NonFiniteError) as caught:
        one.step([*good, bad])
    text = str(caught.value)
    assert text.startswith("step 3, task 't': the loss is")
    assert "'the bad row'" in text
    assert "The weights were not updated" in text
    assert caught.value.exit_code == 1
    assert one.steps == 2
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
    after = one.state_dict()["optimizer"]
    for name, state in moments.items():
        assert all(torch.equal(state[key], after[name][key]) for key in state)
    assert one.step(good).loss < 10


def test_a_bad_batch_that_is_skipped_changes_nothing_but_the_count() -> None:
    torch.manual_seed(0)
    one = learner(nn.Linear(1, 1), "regression", optimizer={"type": "adam", "lr": 0.1}, skip_bad_batches=True)
    good = [point(1, 2), point(2, 3)]
    assert one.step(good).skipped is None
    before, moments = weights(one.model), copy.deepcopy(one.state_dict()["optimizer"])
    result = one.step([Example("the bad row", "t", x=torch.tensor([1.0]), y=torch.tensor([math.nan]))])
    assert result.skipped == (
        "step 2, task 't': the loss is nan on the rows 'the bad row'. The weights were not updated."
    )
    assert (one.steps, one.schedule_step) == (2, 2)
    assert all(torch.equal(parameter, before[name]) for name, parameter in one.model.named_parameters())
    after = one.state_dict()["optimizer"]
    assert all(torch.equal(state[key], after[name][key]) for name, state in moments.items() for key in state)
    assert one.step(good).skipped is None


def test_a_non_finite_gradient_is_stopped_too() -> None:
    """√x at 0 is 0 with an infinite slope: the loss is finite, the gradient is not."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight * x).sqrt()

    one = learner(Root(), "regression", optimizer={"type": "sgd", "lr": 0.1}, clip=1.0)
    with pytest.raises(NonFiniteError, match="step 1, task 't': the gradient's norm is"):
        one.step([point(1, 2)])
    assert one.model.get_parameter("weight").item() == 0


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd", "adafactor"])
def test_steps_equal_a_hand_written_loop_bit_for_bit(make_lm: Any, make_lm_rows: Any, kind: str) -> None:
    """Three steps over padded batches with clipping, for every optimizer."""
    from transformers.optimization import Adafactor

    batches = [make_lm_rows(4, seed) for seed in range(3)]
    one = learner(
        make_lm(), "causal_lm", clip=0.1, optimizer={"type": kind, "lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}
    )
    results = [one.step(rows) for rows in batches]

    model = make_lm().train()
    optimizer = {
        "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1, momentum=0.9),
        "adafactor": lambda p: Adafactor(
            p, lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False, warmup_init=False
        ),
    }[kind](model.parameters())
    for rows, result in zip(batches, results, strict=True):
        ids = nn.utils.rnn.pad_sequence([row.x for row in rows], batch_first=True)
        labels = nn.utils.rnn.pad_sequence([row.y for row in rows], batch_first=True, padding_value=-100)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.reshape(-1, 40), labels[:, 1:].reshape(-1))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        assert (result.loss, result.gradient_norm) == (loss.item(), norm.item())
    for (name, ours), theirs in zip(one.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_frozen_parameters_do_not_move(make_mlp: Any) -> None:
    model = make_mlp(1, 1)
    model[0].requires_grad_(False)
    before = weights(model)
    one = learner(model, "regression", optimizer={"type": "adamw", "lr": 0.1, "weight_decay": 0.5})
    one.step([point(1, 2)])
    assert one.names == ["2.weight", "2.bias"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is name.startswith("0."), name


def test_gradient_checkpointing_gives_the_same_step(make_lm: Any, make_lm_rows: Any) -> None:
    rows = make_lm_rows(4)
    one, two = (learner(make_lm(), "causal_lm", gradient_checkpointing=on) for on in (False, True))
    assert one.step(rows).loss == two.step(rows).loss
    for ours, theirs in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_mixed_precision_keeps_fp32_weights_and_may_follow_fp32(make_lm: Any, make_lm_rows: Any) -> None:
    """bf16 has 8 bits of mantissa: the loss agrees to 2 %; then fp32 again in the same process, bit for bit."""
    rows = make_lm_rows(4)
    results = []
    for precision in ("fp32", "bf16", "fp32"):
        one = learner(make_lm(spread=0.3), "causal_lm", precision=precision)
        results.append(one.step(rows))
        assert {p.dtype for p in one.model.parameters()} == {torch.float32}
        assert math.isfinite(one.score(rows)["loss"])
    assert results[1].loss == pytest.approx(results[0].loss, rel=0.02)
    assert results[1].loss != results[0].loss
    assert results[2] == results[0]


def test_what_cannot_be_trained_is_refused_in_words(make_mlp: Any) -> None:
    with pytest.raises(ConfigError, match="task 't': no parameter of the model is trainable"):
        learner(make_mlp().requires_grad_(False), "classification")
    with pytest.raises(ModelError, match="gradient_checkpointing: this model cannot do it"):
        learner(make_mlp(), "classification", gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="unknown objective 'clasification'"):
        learner(make_mlp(), "clasification")


def test_another_models_state_is_refused(make_mlp: Any) -> None:
    state = learner(make_mlp(5, 3), "classification").state_dict()
    with pytest.raises(UsageError, match=r"'2\.weight' is \(3, 8\) there and \(4, 8\) here"):
        learner(make_mlp(5, 4), "classification").load_state_dict(state)
    with pytest.raises(UsageError, match=r"it has '0\.bias', which this one lacks"):
        learner(nn.Linear(5, 3), "classification").load_state_dict(state)


def test_each_learner_keeps_its_own_precision(make_mlp: Any) -> None:
    """Accelerate's state is one for the process: a second learner must not change the first one's precision."""
    one = learner(make_mlp(), "classification", precision="bf16")
    two = learner(make_mlp(), "classification")
    for each, dtype in ((one, torch.bfloat16), (two, torch.float32)):
        # On a GPU an autocast that is not told its type takes fp16; here bf16 is the default.
        with torch.autocast("cpu", dtype=torch.float16, enabled=False), each.autocast():
            assert each.model(torch.ones(1, 5)).dtype is dtype


def test_a_skipped_batch_leaves_running_means_as_they_were() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    one = learner(model, "regression", skip_bad_batches=True)
    good = [Example(f"{i}", "t", x=torch.randn(2), y=torch.randn(())) for i in range(4)]
    bad = [Example("bad", "t", x=torch.tensor([math.nan, 1.0]), y=torch.tensor(0.0)), *good]
    one.begin_task(Task("t", tuple(good)), 0)
    one.step(good)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert one.step(bad).skipped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert math.isfinite(one.score(good)["loss"])
