"""Replay's gradients, combined and separate, against gradients taken by hand of the rows that a step had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from perdure.errors import ConfigError, StrategyError
from perdure.strategies import EWC, Chain, Naive, Replay, Strategy
from perdure.strategies.build import build
from perdure.training.learner import Learner
from perdure.types import Example, Task

from .conftest import WORLDS, World
from .test_laws import everything, killed_and_resumed

RATE = 0.05
SGD = {"optimizer": {"type": "sgd", "lr": RATE, "momentum": 0.0, "weight_decay": 0.0}}


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def rows(task: str, count: int, seed: int) -> tuple[Example, ...]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(
        Example(
            f"{task}-{i}", task, x=torch.randn(3, generator=rng).double(), y=torch.rand((), generator=rng).double()
        )
        for i in range(count)
    )


SMALL = World("small", "regression", network, (Task("a", rows("a", 10, 1)), Task("b", rows("b", 10, 2))))


def began(strategy: Strategy, **changes: Any) -> Learner:
    """A learner that has trained on the first task and begun the second."""
    learner = SMALL.run(SMALL.learner(strategy, **{**SGD, **changes}), upto=1)
    learner.begin_task(SMALL.tasks[1], 1)
    return learner


def step(learner: Learner, count: int, start: int = 0) -> tuple[list[Tensor], Sequence[Example], list[Tensor]]:
    """The gradient of a step, from what it changed; its rows; and the weights it began with."""
    before = [p.detach().clone() for p in learner.model.parameters()]
    result = learner.step(SMALL.tasks[1].train[start : start + count])
    change = [(old - new.detach()) / RATE for old, new in zip(before, learner.model.parameters(), strict=True)]
    return change, result.examples, before


def gradient(weights: list[Tensor], chosen: Sequence[Example]) -> list[Tensor]:
    """Of the mean of ½(p − y)² over these rows, one after the other."""
    model = network()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(value)
    for row in chosen:
        assert row.x is not None
        (0.5 * (model(row.x)[0] - row.y) ** 2 / len(chosen)).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def parted(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    new = [row for row in examples if row.source == "task"]
    return new, [row for row in examples if row.source == "replay"]


def separate(weights: list[Tensor], examples: Sequence[Example]) -> list[Tensor]:
    new, kept = (gradient(weights, part) for part in parted(examples))
    return [(one + two) / 2 for one, two in zip(new, kept, strict=True)]


def combined(weights: list[Tensor], examples: Sequence[Example]) -> list[Tensor]:
    return gradient(weights, examples)


def close(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("micro", [None, 2, 3])
def test_each_is_what_it_says_where_the_counts_differ(micro: int | None) -> None:
    """Four new rows and two replayed ones; the other formula is the mutant, a sixth of the way apart."""
    for gradients, own, other in (("separate", separate, combined), ("combined", combined, separate)):
        learner = began(Replay(capacity=5, ratio=0.5, gradients=gradients), micro_batch_size=micro)  # type: ignore[arg-type]
        found, examples, weights = step(learner, 4)
        assert [len(part) for part in parted(examples)] == [4, 2]
        assert close(found, own(weights, examples)), gradients
        assert not close(found, other(weights, examples)), gradients


def test_equal_counts_make_them_equal() -> None:
    ends = []
    for gradients in ("separate", "combined"):
        learner = began(Replay(capacity=8, ratio=1.0, gradients=gradients))  # type: ignore[arg-type]
        found, examples, weights = step(learner, 4)
        assert [len(part) for part in parted(examples)] == [4, 4]
        assert close(found, separate(weights, examples))
        assert close(found, combined(weights, examples))
        ends.append(found)
    assert close(*ends)


class AlwaysHalf(Replay):
    """Wrong: new rows weigh a half where none was replayed."""

    name: ClassVar[str] = "replay"

    def mix(self, ctx: Any, examples: list[Example]) -> list[Example]:
        found = super().mix(ctx, examples)
        self.weights = {"task": 0.5, "replay": 0.5}
        return found


def check_without_replayed_rows(make: Callable[..., Replay]) -> None:
    """At a ratio of 0.2 two new rows replay none, and two more and one replay one."""
    learner = began(make(capacity=5, ratio=0.2, gradients="separate"))
    found, examples, weights = step(learner, 2)
    assert [len(part) for part in parted(examples)] == [2, 0]
    assert close(found, gradient(weights, examples))
    found, examples, weights = step(learner, 3, start=2)
    assert [len(part) for part in parted(examples)] == [3, 1]
    assert close(found, separate(weights, examples))
    found, examples, weights = step(learner, 2, start=5)
    assert close(found, gradient(weights, examples))


def test_a_step_without_replayed_rows_is_whole() -> None:
    check_without_replayed_rows(Replay)
    with pytest.raises(AssertionError):
        check_without_replayed_rows(AlwaysHalf)


def test_the_first_task_is_plain_training() -> None:
    """To the bit."""
    plain, own = (SMALL.run(SMALL.learner(s), upto=1) for s in (Naive(), Replay(capacity=5, gradients="separate")))
    for one, two in zip(plain.model.parameters(), own.model.parameters(), strict=True):
        assert torch.equal(one, two)


class Stale(Chain):
    """Wrong: asks its members for weights once, before any row was mixed in."""

    def mix(self, ctx: Any, examples: list[Example]) -> list[Example]:
        before = self.weights
        found = super().mix(ctx, examples)
        self.weights = before
        return found


def check_chain(make: Callable[..., Chain], first: bool) -> None:
    """Where the second task begins, EWC pulls nowhere: the step's gradient is replay's alone."""
    members: list[Strategy] = [Replay(capacity=5, ratio=0.5, gradients="separate"), EWC(strength=3.0)]
    learner = began(make(members if first else members[::-1]))
    found, examples, weights = step(learner, 4)
    assert [len(part) for part in parted(examples)] == [4, 2]
    assert close(found, separate(weights, examples))
    found, examples, weights = step(learner, 1, start=4)
    assert not close(found, gradient(weights, parted(examples)[0]))  # now EWC does


@pytest.mark.parametrize("first", [True, False])
def test_in_a_chain_too(first: bool) -> None:
    check_chain(Chain, first)
    with pytest.raises(AssertionError):
        check_chain(Stale, first)


def test_a_chain_that_replays_nothing_is_whole() -> None:
    learner = began(Chain([Replay(capacity=5, ratio=0.2, gradients="separate"), EWC(strength=0.0)]))
    for start, count, replayed in ((0, 2, 0), (2, 3, 1), (5, 2, 0)):
        found, examples, weights = step(learner, count, start)
        assert len(parted(examples)[1]) == replayed
        assert close(found, (separate if replayed else gradient)(weights, examples))


@pytest.mark.parametrize("where", ["mlp", "regression"])
def test_killed_and_resumed_in_a_chain_ends_the_same(where: str, tmp_path: Path) -> None:
    def make() -> Chain:
        return Chain([Replay(capacity=6, ratio=0.6, gradients="separate"), EWC(strength=5.0)])

    there = WORLDS[where]
    torch.manual_seed(5)
    whole = there.run(there.learner(make()))
    resumed = killed_and_resumed(there, make, there.steps + 1, tmp_path / "saved")
    assert everything(there, resumed) == everything(there, whole)


def test_settings_and_mistakes() -> None:
    assert build("replay", {"replay": {"gradients": "separate"}}).gradients == "separate"  # type: ignore[attr-defined]
    assert Replay().gradients == "combined"
    with pytest.raises(StrategyError, match=r"gradients 'seperate'.*Did you mean 'separate'"):
        Replay(gradients="seperate")  # type: ignore[arg-type]
    with pytest.raises((ConfigError, StrategyError), match="combined"):
        build("replay", {"replay": {"gradients": "both"}})
