"""Rows offered to the memory after each step: which are held, which are replayed, in a stream without tasks."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from perdure.errors import ConfigError, StrategyError
from perdure.memory import ReservoirBuffer, RingBuffer
from perdure.order import priority
from perdure.strategies import DERpp, Replay
from perdure.strategies.rehearsal import Rehearsal
from perdure.strategies.swap import forward_with
from perdure.training.learner import Learner, StepResult
from perdure.types import Context, Example, Task

CAPACITY = 5


def begun(world: Any, strategy: Rehearsal, **settings: Any) -> tuple[Learner, list[list[Example]]]:
    """A learner in one block of both tasks' rows, and the rows in turn, two kinds and two rows a step."""
    rows = [[a, b] for a, b in zip(world.tasks[0].train, world.tasks[1].train, strict=True)]
    learner = world.learner(strategy, **settings)
    learner.begin_task(Task("stream", [row for step in rows for row in step]), 0)
    return learner, rows


def smallest(rows: Sequence[Example], seed: int = 0) -> set[str]:
    """By brute force: the keys of the rows with the smallest keyed priorities."""
    ranked = sorted(rows, key=lambda row: priority(seed, "reservoir", key=f"{row.task}\0{row.key}"))
    return {row.key for row in ranked[:CAPACITY]}


def check_memory(world: Any, make: Callable[..., Replay], **settings: Any) -> None:
    """After each step the memory is that of the rows so far; what is replayed came before the step, and is held."""
    strategy = make(capacity=CAPACITY, offer="step")
    learner, rows = begun(world, strategy, **settings)
    offered: list[Example] = []
    for step in rows:
        held = {row.key for row in strategy.buffer or ()}
        result = learner.step(step)
        replayed = [row.key for row in result.examples if row.source == "replay"]
        assert set(replayed) <= held
        assert len(replayed) == (len(step) if offered else 0)
        offered += step
        assert {row.key for row in strategy.buffer or ()} == smallest(offered)
        assert all(row.source == "task" for row in strategy.buffer or ())
        assert strategy.buffer is not None
        assert strategy.buffer.seen == len(offered)
    before = strategy.buffer.state_dict()
    learner.end_task()
    assert strategy.buffer.seen == before["offers"]


@pytest.mark.parametrize("micro", [None, 1])
def test_the_memory_is_that_of_the_rows_so_far(mlp_world: Any, micro: int | None) -> None:
    check_memory(mlp_world, Replay, micro_batch_size=micro)


class OfferedBefore(Replay):
    """Wrong: a step's rows are offered before they are drawn from, so that a row replays itself."""

    def mix(self, ctx: Context, examples: list[Example]) -> list[Example]:
        self._offer(ctx, examples)
        return super().mix(ctx, examples)

    def after_step(self, ctx: Context, batches: Any, outputs: Any) -> None:
        """Nothing is left to offer."""


class OfferedAgain(Replay):
    """Wrong: replayed rows are offered with the new ones."""

    def after_step(self, ctx: Context, batches: Any, outputs: Any) -> None:
        self._offer(ctx, [row for batch in batches for row in batch.examples])


class AtTheEndToo(Replay):
    """Wrong: all rows are offered once more when the task ends."""

    def after_task(self, ctx: Context) -> None:
        self._offer(ctx, ctx.task.train)


@pytest.mark.parametrize("mutant", [OfferedBefore, OfferedAgain, AtTheEndToo])
def test_other_offers_are_caught(mlp_world: Any, mutant: type[Replay]) -> None:
    with pytest.raises(AssertionError):
        check_memory(mlp_world, mutant)


def check_skipped(world: Any, make: Callable[..., Replay]) -> None:
    """The rows of a step whose update was left out are not offered."""
    strategy = make(capacity=CAPACITY, offer="step")
    learner, rows = begun(world, strategy, skip_bad_batches=True)
    learner.step(rows[0])
    bad = [row.but(key=f"bad{i}", x=row.x * math.nan) for i, row in enumerate(rows[1])]
    assert learner.step(bad).skipped
    learner.step(rows[2])
    assert {row.key for row in strategy.buffer or ()} == smallest([*rows[0], *rows[2]])


def test_rows_of_a_skipped_step_are_not_offered(mlp_world: Any) -> None:
    check_skipped(mlp_world, Replay)


class OfferedNextTime(Replay):
    """Wrong: a step's rows are offered when the next begins, whatever has become of it."""

    def mix(self, ctx: Context, examples: list[Example]) -> list[Example]:
        self._offer(ctx, self._new)
        return super().mix(ctx, examples)


def test_offers_of_skipped_rows_are_caught(mlp_world: Any) -> None:
    with pytest.raises(AssertionError):
        check_skipped(mlp_world, OfferedNextTime)


@pytest.mark.parametrize("ratio", [0.29, 1.0, 2.5])
def test_the_ratio_is_exact_at_every_step(mlp_world: Any, ratio: float) -> None:
    """After n new rows ⌊ratio·n⌋ were replayed, with n counted from the second step on."""
    learner, rows = begun(mlp_world, Replay(capacity=CAPACITY, ratio=ratio, offer="step"))
    assert learner.step(rows[0]).replayed_rows == 0
    replayed = 0
    for number, step in enumerate(rows[1:], start=1):
        replayed += learner.step(step).replayed_rows
        assert replayed == 2 * number * round(100 * ratio) // 100


