"""Replay: how many rows, which, and how the loss counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from perdure.errors import StrategyError
from perdure.memory import BalancedBuffer, ReservoirBuffer
from perdure.strategies import Replay
from perdure.strategies.quota import Quota
from perdure.types import Example


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.29, 0.6, 1.0, 2.5])
def test_ratio_is_exact_at_every_step(mlp_world: Any, ratio: float) -> None:
    """After n new rows of the second task ⌊ratio·n⌋ were replayed, never one more or less."""
    learner = mlp_world.learner(Replay(capacity=5, ratio=ratio))
    new = replayed = 0
    for index, _, result in mlp_world.train(learner):
        if index == 0:
            assert result.replayed_rows == 0
            continue
        new += result.rows - result.replayed_rows
        replayed += result.replayed_rows
        assert replayed == new * round(100 * ratio) // 100


def check_new_rows(world: Any, make: Callable[..., Replay]) -> None:
    """However small the memory, every new row is trained on in every epoch."""
    learner = world.learner(make(capacity=2, ratio=1.0))
    seen: Counter[str] = Counter()
    for index, _, result in world.train(learner):
        if index == 1:
            seen.update(row.key for row in result.examples if row.source == "task")
    assert seen == {row.key: 2 for row in world.tasks[1].train}


def test_no_new_row_is_left_out(mlp_world: Any) -> None:
    check_new_rows(mlp_world, Replay)


class Zipped(Replay):
    """Wrong: new and kept rows go in pairs, so that the shorter list cuts the longer."""

    def mix(self, ctx: Any, examples: list[Example]) -> list[Example]:
        if not self.buffer:
            return examples
        pairs = zip(examples, self.buffer.sample(len(examples)), strict=False)
        return [row for new, kept in pairs for row in (new, kept.but(source=self.name))]


def test_rows_in_pairs_are_caught(mlp_world: Any) -> None:
    with pytest.raises(AssertionError):
        check_new_rows(mlp_world, Zipped)


def test_replayed_rows_are_earlier_ones_and_say_so(mlp_world: Any) -> None:
    strategy = Replay(capacity=5)
    learner = mlp_world.run(mlp_world.learner(strategy), upto=1)
    learner.begin_task(mlp_world.tasks[1], 1)
    assert learner.ctx is not None
    mixed = strategy.mix(learner.ctx, list(mlp_world.tasks[1].train[:3]))
    assert [row.source for row in mixed] == ["task"] * 3 + ["replay"] * 3
    assert {row.task for row in mixed[3:]} == {"a"}
    assert len({row.key for row in mixed[3:]}) == 3


def test_loss_is_the_mean_over_all_target_tokens(llama_world: Any) -> None:
    """By hand: the sum of every row's loss, new or replayed, over the number of all their targets."""
    strategy = Replay(capacity=5)
    learner = llama_world.run(llama_world.learner(strategy), upto=1)
    learner.begin_task(llama_world.tasks[1], 1)
    assert learner.ctx is not None
    rows = list(llama_world.tasks[1].train[:4])
    saved = strategy.state_dict()
    mixed = strategy.mix(learner.ctx, rows)
    strategy.load_state_dict(saved)
    total, targets = 0.0, 0
    for row in mixed:
        total += float(learner.ctx.loss_of([row], reduction="sum").detach())
        targets += int((row.y[1:] != -100).sum())
    assert learner.step(rows).loss == pytest.approx(total / targets, rel=1e-6)


def test_a_buffer_of_ones_own_and_the_default(mlp_world: Any) -> None:
    """None makes a reservoir of 1,000 from the run's seed."""
    own = ReservoirBuffer(3, seed=9)
    mlp_world.run(mlp_world.learner(Replay(own)), upto=1)
    assert len(own) == 3
    default = Replay()
    mlp_world.run(mlp_world.learner(default), upto=1)
    assert isinstance(default.buffer, ReservoirBuffer)
    assert (default.buffer.capacity, default.buffer.seed) == (1000, 0)


def test_memory_smaller_than_a_steps_share_is_gone_through_again(mlp_world: Any) -> None:
    strategy = Replay(capacity=2, ratio=2.0)
    learner = mlp_world.run(mlp_world.learner(strategy), upto=1)
    learner.begin_task(mlp_world.tasks[1], 1)
    assert learner.step(mlp_world.tasks[1].train[:4]).replayed_rows == 8


@pytest.mark.parametrize("ratio", [0.1, 0.29, 1.0, 2.5])
def test_ratio_in_tokens_is_exact_to_within_a_row(llama_world: Any, ratio: float) -> None:
    """After n new targets the replayed ones are at least ratio · n, and less than that without the last row."""
    learner = llama_world.learner(Replay(capacity=5, ratio=ratio, unit="tokens"))
    new = replayed = 0
    for index, _, result in llama_world.train(learner):
        if index == 0:
            continue
        last = [int((row.y[1:] != -100).sum()) for row in result.examples if row.source == "replay"]
        new += result.targets - result.replayed_targets
        replayed += result.replayed_targets
        assert replayed >= ratio * new - 1e-9
        assert not last or replayed - last[-1] < ratio * new


