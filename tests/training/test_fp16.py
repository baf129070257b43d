"""fp16: losses near those of fp32, gradients unscaled before anyone looks, overflows, resuming."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perdure.config import TrainingSettings, validate
from perdure.errors import ModelError, NonFiniteError
from perdure.models.adapters import tune
from perdure.models.load import load
from perdure.strategies import EWC, GEM, Chain, LwF, Naive, Replay, Strategy
from perdure.training.learner import Learner, StepResult
from perdure.training.scaling import PATIENCE, START, Scaling
from perdure.types import Context, Example, Output, Task


def learner(model: nn.Module, objective: str, strategy: Strategy | None = None, **settings: Any) -> Learner:
    given = {"precision": "fp16", "optimizer": {"lr": 3e-3}, **settings}
    found = Learner(model, strategy or Naive(), objective, validate(TrainingSettings, given, "test"), 0)
    found.begin_task(Task("t", ()), 0)
    return found


def rescaled(one: Learner, scale: float) -> None:
    assert one.scaling is not None
    one.scaling.load_state_dict({**one.scaling.state_dict(), "scale": scale})


def point(x: float, y: float, key: str = "p") -> Example:
    return Example(key, "t", x=torch.tensor([x]), y=torch.tensor(y))


def slope(value: float) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


@pytest.mark.parametrize("kind", ["qwen2", "nano"])
def test_losses_follow_fp32_over_twenty_steps(make_lm: Any, make_lm_rows: Any, kind: str) -> None:
    """To 2 %; Qwen2 tuned in full, nano with LoRA. The weights stay in fp32."""
    losses = []
    for precision in ("fp32", "fp16"):
        torch.manual_seed(0)
        model = make_lm("qwen2", spread=0.3) if kind == "qwen2" else tune(load("nano").model, "lora", r=4, alpha=8)
        one = learner(model, "causal_lm", precision=precision)
        rows = make_lm_rows(80)
        found = [one.step(rows[4 * i : 4 * i + 4]) for i in range(20)]
        assert {p.dtype for p in one.model.parameters()} == {torch.float32}
        assert not any(result.overflow or result.skipped for result in found)
        losses.append([*(result.loss for result in found), one.score(rows)["loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1] != losses[0]
    assert losses[1][-1] < 0.95 * losses[1][0]


class Watching(Strategy):
    """Notes what its hooks are shown, with a penalty of Σ w over the batch's targets."""

    name = "watching"
    wants_task_gradient = True

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def penalty(self, ctx: Context, batch: Any, output: Output) -> Tensor:
        """The sum of the weights, once a target."""
        return sum(p.sum() for p in ctx.model.parameters()) * sum(batch.counts)  # type: ignore[return-value]

    def observe(self, ctx: Context, batches: Any) -> None:
        self.seen["observe"] = _only(ctx.model)

    def gradient(self, ctx: Context, batches: Any) -> None:
        self.seen["gradient"] = _only(ctx.model)


def _only(model: nn.Module) -> Tensor:
    (parameter,) = model.parameters()
    assert parameter.grad is not None
    return parameter.grad.clone()


@pytest.mark.parametrize("micro", [None, 1])
def test_hooks_norm_and_clipping_see_gradients_that_are_not_scaled(micro: int | None) -> None:
    """½(wx − y)² at w = 2 on (1, 0) and (3, 2): slopes 2 and 12, mean 7; with the penalty's 1 it is 8.

    All numbers are exact in fp16. Clipped to 4, SGD at 0.5 moves w by 2 to 0.
    """
    strategy = Watching()
    one = learner(
        slope(2.0), "regression", strategy, clip=4.0, micro_batch_size=micro, optimizer={"type": "sgd", "lr": 0.5}
    )
    result = one.step([point(1.0, 0.0, "a"), point(3.0, 2.0, "b")])
    assert strategy.seen["observe"].item() == 7
    assert strategy.seen["gradient"].item() == 8
    assert result.gradient_norm == 8
    assert result.loss == (2 + 8) / 2 + 2
    assert one.model.weight.item() == pytest.approx(0.0, abs=1e-5)


def check_small_gradients() -> None:
    """w = 2⁻¹⁴, x = 2⁻⁶, y = 0 with 16 inputs' worth of smallness: the slope w·x² is 2⁻²⁶, below fp16's 2⁻²⁴."""
    one = learner(slope(2.0**-14), "regression", optimizer={"type": "sgd", "lr": 1.0})
    assert one.step([point(2.0**-6, 0.0)]).gradient_norm == 2.0**-26


