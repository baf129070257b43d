"""`needs_boundaries`: what a stream of rows without tasks leaves of a strategy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from perdure.strategies import (
    EMA,
    OSF,
    Chain,
    DERpp,
    FreezeBottom,
    Naive,
    PromptPool,
    Replay,
    Strategy,
    build,
)
from perdure.strategies.build import STRATEGIES as NAMES
from perdure.training.learner import Learner
from perdure.types import Example, Task

from .conftest import REFUSED, STRATEGIES, WORLDS
from .test_laws import digest

TABLE = {
    **STRATEGIES,
    "osf-given": lambda: OSF(start=0),
    "freeze-bottom-given": lambda: FreezeBottom(start=0),
    "prompt-pool-free": lambda: PromptPool(size=5, length=2, diversity="none"),
}
MORE_REFUSED = {("osf-given", "llama-lora"), ("prompt-pool-free", "mlp"), ("prompt-pool-free", "regression")}
# Strategies that need boundaries and yet are not plain training without: what they do does not protect.
EXEMPT = {
    "prompt-pool": "trains prompts before a frozen model, all rows the same ones",
    "prompt-pool+replay": "trains prompts before a frozen model, all rows the same ones",
    "prompt-pool-deep": "trains prompts before a frozen model, all rows the same ones",
}

# They take rows of two kinds through the model one after the other, with draws of dropout for each.
ONE_KIND = {name for name in TABLE if name.startswith("packnet")}


def steps(name: str) -> tuple[Any, list[list[Example]]]:
    """The first world that takes the strategy, and rows of two kinds in turn."""
    world = WORLDS[next(w for w in WORLDS if (name, w) not in REFUSED and (name, w) not in MORE_REFUSED)]
    rows = [[a, b] for a, b in zip(world.tasks[0].train, world.tasks[1].train, strict=True)][:6]
    if name in ONE_KIND:
        rows = [[row.but(task="stream") for row in step] for step in rows]
    return world, rows


def stream(name: str, make: Callable[[], Strategy]) -> Learner:
    """Train on the rows as one task, which is not ended."""
    world, rows = steps(name)
    torch.manual_seed(5)
    learner: Learner = world.learner(make())
    learner.begin_task(Task("stream", [row for step in rows for row in step]), 0)
    for step in rows:
        learner.step(step)
    return learner


def weights(learner: Learner) -> str:
    return digest({name: p.detach() for name, p in learner.model.named_parameters()})


def check(name: str, make: Callable[[], Strategy]) -> None:
    """With need of boundaries: plain training. Without: something else, and the end of the task adds nothing."""
    learner = stream(name, make)
    if learner.strategy.needs_boundaries:
        if name not in EXEMPT:
            assert weights(learner) == weights(stream(name, Naive))
        return
    if name != "naive":
        assert weights(learner) != weights(stream(name, Naive))
    before = copy.deepcopy(learner.strategy.state_dict())
    state = digest({"strategy": before, "weights": weights(learner)})
    learner.end_task()
    assert digest({"strategy": learner.strategy.state_dict(), "weights": weights(learner)}) == state


@pytest.mark.parametrize("name", TABLE)
def test_what_a_stream_without_tasks_leaves(name: str) -> None:
    check(name, TABLE[name])


def test_every_strategy_is_in_the_table() -> None:
    made = [make() for make in TABLE.values()]
    kinds = {type(member) for one in made for member in (one.strategies if isinstance(one, Chain) else (one,))}
    assert kinds >= set(NAMES.values())
    assert set(EXEMPT) <= set(TABLE)


def turned(make: Callable[[], Strategy]) -> Callable[[], Strategy]:
    """The mutant: a strategy that says the opposite."""

    def wrong() -> Strategy:
        strategy = make()
        cls = type(strategy)
        return_value = not strategy.needs_boundaries
        strategy.__class__ = type(cls.__name__, (cls,), {"needs_boundaries": return_value})
        return strategy

    return wrong


@pytest.mark.parametrize(
    "name",
    ["replay", "replay-step", "ewc", "si", "gem", "ema-step", "freeze-bottom", "packnet", "osf-given", "lwf"],
)
def test_the_opposite_is_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        check(name, turned(TABLE[name]))


def test_by_settings_and_in_chains() -> None:
    assert not Naive().needs_boundaries
    assert [Replay().needs_boundaries, Replay(offer="step").needs_boundaries] == [True, False]
    assert [DERpp().needs_boundaries, DERpp(offer="step").needs_boundaries] == [True, False]
    assert EMA(every="step").needs_boundaries  # its average begins when the first task ends
    assert [FreezeBottom(start=n).needs_boundaries for n in (0, 1)] == [False, True]
    assert [OSF(start=n).needs_boundaries for n in (0, 1)] == [False, True]
    assert Chain([Replay(offer="step"), build("ewc")]).needs_boundaries
    assert not Chain([Replay(offer="step"), Naive()]).needs_boundaries


def test_a_class_of_ones_own_needs_them_if_it_acts_at_the_end() -> None:
    class Own(Strategy):
        def after_task(self, ctx: Any) -> None:
            """Something."""

    class Other(Own):
        needs_boundaries = False

    assert Own().needs_boundaries
    assert not Other().needs_boundaries