def check_lengths(quota: Any) -> None:
    """Rows of 1 to 12 targets, 40,000 steps of a few tokens each: every row is drawn as often (χ², 0.1 %)."""
    buffer = ReservoirBuffer(12, seed=1)
    for i in range(12):
        labels = torch.full((14,), -100)
        labels[1 : i + 2] = 1
        buffer.offer(Example(str(i), "t", x=torch.ones(14).long(), y=labels))
    new = [Example("n", "u", x=torch.ones(4).long(), y=torch.ones(4).long())]
    counts: Counter[str] = Counter()
    for _ in range(8_000):
        counts.update(row.key for row in quota.draw(buffer.sample, new, lambda row: int((row.y[1:] != -100).sum())))
    expected = sum(counts.values()) / 12
    assert expected > 200
    assert sum((counts[str(i)] - expected) ** 2 / expected for i in range(12)) < 31.3


def test_no_row_is_passed_over_for_its_length() -> None:
    check_lengths(Quota(0.7, "tokens"))


class OnlyWhatFits(Quota):
    """Wrong: a row longer than what is owed is left, and another is drawn in the next step: long rows are rare."""

    def draw(self, sample: Any, new: Any, count: Any) -> list[Example]:
        rows: list[Example] = []
        self.new += sum(map(count, new))
        for row in sample(max(len(new), 1)):
            if self.drawn + count(row) > self._ratio * self.new:
                break
            rows.append(row)
            self.drawn += count(row)
        return rows


def test_passing_over_long_rows_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_lengths(OnlyWhatFits(0.7, "tokens"))


def test_a_loaded_strategy_has_the_buffer_that_was_saved(mlp_world: Any) -> None:
    """Also into a strategy that was built from a name, without the user's object; and from an older state."""
    own = Replay(BalancedBuffer(6, seed=4))
    assert (own.capacity, own.memory) == (6, "balanced")
    mlp_world.run(mlp_world.learner(own), upto=1)
    state = own.state_dict()
    other = Replay()
    mlp_world.learner(other).begin_task(mlp_world.tasks[0], 0)
    other.load_state_dict(state)
    assert isinstance(other.buffer, BalancedBuffer)
    assert [row.key for row in other.buffer] == [row.key for row in own.buffer or ()]
    older = {"buffer": None, "new_rows": 7, "owed": 3}
    other.load_state_dict(older)
    assert other.state_dict()["counts"] == [[7, 3]]


def test_soft_labels_have_no_class_to_balance(mlp_world: Any) -> None:
    learner = mlp_world.learner(Replay(memory="class-balanced"))
    rows = tuple(row.but(y=torch.tensor([0.2, 0.8, 0.0])) for row in mlp_world.tasks[0].train)
    with pytest.raises(StrategyError, match="replay: "):
        learner.begin_task(type(mlp_world.tasks[0])("soft", rows), 0)


def test_a_class_balanced_memory_is_refused_for_a_regression() -> None:
    for strategy in (Replay(memory="class-balanced"), Replay(BalancedBuffer(5, by="class"))):
        with pytest.raises(StrategyError, match="needs classes, and a regression has none"):
            strategy.check(torch.nn.Linear(1, 1), "regression")
    Replay(memory="class-balanced").check(torch.nn.Linear(1, 1), "classification")


@pytest.mark.parametrize(
    "settings",
    [{"ratio": 0}, {"ratio": float("nan")}, {"ratio": float("inf")}, {"capacity": 0}, {"capacity": "5%"},
     {"capacity": 2.5}, {"unit": "rows"}],
)  # fmt: skip
def test_bad_settings_are_refused_in_words(settings: dict[str, Any]) -> None:
    with pytest.raises(StrategyError, match=f"replay: {next(iter(settings))}"):
        Replay(**settings)


def test_memory_takes_every_task_alike(mlp_world: Any) -> None:
    """Over many seeds a reservoir of 6 of 20 rows holds each of the two tasks' rows equally often."""
    counts = torch.zeros(2)
    for seed in range(400):
        buffer = ReservoirBuffer(6, seed=seed)
        for i, task in enumerate(mlp_world.tasks):
            buffer.extend(task.train)
            assert len(buffer) == 6, i
        for row in buffer:
            counts["ab".index(row.task)] += 1
    # 2,400 draws, half of them expected for each: 5 standard deviations are about 104 here.
    assert abs(float(counts[0]) - 1200) < 104


def test_a_memory_that_holds_no_row_is_refused_before_training(mlp_world: Any) -> None:
    """20 bytes of x, 8 of y, the key and empty fields are more than 10."""
    learner = mlp_world.learner(Replay(capacity="10B"))
    with pytest.raises(
        StrategyError, match=r"replay: a memory of 10B holds no row of task 'a', .* takes \d+ bytes"
    ):
        learner.begin_task(mlp_world.tasks[0], 0)
