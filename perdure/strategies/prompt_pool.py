"""Learning to prompt: a pool of prompts before a frozen model, of which each row is given the nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from perdure.errors import StrategyError, unknown_name
from perdure.models import objectives
from perdure.models.adapters import LEAST_ROOM
from perdure.models.load import max_positions
from perdure.models.prompts import NAME, Keys, Prompts, deep_enough, draw, nearest, put_back, queries, save
from perdure.strategies.base import FREE, Strategy
from perdure.strategies.identity import prompt_ends
from perdure.strategies.settings import number, whole
from perdure.types import TASK, Batch, Context, Example, Objective, Output

Diversity = Literal["task", "frequency", "none"]
SETTINGS = ("size", "length", "top", "pull", "deep", "diversity", "keys")


class PromptPool(Strategy):
    """A frozen language model with `top` of `size` learnt prompts before each row, chosen by the row itself.

    A row's query is the mean of the frozen model's last hidden states over the row's prompt: the tokens before the
    first that is learnt. It is given the `top` prompts whose keys have the highest cosine with it, in the pool's
    order. The loss is that of the rows, and pull · Σ (1 − cos(key, query)) over a row's prompts, in which a row
    counts as often as in the loss: once a target.

    Args:
        size: prompts in the pool, M.
        length: virtual tokens of a prompt; those of `top` prompts take positions before every row.
        top: prompts given to a row, N.
        pull: weight of the pull of keys towards queries, at least 0.
        deep: a prompt is keys and values at every layer, in place of embeddings before the first.
        diversity: how tasks are kept from training the same prompts. "frequency" (the paper's): in training, a
            distance is multiplied by the share of the choices in earlier tasks that fell on the prompt. "task":
            each task trains `top` of its own, and once the pool is used up, as "frequency". "none". At inference
            the nearest are taken ("task": of those that were trained), whatever the row's task.
        keys: what keys start from: "vocabulary", queries of drawn tokens, or "uniform", drawn numbers.

    Attributes:
        tasks: names of the tasks begun.
        chosen: by task, how often each prompt was given to its rows in training.

    Source: Wang et al. 2022, "Learning to Prompt for Continual Learning" (arXiv:2112.08654); deep prompts: Li &
    Liang 2021 (arXiv:2101.00190), in a pool Wang et al. 2022, "DualPrompt" (arXiv:2204.04799).
    """

    name: ClassVar[str] = "prompt-pool"
    wants_outputs = False
    summary: ClassVar[str] = "a frozen model, and a pool of prompts of which each row is given the nearest"
    needs: ClassVar[str] = "a causal language model, tuned in full; no stored rows, no task ids"
    cost: ClassVar[str] = "one more forward pass, over a row's prompt; positions; generation without a cache"
    source: ClassVar[str] = "Wang et al. 2022 (arXiv:2112.08654)"
    owns_training = True

    def __init__(
        self,
        size: int = 20,
        length: int = 10,
        top: int = 2,
        pull: float = 0.5,
        deep: bool = False,
        diversity: Diversity = "task",
        keys: Keys = "vocabulary",
    ) -> None:
        self.size = whole("prompt-pool", "size", size, "prompts")
        self.length = whole("prompt-pool", "length", length, "virtual tokens")
        self.top = whole("prompt-pool", "top", top, "prompts")
        if top > size:
            raise StrategyError(f"prompt-pool: top must be at most size, got {top} of {size}")
        self.pull = number("prompt-pool", "pull", pull)
        self.deep = deep
        for setting, value, known in (("diversity", diversity, Diversity), ("keys", keys, Keys)):
            if value not in get_args(known):
                raise StrategyError(f"prompt-pool: {unknown_name(setting, value, get_args(known))}")
        self.diversity = diversity
        self.keys = keys
        self.virtual_tokens = top * length
        self.tasks: list[str] = []
        self.chosen: dict[str, list[int]] = {}
        self._step: dict[int, tuple[Batch, Tensor, Tensor]] = {}  # of a step's batches: queries, prompts chosen

    @property
    def needs_boundaries(self) -> bool:
        """Only to keep tasks from training the same prompts."""
        return self.diversity != "none"

    def check(self, model: nn.Module, objective: Objective) -> None:
        """A causal language model without adapters, with room for the prompts."""
        lm: Any = model
        if objective != "causal_lm" or getattr(lm, "base_model", lm) is lm:
            raise StrategyError(
                "prompt-pool: it needs a causal language model, for a prompt to stand before its text"
            )
        if hasattr(lm, "peft_config"):
            raise StrategyError(
                "prompt-pool: all but the pool is frozen, so that LoRA or a soft prompt would do nothing; use full "
                "tuning"
            )
        room = max_positions(lm) - LEAST_ROOM
        if self.virtual_tokens > room:
            raise StrategyError(
                f"prompt-pool: top · length is {self.virtual_tokens} virtual tokens, and this model has room for "
                f"{room} beside {LEAST_ROOM} of text; give less"
            )
        if self.deep and not deep_enough(lm):
            raise StrategyError(
                "prompt-pool: deep prompts need a model all of whose layers attend to all tokens; leave deep out"
            )

    def prepare(self, ctx: Context) -> None:
        """Before the first task freeze the base and draw the pool."""
        model: Any = ctx.model
        if self.deep and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise StrategyError("prompt-pool: gradient checkpointing drops deep prompts; leave one of the two out")
        if not hasattr(model, NAME):
            model.requires_grad_(False)
            model.add_module(NAME, draw(model, self.size, self.length, self.deep, self.keys, ctx.rng))
        self.tasks[ctx.index :] = [ctx.task.name]  # a task that failed is begun again, perhaps by another name
        self.chosen = {task: counts for task, counts in self.chosen.items() if task in self.tasks}

    def mix(self, ctx: Context, examples: list[Example]) -> list[Example]:
        """The rows as they are; a step begins."""
        self._step = {}
        return examples

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        """The logits of each row behind its prompts; before the first task, the plain model's."""
        pool: Prompts | None = getattr(model, NAME, None)
        if pool is None:
            return objectives.forward(model, batch)
        asked = self.query(model, batch)
        chosen = self.choose(pool.distances(asked), batch, model.training)
        if model.training:
            self._step[id(batch)] = (batch, asked, chosen)
        return Output(pool.logits(model, batch.x, chosen))  # type: ignore[arg-type]

    def query(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the rows' prompts are chosen by: [B, Q], the same whatever follows the prompt of a row."""
        return queries(model, batch.x, prompt_ends(batch))  # type: ignore[arg-type]

    def choose(self, distances: Tensor, batch: Batch, training: bool) -> Tensor:
        """The prompts of each row, in the pool's order: int64 [B, N].

        Args:
            distances: of queries and keys, [B, M].
            batch: the rows; their tasks are looked at in training only.
            training: whether tasks are to be kept apart.
        """
        device = distances.device
        if self.diversity == "task":
            distances = distances[:, : len(self.tasks) * self.top]
        earlier = [counts for task, counts in self.chosen.items() if task != self.tasks[-1]]
        apart = training and self.diversity != "none" and bool(earlier)
        chosen = nearest(distances, self.top, torch.tensor(earlier, device=device).sum(0) if apart else None)
        if training and self.diversity == "task":
            places = [
                self.tasks.index(row.task if row.task in self.tasks else self.tasks[-1]) for row in batch.examples
            ]
            first = torch.tensor(places, device=device)[:, None] * self.top
            own = first + torch.arange(self.top, device=device)
            chosen = torch.where(first + self.top <= self.size, own, chosen)
        return chosen

    def penalty(self, ctx: Context, batch: Batch, output: Output) -> Tensor | float:
        """The pull on the keys of each row's prompts, once for each of the row's targets."""
        if self.pull == 0:
            return 0.0
        _, asked, chosen = self._step[id(batch)]
        pool: Any = getattr(ctx.model, NAME)
        return self.pull * (pool.pull(asked, chosen) * torch.tensor(batch.counts, device=asked.device)).sum()

    def after_step(self, ctx: Context, batches: Sequence[Batch], outputs: Sequence[Output]) -> None:
        """Count which prompts the task's own rows were given."""
        for batch in batches:
            for row, given in zip(batch.examples, self._step[id(batch)][2].tolist(), strict=True):
                counts = self.chosen.setdefault(ctx.task.name, [0] * self.size)
                for i in given if row.source == TASK else ():
                    counts[i] += 1
        self._step = {}

    def serving(self, model: nn.Module, task: str) -> AbstractContextManager[Any] | None:
        """None, since rows differ in their prompts; before the first task, the plain model."""
        return None if hasattr(model, NAME) else nullcontext()

    def usage(self, model: nn.Module) -> dict[str, dict[str, int]]:
        """The weights of each prompt and its key, by the task that trains them; empty where tasks share prompts."""
        pool: Any = getattr(model, NAME, None)
        if self.diversity != "task" or pool is None or len(self.tasks) * self.top > self.size:
            return {}
        owners = [task for task in self.tasks for _ in range(self.top)] + [FREE] * self.size
        sizes = [key.numel() + prompt.numel() for key, prompt in zip(pool.keys, pool.prompts, strict=True)]
        return {f"prompt {i}": {owners[i]: size} for i, size in enumerate(sizes)}

    def export(self, model: Any, folder: Path) -> None:
        """The base as it was, and beside it the pool: prompt_pool.safetensors, and prompt_pool.json."""
        save(model, folder, {"settings": {key: getattr(self, key) for key in SETTINGS}, **self.state_dict()})

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> PromptPool:
        """Put an exported pool into the base that was exported with it; `forward` then answers as it did."""
        facts = put_back(model, Path(folder))
        strategy = cls(**facts["settings"])
        strategy.load_state_dict(facts)
        return strategy

    def state_dict(self) -> dict[str, Any]:
        """The tasks, and what their rows were given; the pool's weights are the model's."""
        return {"tasks": list(self.tasks), "chosen": {task: list(counts) for task, counts in self.chosen.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore both."""
        self.tasks = list(state["tasks"])
        self.chosen = {task: list(counts) for task, counts in state["chosen"].items()}
