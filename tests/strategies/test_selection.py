"""Which rows are replayed: losses one by one, choices by brute force, and runs that were killed in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.config import TrainingSettings, validate
from perdure.errors import NonFiniteError, StrategyError
from perdure.memory import RankedBuffer, ReservoirBuffer
from perdure.memory.buffer import name_of
from perdure.models.load import load
from perdure.models.objectives import losses
from perdure.strategies import DERpp, Naive, Replay
from perdure.strategies.measure import row_features
from perdure.strategies.parts import length, parts
from perdure.strategies.selection import LEARNT, Selection, row_losses
from perdure.training.learner import Learner
from perdure.types import Context, Example, Task

from .conftest import WORLDS
from .test_laws import digest, everything, killed_and_resumed

Measured = Callable[[Context, Sequence[Example]], dict[str, float]]


def begun(model: Any, rows: Sequence[Example], objective: str, strategy: Any = None, **settings: Any) -> Learner:
    checked = validate(TrainingSettings, settings, "test")
    learner = Learner(model, strategy or Naive(), objective, checked, 0)
    learner.begin_task(Task("t", rows), 0)
    model.train()
    return learner


def nano_rows() -> list[Example]:
    draw = torch.Generator().manual_seed(4)
    found = []
    for i in range(24):
        size = int(torch.randint(4, 60, (), generator=draw))
        ids = torch.randint(1, 200, (size,), generator=draw)
        labels = ids.clone()
        labels[: size // 2] = -100
        found.append(Example(str(i), "t", x=ids, y=labels))
    return [*found, found[0].but(key="nothing", y=torch.full_like(found[0].y, -100))]  # type: ignore[arg-type]


def wide_rows() -> list[Example]:
    return [Example(str(i), "t", x=torch.randn(5), y=torch.randn(2)) for i in range(40)]


CASES: dict[str, Callable[[], tuple[Any, Sequence[Example], str]]] = {
    "nano": lambda: (load("nano").model, nano_rows(), "causal_lm"),
    **{
        name: lambda name=name: (WORLDS[name].make_model(), WORLDS[name].tasks[0].train, WORLDS[name].objective)  # type: ignore[misc]
        for name in ("mlp", "regression", "llama", "llama-lora", "llama-soft")
    },
    "two values": lambda: (
        torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(5, 2)), wide_rows(), "regression"
    ),
}  # fmt: skip


def one_by_one(model: Any, row: Example, objective: str) -> float:
    """The mean over a row's targets as one would write it by hand, unpadded."""
    model.eval()
    assert row.x is not None
    assert row.y is not None
    with torch.no_grad():
        if objective == "causal_lm":
            logits = model(input_ids=row.x[None]).logits[0, -len(row.x) :]
            learnt = (row.y[1:] != -100).nonzero().flatten()
            picked = [-F.log_softmax(logits[int(i)].double(), 0)[row.y[int(i) + 1]] for i in learnt]
            return float(sum(picked)) / max(len(picked), 1)
        output = model(row.x[None])[0]
        if objective == "regression":
            return float((0.5 * (output.reshape(-1) - row.y.reshape(-1)) ** 2).mean())
        return float(-F.log_softmax(output, 0)[row.y])