def test_gradients_below_fp16_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    check_small_gradients()
    monkeypatch.setattr("perdure.training.scaling.START", 1.0)  # the mutant: nothing is scaled
    with pytest.raises(AssertionError):
        check_small_gradients()


def test_an_overflow_leaves_the_update_out_and_halves_the_scale() -> None:
    """At a scale of 2³⁰ a slope of 8 is 2³³: halved 18 times it is 2¹⁵, which fp16 holds (2¹⁶ it does not)."""
    one = learner(slope(2.0), "regression", optimizer={"type": "sgd", "lr": 0.0625})
    rescaled(one, 2.0**30)
    rows = [point(2.0, 0.0)]
    results: list[StepResult] = []
    while not results or results[-1].overflow:
        before = one.model.weight.item()
        results.append(one.step(rows))
        assert (one.model.weight.item() != before) == (not results[-1].overflow)
    assert len(results) == 19
    assert one.scaling is not None
    assert one.scaling.scale == 2.0**12
    assert one.steps == one.schedule_step == 19
    assert not any(result.skipped for result in results)
    assert results[-1].gradient_norm == 8
    assert one.model.weight.item() == 1.5
    assert not any(math.isfinite(result.gradient_norm) for result in results[:-1])


def test_a_strategy_is_shown_nothing_of_a_step_that_overflowed() -> None:
    strategy = Watching()
    one = learner(slope(2.0), "regression", strategy)
    rescaled(one, 2.0**60)
    assert one.step([point(2.0, 0.0)]).overflow
    assert strategy.seen == {}


def test_what_overflows_at_the_lowest_scale_is_an_error() -> None:
    """x = 60,000 and y = 0 at w = 1: the slope is 3.6e9. Also where a loss is not finite at any scale."""
    for rows, scale, what in (
        ([point(60_000.0, 0.0)], 1.0, "gradient's norm is inf"),
        ([point(math.nan, 0.0)], 4096.0, "loss is nan"),
    ):
        one = learner(slope(1.0), "regression")
        rescaled(one, scale)
        before = copy.deepcopy(one.state_dict())
        with pytest.raises(NonFiniteError, match=what):
            one.step(rows)
        after = one.state_dict()
        assert after["scaling"] == before["scaling"]
        assert torch.equal(after["model"]["weight"], before["model"]["weight"])
        assert not one.step([point(1.0, 0.0)]).overflow
    skipping = learner(slope(1.0), "regression", skip_bad_batches=True)
    rescaled(skipping, 1.0)
    assert "norm is inf" in (skipping.step([point(60_000.0, 0.0)]).skipped or "")


def test_the_scale_grows_after_so_many_good_steps() -> None:
    scaling = Scaling(torch.device("cpu"))
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight])

    def step(gradient: float) -> bool:
        scaling.scaled(weight.sum())
        weight.grad = torch.tensor([gradient])
        return scaling.unscale(optimizer, {})

    for _ in range(PATIENCE - 1):
        assert step(1.0)
    assert scaling.scale == START
    assert not step(math.inf)
    assert scaling.lower()
    for _ in range(PATIENCE):
        assert scaling.scale == START / 2
        assert step(START)
    assert weight.grad is not None
    assert weight.grad.item() == 2
    assert scaling.scale == START


def test_an_overflow_in_a_gradient_that_waits_is_seen() -> None:
    scaling = Scaling(torch.device("cpu"))
    weight = nn.Parameter(torch.ones(1))
    scaling.scaled(weight.sum())
    weight.grad = torch.ones(1)
    assert not scaling.unscale(torch.optim.SGD([weight]), {weight: torch.tensor([math.inf])})
    aside = {weight: torch.tensor([START])}
    assert scaling.unscale(torch.optim.SGD([weight]), aside)
    assert aside[weight].item() == 1


def grown(make_lm: Any, make_lm_rows: Any, strategy: Strategy, **settings: Any) -> tuple[Learner, list[Task]]:
    tasks = [Task(name, make_lm_rows(6, seed, name)) for seed, name in enumerate("ab")]
    one = learner(make_lm("qwen2", spread=0.3), "causal_lm", strategy, **settings)
    one.begin_task(tasks[0], 0)
    return one, tasks


