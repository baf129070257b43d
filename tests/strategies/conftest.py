"""Small worlds that every strategy must live in, and the strategies of the law table."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from perdure.config import TrainingSettings, validate
from perdure.strategies import EWC, MAS, SI, Chain, Naive, Replay, Strategy
from perdure.training.learner import Learner, StepResult
from perdure.training.loop import KeyedSource, Position, fit
from perdure.types import Example, Task

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "naive": Naive,
    "replay": lambda: Replay(capacity=6, ratio=0.6),
    "ewc": lambda: EWC(strength=5.0),
    "ewc-online": lambda: EWC(strength=5.0, decay=0.5, samples=5),
    "ewc-true": lambda: EWC(strength=5.0, fisher="true"),
    "si": lambda: SI(strength=5.0, damping=0.01),
    "mas": lambda: MAS(strength=0.5, samples=7),
    "replay+ewc": lambda: Chain([Replay(capacity=6), EWC(strength=5.0)]),
    "replay+si": lambda: Chain([Replay(capacity=6), SI(strength=5.0)]),
    "mas+si": lambda: Chain([MAS(strength=0.5), SI(strength=5.0)]),
    "ewc+replay": lambda: Chain([EWC(strength=5.0, fisher="true"), Replay(capacity=6, ratio=0.5)]),
}
ROWS, BATCH, EPOCHS = 10, 4, 2


@dataclass(frozen=True)
class World:
    """A model, a stream of two tasks, and what the model is trained for."""

    name: str
    objective: str
    make_model: Callable[[], nn.Module]
    tasks: tuple[Task, ...]

    def learner(self, strategy: Strategy, **changes: Any) -> Learner:
        settings = {"optimizer": {"type": "adamw", "lr": 1e-2, "weight_decay": 0.1}, "batch_size": BATCH, **changes}
        return Learner(self.make_model(), strategy, self.objective, validate(TrainingSettings, settings, "test"), 0)

    def source(self, index: int) -> KeyedSource:
        task = self.tasks[index]
        return KeyedSource(task.train, BATCH, 0, task.name)

    def train(self, learner: Learner, upto: int | None = None) -> Iterator[tuple[int, Position, StepResult]]:
        """All tasks from the start; yields (task, position, result) after every step."""
        for index, task in enumerate(self.tasks[:upto]):
            learner.begin_task(task, index)
            for position, result in fit(learner, self.source(index), learner.phases(task, EPOCHS)):
                yield index, position, result
            learner.end_task()

    def run(self, learner: Learner, upto: int | None = None) -> Learner:
        for _ in self.train(learner, upto):
            pass
        return learner


def _rows(task: str, make: Callable[[torch.Generator], tuple[Any, Any]], seed: int) -> tuple[Example, ...]:
    rng = torch.Generator().manual_seed(seed)
    pairs = [make(rng) for _ in range(ROWS)]
    return tuple(Example(f"{task}-{i}", task, x=x, y=y) for i, (x, y) in enumerate(pairs))


def _tasks(make: Callable[[torch.Generator], tuple[Any, Any]]) -> tuple[Task, ...]:
    return tuple(Task(name, _rows(name, make, seed), _rows(name, make, seed + 9)) for seed, name in enumerate("ab"))


def _ragged(rng: torch.Generator) -> tuple[Any, Any]:
    length = int(torch.randint(4, 12, (1,), generator=rng))
    ids = torch.randint(1, 40, (length,), generator=rng)
    labels = ids.clone()
    labels[: int(torch.randint(1, length - 1, (1,), generator=rng))] = -100
    return ids, labels


@cache
def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _lora() -> Any:
    from perdure.models.adapters import tune

    torch.manual_seed(2)
    return tune(copy.deepcopy(_llama()), "lora", r=2, alpha=4, dropout=0.2)


def _mlp(outputs: int) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, outputs))


WORLDS = {
    world.name: world
    for world in (
        World(
            "mlp", "classification", lambda: _mlp(3),
            _tasks(lambda rng: (torch.randn(5, generator=rng), torch.randint(0, 3, (), generator=rng))),
        ),
        World(
            "regression", "regression", lambda: _mlp(1),
            _tasks(lambda rng: (torch.randn(5, generator=rng), torch.rand((), generator=rng))),
        ),
        World("llama", "causal_lm", lambda: copy.deepcopy(_llama()), _tasks(_ragged)),
        World("llama-lora", "causal_lm", _lora, _tasks(_ragged)),
    )
}  # fmt: skip


@pytest.fixture(params=STRATEGIES)
def make_strategy(request: pytest.FixtureRequest) -> Callable[[], Strategy]:
    return STRATEGIES[request.param]


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> World:
    torch.manual_seed(0)
    return WORLDS[request.param]


@pytest.fixture
def mlp_world() -> World:
    torch.manual_seed(0)
    return WORLDS["mlp"]


@pytest.fixture
def llama_world() -> World:
    torch.manual_seed(0)
    return WORLDS["llama"]