def check_losses(measure: Measured, case: str) -> None:
    model, rows, objective = CASES[case]()
    learner = begun(model, rows, objective)
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    found = measure(learner.ctx, rows)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert set(found) == {name_of(row) for row in rows}
    for row in rows:
        assert found[str(name_of(row))] == pytest.approx(one_by_one(model, row, objective), abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_losses_in_batches_are_those_of_single_rows(case: str) -> None:
    check_losses(row_losses, case)


def batch_means(ctx: Context, rows: Sequence[Example]) -> dict[str, float]:
    found = {}
    for part in parts(sorted(rows, key=length)):
        batch = ctx.collate(part)
        with torch.no_grad():
            mean = float(losses(ctx.forward(ctx.model.eval(), batch), batch, ctx.objective).sum()) / sum(
                batch.counts
            )
        found |= {str(name_of(row)): mean for row in part}
    ctx.model.train()
    return found


def in_train_mode(ctx: Context, rows: Sequence[Example]) -> dict[str, float]:
    with torch.no_grad(), torch.random.fork_rng():
        return {str(name_of(row)): float(ctx.loss_of([row], train=True)) for row in rows}


def sums(ctx: Context, rows: Sequence[Example]) -> dict[str, float]:
    with torch.no_grad():
        return {str(name_of(row)): float(ctx.loss_of([row], reduction="sum")) for row in rows}


def left_in_eval_mode(ctx: Context, rows: Sequence[Example]) -> dict[str, float]:
    found = row_losses(ctx, rows)
    ctx.model.eval()
    return found


@pytest.mark.parametrize(
    ("mutant", "case"),
    [
        (batch_means, "llama"),
        (in_train_mode, "mlp"),
        (sums, "llama"),
        (sums, "two values"),
        (left_in_eval_mode, "mlp"),
    ],
)
def test_wrong_losses_are_caught(mutant: Measured, case: str) -> None:
    with pytest.raises(AssertionError):
        check_losses(mutant, case)


def test_losses_are_measured_in_full_precision_whatever_the_runs() -> None:
    model, rows, objective = CASES["llama"]()
    full, half = (begun(model, rows, objective, precision=precision) for precision in ("fp32", "bf16"))
    assert full.ctx is not None
    assert half.ctx is not None
    expected = row_losses(full.ctx, rows)
    with half.ctx.autocast():
        assert row_losses(half.ctx, rows) == expected


@pytest.mark.parametrize("case", ["mlp", "llama", "nano"])
def test_features_in_batches_are_those_of_single_rows_in_their_order(case: str) -> None:
    model, rows, objective = CASES[case]()
    learner = begun(model, rows, objective)
    assert learner.ctx is not None
    found = row_features(learner.ctx, rows)
    for row, vector in zip(rows, found, strict=True):
        torch.testing.assert_close(row_features(learner.ctx, [row])[0], vector, rtol=1e-4, atol=1e-5)
    assert model.training


def by_loss(model: Any, rows: Sequence[Example], objective: str) -> list[str]:
    """Keys, the largest loss first."""
    return [row.key for row in sorted(rows, key=lambda row: -one_by_one(model, row, objective))]


@pytest.mark.parametrize("make", [Replay, DERpp])
@pytest.mark.parametrize("where", ["mlp", "llama"])
def test_the_memory_holds_the_first_of_the_order_under_the_model_at_the_tasks_end(make: Any, where: str) -> None:
    found = WORLDS[where]
    strategy = make(capacity=4, select="loss_descending")
    learner = found.run(found.learner(strategy), upto=1)
    rows = found.tasks[0].train
    assert isinstance(strategy.buffer, RankedBuffer)
    assert [row.key for row in strategy.buffer] == by_loss(learner.model, rows, found.objective)[:4]
    assert all(("logits" in row.extras) == (make is DERpp) for row in strategy.buffer)


class Told:
    """Measures losses, and notes what it was asked."""

    def __init__(self) -> None:
        self.calls: list[dict[str, float]] = []

    def __call__(self, ctx: Context, rows: Sequence[Example]) -> dict[str, float]:
        self.calls.append(row_losses(ctx, rows))
        return self.calls[-1]


@pytest.mark.parametrize("make", [Replay, DERpp])
def test_each_pass_replays_what_is_best_now(mlp_world: Any, make: Any) -> None:
    """Half of 8 kept rows, chosen at the start of both epochs, and once for both draws of DER++."""
    strategy = make(capacity=8, ratio="once", select="loss_descending", resample=0.5)
    strategy.measure_losses = told = Told()
    epochs: dict[int, set[str]] = {}
    for index, position, result in mlp_world.train(mlp_world.learner(strategy)):
        if index == 1:
            again = {str(name_of(row)) for row in result.examples if row.source != "task"}
            epochs.setdefault(position.epoch, set()).update(again)
            assert len(told.calls) == position.epoch + 1
    assert len(told.calls) == len(epochs) == 2
    for measured, chosen in zip(told.calls, epochs.values(), strict=True):
        assert len(measured) == 8
        assert chosen == set(sorted(measured, key=lambda name: -measured[name])[:4])
    assert told.calls[0] != told.calls[1]


def test_each_task_gives_its_share(mlp_world: Any) -> None:
    """Of 6 rows of a and 6 of b, half of each in a third task, as a balanced memory keeps them."""
    strategy = Replay(capacity=12, memory="balanced", ratio="once", select="loss_ascending", resample=0.5)
    learner = mlp_world.run(mlp_world.learner(strategy))
    third = Task("c", [row.but(task="c") for row in mlp_world.tasks[0].evaluation])
    learner.begin_task(third, 2)
    again = [row for row in learner.step(third.train).examples if row.source == "replay"]
    assert sorted(row.task for row in again) == ["a"] * 3 + ["b"] * 3


def test_tokens_of_a_share_are_the_nearest(llama_world: Any) -> None:
    strategy = Replay(capacity=6, ratio="once", select="loss_ascending", resample=0.4, unit="tokens")
    learner = llama_world.run(llama_world.learner(strategy), upto=1)
    learner.begin_task(llama_world.tasks[1], 1)
    assert learner.ctx is not None
    assert strategy.buffer is not None
    held = list(strategy.buffer)
    new = list(llama_world.tasks[1].train)
    again = learner.strategy.mix(learner.ctx, new)[len(new) :]
    sizes = {row.key: int((row.y[1:] != -100).sum()) for row in held if row.y is not None}
    ordered = by_loss(learner.model, held, "causal_lm")[::-1]
    totals = [sum(sizes[key] for key in ordered[:k]) for k in range(1, 7)]
    best = min(range(6), key=lambda i: (abs(totals[i] - 0.4 * totals[-1]), i)) + 1
    assert {row.key for row in again} == set(ordered[:best])


def test_surprise_is_the_rise_since_the_end_of_the_rows_task(mlp_world: Any) -> None:
    strategy = Replay(capacity=8, ratio="once", select="surprise", resample=0.5)
    learner = mlp_world.run(mlp_world.learner(strategy), upto=1)
    assert strategy.buffer is not None
    learnt = {row.key: one_by_one(learner.model, row, "classification") for row in strategy.buffer}
    for row in strategy.buffer:
        assert row.extras[LEARNT] == pytest.approx(learnt[row.key], abs=1e-6)
    learner.begin_task(mlp_world.tasks[1], 1)
    for _ in range(5):
        learner.model.train()
        learner.step(mlp_world.tasks[1].train[:2])
    now = {row.key: one_by_one(learner.model, row, "classification") for row in strategy.buffer}
    learner.model.train()
    chosen = {row.key for row in learner.step(mlp_world.tasks[1].train).examples if row.source == "replay"}
    assert chosen == set(sorted(now, key=lambda key: learnt[key] - now[key])[:4])


def test_a_pass_is_over_when_as_many_rows_were_drawn_as_were_chosen(mlp_world: Any) -> None:
    """4 are chosen of 8. After 4, 8, 10, 14, 18 and 20 new rows at 0.6, by hand, 2, 4, 6, 8, 10 and 12 were drawn.

    So a pass takes two steps, and the first, third and fifth choose anew.
    """
    strategy = Replay(capacity=8, ratio=0.6, select="loss_descending", resample=0.5)
    strategy.measure_losses = told = Told()
    calls, replayed = [], 0
    for index, _, result in mlp_world.train(mlp_world.learner(strategy)):
        if index == 1:
            calls.append(len(told.calls))
            replayed += result.replayed_rows
            best = sorted(told.calls[-1], key=lambda name: -told.calls[-1][name])[:4]
            assert {str(name_of(row)) for row in result.examples if row.source == "replay"} <= set(best)
    assert replayed == 12
    assert calls == [1, 1, 2, 2, 3, 3]


def test_random_chooses_other_rows_in_each_pass(mlp_world: Any) -> None:
    strategy = Replay(capacity=10, ratio="once", select="random", resample=0.5)
    epochs: dict[int, set[str]] = {}
    for index, position, result in mlp_world.train(mlp_world.learner(strategy)):
        if index == 1:
            epochs.setdefault(position.epoch, set()).update(r.key for r in result.examples if r.source == "replay")
    assert [len(keys) for keys in epochs.values()] == [5, 5]
    assert all(one != other for one, other in pairwise(epochs.values()))


MADE: dict[str, Callable[[], Any]] = {
    "once": lambda: Replay(capacity=8, ratio="once", select="mixed:surprise", resample=0.5),
    "ratio": lambda: Replay(capacity=8, ratio=0.9, select="diverse", resample=0.4),
    "derpp": lambda: DERpp(capacity=8, ratio="once", select="loss_ascending", resample=0.6),
}


@pytest.mark.parametrize("name", MADE)
def test_killed_at_any_step_it_ends_the_same(name: str, mlp_world: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    whole = everything(mlp_world, mlp_world.run(mlp_world.learner(MADE[name]())))
    for at in range(6, 13):
        resumed = killed_and_resumed(mlp_world, MADE[name], at, tmp_path / str(at))
        assert everything(mlp_world, resumed) == whole, at


def test_a_choice_that_is_lost_is_seen(mlp_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check's control: a run that chooses anew where it was taken up does not end the same."""
    torch.manual_seed(5)
    whole = everything(mlp_world, mlp_world.run(mlp_world.learner(MADE["ratio"]())))
    monkeypatch.setattr(Selection, "restore", lambda self, state: None)
    resumed = killed_and_resumed(mlp_world, MADE["ratio"], 8, tmp_path / "saved")
    assert everything(mlp_world, resumed) != whole


@pytest.mark.parametrize("at", [0, 1])
def test_a_choice_on_losses_that_are_no_numbers_ends_the_run_without_a_trace(mlp_world: Any, at: int) -> None:
    """As a pass begins, and when a task ends."""
    learner = mlp_world.learner(Replay(capacity=8, ratio="once", select="loss_descending", resample=0.5))
    mlp_world.run(learner, upto=1)
    learner.begin_task(mlp_world.tasks[1], 1)
    for _ in range(at):
        learner.step(mlp_world.tasks[1].train)
    before = digest(learner.state_dict())
    spoilt = learner.model.register_forward_hook(lambda module, args, output: output * math.nan)
    with pytest.raises(NonFiniteError, match=r"replay: the loss of row 'a-\d' of task 'a' is nan"):
        learner.step(mlp_world.tasks[1].train[:4])
    spoilt.remove()
    assert digest(learner.state_dict()) == before
    assert learner.step(mlp_world.tasks[1].train[:4]).replayed_rows == 1


def test_states_of_before_there_was_a_choice_load(mlp_world: Any) -> None:
    strategy = Replay(capacity=5, ratio=0.6)
    mlp_world.run(mlp_world.learner(strategy), upto=1)
    state = {key: value for key, value in strategy.state_dict().items() if key != "selection"}
    other = Replay(capacity=5, ratio=0.6)
    other.load_state_dict(state)
    assert digest(other.state_dict()) == digest(strategy.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": "twice"}, "ratio .* must be positive and finite, or \"once\", got 'twice'"),
        ({"select": "loss"}, "select: unknown policy 'loss'"),
        ({"select": "surprise"}, "select .* right after learning none has; give resample"),
        ({"select": "mixed:surprise"}, "select .* right after learning none has; give resample"),
        ({"select": "random", "memory": "ring"}, "memory cannot be chosen with select"),
        ({"select": "random", "buffer": ReservoirBuffer(3)}, "buffer cannot be chosen with select"),
        ({"select": "random", "resample": 0}, "resample: a share of the rows must be above 0 and at most 1"),
        ({"resample": 0.5}, "resample does nothing without select"),
        ({"field": "hops"}, "field does nothing without select"),
        ({"ratio": "once", "unit": "tokens"}, 'unit "tokens" has nothing to count with ratio "once"'),
    ],
)
@pytest.mark.parametrize("make", [Replay, DERpp])
def test_settings_that_cannot_be_are_refused(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StrategyError, match=f"{make.name}: {message}"):
        make(**settings)


def test_columns_that_are_missing_are_told_before_training(mlp_world: Any) -> None:
    with pytest.raises(StrategyError, match=r"replay: row 'a-\d' of task 'a' has no column 'level'"):
        mlp_world.learner(Replay(select="difficulty_hard")).begin_task(mlp_world.tasks[0], 0)


def test_a_later_task_may_lack_the_column_in_all_its_rows_but_not_in_some(mlp_world: Any) -> None:
    first = Task("a", [row.but(fields={"level": i}) for i, row in enumerate(mlp_world.tasks[0].train)])
    some = Task("b", [row.but(fields={"level": 1} if i else {}) for i, row in enumerate(mlp_world.tasks[1].train)])
    strategy = Replay(capacity=4, select="difficulty_hard")
    learner = mlp_world.learner(strategy)
    for index, task in enumerate((first, mlp_world.tasks[1])):
        learner.begin_task(task, index)
        learner.step(task.train[:4])
        learner.end_task()
    assert sorted(row.key for row in strategy.buffer or () if row.task == "a") == ["a-8", "a-9"]
    assert len([row for row in strategy.buffer or () if row.task == "b"]) == 2
    with pytest.raises(StrategyError, match="replay: row 'b-0' of task 'b' has no column 'level'"):
        learner.begin_task(some, 2)


def test_rows_that_were_kept_without_their_loss_are_told_before_training(mlp_world: Any) -> None:
    own = ReservoirBuffer(3)
    own.extend(mlp_world.tasks[1].train)
    with pytest.raises(StrategyError, match="without the loss when they had been learnt"):
        mlp_world.learner(Replay(own, select="surprise", resample=0.5)).begin_task(mlp_world.tasks[0], 0)


def test_a_size_in_tokens_that_holds_no_row_is_refused(llama_world: Any) -> None:
    learner = llama_world.learner(Replay(capacity="1 tokens"))
    rows = tuple(row.but(y=row.x) for row in llama_world.tasks[0].train)
    with pytest.raises(StrategyError, match=r"a memory of 1 tokens holds no row of task 'a', .* takes \d+ tokens"):
        learner.begin_task(Task("a", rows), 0)