def test_a_resumed_training_ends_the_same(make_lm: Any, make_lm_rows: Any) -> None:
    """Saved after an overflow; the scale and its count come back, and every weight to the bit."""
    one, tasks = grown(make_lm, make_lm_rows, Naive())
    rescaled(one, 2.0**40)
    for i in range(4):
        one.step(tasks[0].train[i : i + 2])
    saved = copy.deepcopy(one.state_dict())
    other, _ = grown(make_lm, make_lm_rows, Naive())
    other.load_state_dict(saved)
    ends = []
    for each in (one, other):
        torch.set_rng_state(saved["rng"]["torch"])
        overflows = [each.step(tasks[0].train[i % 4 : i % 4 + 2]).overflow for i in range(40)]
        ends.append((overflows, each.state_dict()))
    assert True in ends[0][0]
    assert False in ends[0][0]
    assert ends[0][0] == ends[1][0]
    assert ends[0][1]["scaling"] == ends[1][1]["scaling"]
    for name, value in ends[0][1]["model"].items():
        assert torch.equal(value, ends[1][1]["model"][name])
    without, _ = grown(make_lm, make_lm_rows, Naive())  # the mutant: the scale is not in the state
    without.load_state_dict({name: value for name, value in saved.items() if name != "scaling"})
    assert not without.step(tasks[0].train[:2]).overflow


@pytest.mark.parametrize(
    "make",
    [
        Naive,
        lambda: Chain([Replay(capacity=6), EWC(strength=0.01)]),
        lambda: GEM(per_task=4),
        LwF,
    ],
    ids=["naive", "replay+ewc", "gem", "lwf"],
)
def test_micro_batches_are_near_the_big_batch(
    make_lm: Any, make_lm_rows: Any, make: Callable[[], Strategy]
) -> None:
    """Two tasks in any cut: weights after ten steps of SGD, to a hundredth of how far they came."""
    ends, starts = [], []
    for micro in (None, 2):
        one, tasks = grown(
            make_lm, make_lm_rows, make(), micro_batch_size=micro, optimizer={"type": "sgd", "lr": 0.05}
        )
        starts.append(torch.cat([p.detach().flatten() for p in one.model.parameters()]))
        for index, task in enumerate(tasks):
            one.begin_task(task, index)
            for _ in range(5):
                assert not one.step(task.train).overflow
            one.end_task()
        ends.append(torch.cat([p.detach().flatten() for p in one.model.parameters()]))
    assert torch.equal(*starts)
    assert float((ends[0] - ends[1]).norm()) < 0.01 * float((ends[0] - starts[0]).norm())


def test_a_strategys_own_gradients_are_taken_in_fp32(make_lm: Any, make_lm_rows: Any) -> None:
    """`loss_of` and the Fisher information are those of a learner in fp32, bit for bit."""
    rows = make_lm_rows(5)
    found = []
    for precision in ("fp32", "fp16"):
        strategy = EWC()
        one = learner(make_lm("qwen2", spread=0.3), "causal_lm", strategy, precision=precision)
        one.begin_task(Task("t", rows), 0)
        assert one.ctx is not None
        gradients = torch.autograd.grad(one.ctx.loss_of(rows), list(one.model.parameters()))
        one.end_task()
        found.append([*gradients, *strategy.importance.values()])
    assert all(map(torch.equal, *found))


class Unable(nn.Module):
    """A model with an operation that the device lacks in fp16."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("\"frobnicate_cpu\" not implemented for 'Half'")


def test_what_the_device_cannot_do_is_refused_in_words() -> None:
    one = learner(Unable(), "regression")
    with pytest.raises(ModelError, match=r"precision fp16: \"frobnicate_cpu\".* on cpu; use bf16 or fp32"):
        one.step([point(1.0, 0.0)])
    assert not learner(slope(1.0), "regression").step([point(1.0, 0.0)]).overflow


def test_each_learner_keeps_its_own_precision(make_mlp: Any) -> None:
    """One after another in one process, and side by side."""
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    made = {name: learner(make_mlp(), "classification", precision=name) for name in dtypes}
    for name, one in made.items():
        with one.autocast():
            assert one.model(torch.ones(1, 5)).dtype is dtypes[name]
        assert ("scaling" in one.state_dict()) == (name == "fp16")
