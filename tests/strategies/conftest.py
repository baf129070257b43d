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
from perdure.memory import BalancedBuffer
from perdure.strategies import (
    AGEM,
    EMA,
    EWC,
    GEM,
    MAS,
    OSF,
    PNN,
    SI,
    SLAO,
    TIES,
    Chain,
    DERpp,
    FreezeBottom,
    LwF,
    MagMax,
    MultiLoRA,
    Naive,
    OLoRA,
    PackNet,
    PromptPool,
    Replay,
    Strategy,
)
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
    "mas": lambda: MAS(strength=0.5, samples=5),
    "replay-tokens": lambda: Replay(capacity="900B", ratio=0.7, unit="tokens"),
    "replay-balanced": lambda: Replay(BalancedBuffer(5, seed=3)),
    "replay-ring": lambda: Replay(capacity=5, memory="ring"),
    "replay-separate": lambda: Replay(capacity=6, ratio=0.6, gradients="separate"),
    "replay-once": lambda: Replay(capacity=6, ratio="once", select="loss_descending"),
    "replay-surprise": lambda: Replay(capacity=8, ratio=0.6, select="surprise", resample=0.5),
    "replay-step": lambda: Replay(capacity=6, ratio=0.6, offer="step"),
    "replay-step-ring": lambda: Replay(
        capacity=6, ratio=0.6, memory="ring", select="surprise", resample=0.5, offer="step"
    ),
    "derpp-step": lambda: DERpp(alpha=0.3, beta=0.7, capacity=6, ratio=0.6, top_k=5, offer="step"),
    "derpp": lambda: DERpp(alpha=0.3, beta=0.7, capacity=6, ratio=0.6, top_k=5),
    "derpp-select": lambda: DERpp(alpha=0.3, beta=0.7, capacity=6, ratio=0.6, top_k=5, select="boundary"),
    "ewc-weight": lambda: EWC(strength=5.0, space="weight"),
    "lwf": lambda: LwF(strength=2.0),
    "gem": lambda: GEM(per_task=5, margin=0.1),
    "agem": lambda: AGEM(per_task=5, sample=3),
    "freeze-bottom": FreezeBottom,
    "packnet": PackNet,
    "packnet-gradient": lambda: PackNet(0.4, use_magnitude_pruning=False, retrain_epochs=2),
    "packnet-start": lambda: PackNet(prune_to="start", infer="surest"),
    "pnn": lambda: PNN(rank=2),
    "prompt-pool": lambda: PromptPool(size=5, length=2),
    "prompt-pool-deep": lambda: PromptPool(
        size=5, length=2, top=3, deep=True, diversity="frequency", keys="uniform"
    ),
    "multi-lora": MultiLoRA,
    "multi-lora-surest": lambda: MultiLoRA(infer="surest"),
    "olora": lambda: OLoRA(strength=0.1),
    "olora+replay": lambda: Chain([OLoRA(strength=0.1), Replay(capacity=6)]),
    "olora+ewc-weight": lambda: Chain([OLoRA(strength=0.1), EWC(strength=5.0, space="weight")]),
    "osf": lambda: OSF(effective_rank=0.4, growth=0.2),
    "osf-first": lambda: OSF(effective_rank=0.4, start=0, rest="trained"),
    "osf+replay": lambda: Chain([OSF(), Replay(capacity=6)]),
    "slao": SLAO,
    "magmax": lambda: MagMax(scale=0.8),
    "ties": lambda: TIES(density=0.3),
    "ties-last": lambda: TIES(density=0.3, scale=1.2, start="last"),
    "ema": EMA,
    "ema-step": lambda: EMA(decay=0.8, every="step", start="merged"),
    "replay+ewc": lambda: Chain([Replay(capacity=6), EWC(strength=5.0)]),
    "ewc+replay": lambda: Chain([EWC(strength=5.0, fisher="true"), Replay(capacity=6, ratio=0.5)]),
    "si+replay": lambda: Chain([SI(strength=5.0), Replay(capacity=6)]),
    "lwf+derpp": lambda: Chain([LwF(), DERpp(capacity=6)]),
    "packnet+ewc": lambda: Chain([PackNet(prune_percentage=0.6), EWC(strength=5.0)]),
    "mas+agem": lambda: Chain([MAS(strength=0.5), AGEM(per_task=5, sample=3)]),
    "freeze-bottom+lwf+ewc": lambda: Chain([FreezeBottom(), LwF(), EWC(strength=5.0)]),
    "ewc+ema": lambda: Chain([EWC(strength=5.0), EMA(decay=0.4)]),
    "replay+magmax": lambda: Chain([Replay(capacity=6), MagMax()]),
    "multi-lora+replay": lambda: Chain([MultiLoRA(), Replay(capacity=6, offer="step")]),
    "prompt-pool+replay": lambda: Chain([PromptPool(size=6, length=2), Replay(capacity=6)]),
}
# Worlds that a strategy refuses at construction, and what it says.
REFUSED = {
    **{
        ("ewc-weight", world): "the model has no LoRA adapter"
        for world in ("mlp", "regression", "llama", "llama-soft")
    },
    **{
        (name, world): "the model has no LoRA adapter"
        for name in ("olora", "olora+replay", "olora+ewc-weight", "slao")
        for world in ("mlp", "regression", "llama", "llama-soft")
    },
    **{
        (name, world): "use --tuning full"
        for name in ("osf", "osf-first", "osf+replay")
        for world in ("llama-lora", "llama-soft")
    },
    **{
        (name, world): "the model has no adapter"
        for name in ("multi-lora", "multi-lora-surest", "multi-lora+replay")
        for world in ("mlp", "regression", "llama")
    },
    ("pnn", "llama"): "a column of a language model is an adapter",
    **{
        (name, world): what
        for name in ("prompt-pool", "prompt-pool-deep", "prompt-pool+replay")
        for world, what in (
            ("mlp", "needs a causal language model"),
            ("regression", "needs a causal language model"),
            ("llama-lora", "use full tuning"),
            ("llama-soft", "use full tuning"),
        )
    },
    **{
        (name, "llama-soft"): "nothing to prune"
        for name in ("packnet", "packnet-gradient", "packnet-start", "packnet+ewc")
    },
    **{(name, "llama-soft"): "would be left to train" for name in ("freeze-bottom", "freeze-bottom+lwf+ewc")},
}
# Strategies that are not plain training on the first task (law 1), and why.
EXEMPT: dict[str, str] = {
    "osf-first": "preserves directions of the weights that it was given",
    **dict.fromkeys(
        ("replay-step", "replay-step-ring", "derpp-step", "multi-lora+replay"),
        "replays rows of the first task within it",
    ),
    **dict.fromkeys(
        ("packnet", "packnet-gradient", "packnet-start", "packnet+ewc"), "prunes and retrains in the first task too"
    ),
    **dict.fromkeys(
        ("prompt-pool", "prompt-pool-deep", "prompt-pool+replay"),
        "trains prompts before a frozen model from the first task on",
    ),
}
BATCH, EPOCHS = 4, 2


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

    @property
    def steps(self) -> int:
        """Steps of a task, where a strategy adds none."""
        return len(self.source(0)) * EPOCHS

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