def test_the_ratio_in_tokens_is_exact_to_within_a_row(llama_world: Any) -> None:
    learner, rows = begun(llama_world, Replay(capacity=CAPACITY, ratio=0.7, unit="tokens", offer="step"))
    learner.step(rows[0])
    new = replayed = 0
    for step in rows[1:]:
        result = learner.step(step)
        new += result.targets - result.replayed_targets
        replayed += result.replayed_targets
        last = [int((row.y[1:] != -100).sum()) for row in result.examples if row.source == "replay"]
        assert replayed >= 0.7 * new - 1e-9
        assert not last or replayed - last[-1] < 0.7 * new


def test_a_ring_goes_by_the_order_of_the_rows_not_of_the_micro_batches(llama_world: Any) -> None:
    """Micro-batches are sorted by length; the newest rows of a step are its last ones."""
    held = []
    for micro in (None, 1):
        strategy = Replay(RingBuffer(3, by=None), offer="step")
        learner, rows = begun(llama_world, strategy, micro_batch_size=micro)
        learner.step([row for step in rows[:4] for row in step])
        held.append([row.key for row in strategy.buffer or ()])
    assert held == [["b-2", "a-3", "b-3"]] * 2


def test_a_row_that_comes_again_stays_one(mlp_world: Any) -> None:
    strategy = Replay(capacity=50, offer="step")
    learner, rows = begun(mlp_world, strategy)
    for _ in range(3):
        for step in rows:
            learner.step(step)
    counts = Counter(row.key for row in strategy.buffer or ())
    assert set(counts.values()) == {1}
    assert len(counts) == 20


def test_an_erased_row_does_not_come_back_by_the_room_it_made(mlp_world: Any) -> None:
    """As with any reservoir: what had to leave by its priority stays out."""
    strategy = Replay(capacity=CAPACITY, offer="step")
    learner, rows = begun(mlp_world, strategy)
    for step in rows:
        learner.step(step)
    assert strategy.buffer is not None
    gone = next(iter(strategy.buffer)).key
    strategy.buffer.erase([gone])
    left = {row.key for row in strategy.buffer}
    for step in rows[:5]:
        learner.step([row for row in step if row.key != gone])
    assert {row.key for row in strategy.buffer} == left
    assert len(left) == CAPACITY - 1


def step_all(learner: Learner, rows: Sequence[Sequence[Example]]) -> list[StepResult]:
    return [learner.step(step) for step in rows]


@pytest.mark.parametrize("memory", ["reservoir", "ring"])
def test_a_selection_leaves_out_what_had_to_leave_the_memory(mlp_world: Any, memory: Any) -> None:
    """Only rows that are held are replayed; and after a resume the same ones."""

    def make() -> Replay:
        return Replay(capacity=4, memory=memory, select="loss_descending", resample=0.5, offer="step")

    torch.manual_seed(1)
    learner, rows = begun(mlp_world, make())
    step_all(learner, rows[:3])
    saved = copy.deepcopy(learner.state_dict())
    other, _ = begun(mlp_world, make())
    other.load_state_dict(saved)
    ends = []
    for each in (other, learner):
        torch.set_rng_state(saved["rng"]["torch"])
        keys = []
        for step in rows[3:]:
            held = {row.key for row in each.strategy.buffer or ()}  # type: ignore[attr-defined]
            result = each.step(step)
            drawn = [row.key for row in result.examples if row.source == "replay"]
            assert set(drawn) <= held
            keys.append(drawn)
        ends.append((keys, [p.detach().clone() for p in each.model.parameters()]))
    assert ends[0][0] == ends[1][0]
    assert any(keys for keys in ends[0][0])
    assert all(map(torch.equal, ends[0][1], ends[1][1]))


def test_derpp_keeps_the_logits_right_after_the_step(mlp_world: Any) -> None:
    strategy = DERpp(capacity=50, offer="step", top_k=3)
    learner, rows = begun(mlp_world, strategy)
    learner.step(rows[0])
    assert learner.ctx is not None
    wanted = forward_with(learner.ctx, {}, learner.collate(rows[0])).logits
    learner.step(rows[1])
    kept = {row.key: row.extras for row in strategy.buffer or ()}
    for row, logits in zip(rows[0], wanted, strict=True):
        own = kept[row.key]
        assert torch.equal(logits[own["places"].long()[0]], own["logits"][0])


def test_outputs_are_not_held_for_it(mlp_world: Any) -> None:
    assert not Replay(offer="step").wants_outputs
    assert not DERpp(offer="step").wants_outputs


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"offer": "epoch"}, "unknown offer 'epoch'"),
        ({"ratio": "once"}, 'ratio "once" .* changes at every step; give ratio a number'),
        ({"select": "loss_descending"}, "select without resample .* give resample"),
    ],
)
def test_what_cannot_be_offered_by_step_is_refused(settings: dict[str, Any], said: str) -> None:
    for cls in (Replay, DERpp):
        with pytest.raises((StrategyError, ConfigError), match=f"{cls.name}: .*{said}"):
            cls(**{"offer": "step", **settings})
    Replay(offer="step", select="loss_descending", resample=0.5)


def test_a_model_without_tasks_is_replayed(mlp_world: Any) -> None:
    """A control: with offer "task" the same stream is plain training."""
    ends = []
    for strategy in (Replay(ReservoirBuffer(5)), Replay(ReservoirBuffer(5), offer="step")):
        torch.manual_seed(0)
        learner, rows = begun(mlp_world, strategy)
        ends.append(sum(result.replayed_rows for result in step_all(learner, rows)))
    assert ends == [0, 18]