Draw = Callable[[torch.Generator], tuple[Any, Any]]


def _rows(task: str, count: int, draw: Draw, seed: int) -> tuple[Example, ...]:
    rng = torch.Generator().manual_seed(seed)
    pairs = [draw(rng) for _ in range(count)]
    return tuple(Example(f"{task}-{i}", task, x=x, y=y) for i, (x, y) in enumerate(pairs))


def _tasks(count: int, draw: Draw) -> tuple[Task, ...]:
    """Two tasks of `count` rows, which are no multiple of the batch."""
    return tuple(
        Task(name, _rows(name, count, draw, seed), _rows(name, count, draw, seed + 9))
        for seed, name in enumerate("ab")
    )


def _ragged(rng: torch.Generator) -> tuple[Any, Any]:
    length = int(torch.randint(4, 12, (1,), generator=rng))
    ids = torch.randint(1, 40, (length,), generator=rng)
    labels = ids.clone()
    labels[: int(torch.randint(1, length - 1, (1,), generator=rng))] = -100
    return ids, labels


@cache
def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LlamaForCausalLM(config)


@cache
def _tuned(tuning: Any, **settings: Any) -> Any:
    from perdure.models.adapters import tune

    with torch.random.fork_rng():  # made once: the first to ask must not find other draws than the rest
        torch.manual_seed(2)
        return tune(copy.deepcopy(_llama()), tuning, **settings)


def _mlp() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))


def _tokens(rng: torch.Generator) -> tuple[Any, Any]:
    """A row of a regression head: 3 to 9 tokens, so that most batches hold padding, and a number."""
    length = int(torch.randint(3, 10, (1,), generator=rng))
    return torch.randint(1, 40, (length,), generator=rng), torch.rand((), generator=rng)


@cache
def _regressor() -> Any:
    """The head of `perdure reactions` on the kept hidden states of a random BERT."""
    from transformers import BertConfig, BertModel

    from perdure.models.heads import MHAR
    from perdure.models.hidden import HiddenStates
    from perdure.models.regressor import Regressor

    config = BertConfig(
        vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(4)
        head = MHAR(8, heads=2, hidden=12, dropout=0.2)
        return Regressor(BertModel(config, add_pooling_layer=False), head, HiddenStates({}))


WORLDS = {
    world.name: world
    for world in (
        World(
            "mlp", "classification", _mlp,
            _tasks(10, lambda rng: (torch.randn(5, generator=rng), torch.randint(0, 3, (), generator=rng))),
        ),
        World("regression", "regression", lambda: copy.deepcopy(_regressor()), _tasks(7, _tokens)),
        World("llama", "causal_lm", lambda: copy.deepcopy(_llama()), _tasks(7, _ragged)),
        World(
            "llama-lora", "causal_lm",
            lambda: copy.deepcopy(_tuned("lora", r=2, alpha=4, dropout=0.2)), _tasks(7, _ragged),
        ),
        World(
            "llama-soft", "causal_lm", lambda: copy.deepcopy(_tuned("soft-prompt", tokens=3)), _tasks(7, _ragged)
        ),
    )
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `world`, or `make_strategy`, or both, runs in all of them that go together."""
    names = {"make_strategy", "world"} & set(metafunc.fixturenames)
    if len(names) == 2:
        pairs = [(s, w) for s in STRATEGIES for w in WORLDS if (s, w) not in REFUSED]
        values = [(STRATEGIES[s], WORLDS[w]) for s, w in pairs]
        metafunc.parametrize(("make_strategy", "world"), values, ids=[f"{s}-{w}" for s, w in pairs])
    elif names:
        (name,) = names
        table: dict[str, Any] = STRATEGIES if name == "make_strategy" else WORLDS
        metafunc.parametrize(name, list(table.values()), ids=list(table))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Double precision, for comparison with closed forms."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def mlp_world() -> World:
    return WORLDS["mlp"]


@pytest.fixture
def llama_world() -> World:
    return WORLDS["llama"]
