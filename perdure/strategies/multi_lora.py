"""One adapter for each kind of rows, and rows sent to the adapter of their kind."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from perdure.errors import StrategyError
from perdure.strategies.base import Strategy
from perdure.strategies.columns import Columns
from perdure.strategies.identity import Rule, by_task, check_rule, forward_by_task, rows_of, surest
from perdure.strategies.nearest import Prototypes, features
from perdure.strategies.parts import parts
from perdure.strategies.swap import placed
from perdure.types import TASK, Batch, Context, Objective, Output

NAME, FACTS = "multi-lora", "multi_lora.json"
CHILD = "adapters_by_kind"  # PEFT saves whatever has "lora_" in its name with the first adapter


class MultiLoRA(Strategy):
    """An adapter of its own for each kind of rows; a row trains that of its kind and is answered by it.

    A row's kind is `example.task`. The first kind's adapter is the model's own. Each further kind that stands among
    a task's rows gets, before the task, a copy of what that one was before any training, so that it first computes
    what the base did. Kinds may come in any order and mixture, within a task too: an adapter that a step has no row
    for stays as it is, to the bit, whatever moments and weight decay there are.

    Told a kind that it has no adapter for, the model answers as it did before any training.

    Args:
        infer: of which kind a row is where nobody tells: "nearest", by its features in the model as it was before
            any training (see `Prototypes`), whose mean over the rows of each kind is brought up to date after every
            step; or "surest", the kind whose adapter is (see `surest`).

    Attributes:
        kinds: those that have an adapter, in the order in which they were met.
        prototypes: for "nearest", the mean features of each kind.

    Sources: adapters to route among: Wang et al. 2022, "AdaMix" (arXiv:2205.12410); one for each task, put to use
    by how they fit: Huang et al. 2023, "LoraHub" (arXiv:2307.13269). Here a row goes to one of them.
    """

    name: ClassVar[str] = NAME
    summary: ClassVar[str] = "an adapter for each kind of rows, and rows sent to that of their kind"
    needs: ClassVar[str] = "LoRA or a soft prompt; an adapter a kind; no stored rows; kinds, told or inferred"
    cost: ClassVar[str] = "a pass for each kind in a step; to infer, one more over the step's rows without adapters"
    source: ClassVar[str] = "after Wang et al. 2022 (arXiv:2205.12410) and Huang et al. 2023 (arXiv:2307.13269)"
    wants_task_ids = True
    wants_outputs = False
    owns_training = True
    needs_boundaries = False

    def __init__(self, infer: Rule = "nearest") -> None:
        self.infer = check_rule(NAME, infer)
        self.prototypes = Prototypes()
        self.kinds: list[str] = []
        self._known: list[int] = []  # how many kinds there were before each task
        self._base: dict[str, Tensor] = {}
        self._objective: Objective = "classification"

    def check(self, model: nn.Module, objective: Objective) -> None:
        """There must be an adapter to copy, and none of an earlier training."""
        self._objective = objective
        self.infers = self.infer == "nearest" or objective != "regression"
        if hasattr(model, CHILD):
            raise StrategyError(
                "multi-lora: the model has an adapter for each kind already, as one has that was trained with "
                "multi-lora before; give a fresh model"
            )
        if not any(hasattr(module, "peft_config") for module in model.modules()):
            raise StrategyError(
                "multi-lora: the model has no adapter, and with all weights trained each kind would have a copy of "
                "the model; tune LoRA or a soft prompt (--tuning lora, or PEFT)"
            )

    def prepare(self, ctx: Context) -> None:
        """Add an adapter for each kind among the task's rows that is new."""
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in ctx.model.modules())
        if checkpointing or ctx.model._compiled_call_impl is not None:
            raise StrategyError(
                "multi-lora: gradient_checkpointing and compile call the model again, or another way, when another "
                "adapter is in place; leave them out"
            )
        # A task that failed is begun again, perhaps with other kinds.
        before = [*self._known, len(self.kinds)][: ctx.index + 1]
        self._known = before
        kinds = dict.fromkeys([*self.kinds[: before[-1]], *(row.task for row in ctx.task.train)])
        self._grow(ctx.model, list(kinds), before[-1])

    def _grow(self, model: nn.Module, kinds: list[str], keep: int) -> None:
        """Have an adapter for each of these kinds, of which so many are there already."""
        if not hasattr(model, CHILD):
            own = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self._base = {name: p.detach().clone() for name, p in own.items()}
            model.add_module(CHILD, Adapters(list(own), (), 0))
        adapters = _adapters(model)
        adapters.cut(max(keep, 1))
        while len(adapters) < len(kinds):
            adapters.grow(model, self._base)
        self.kinds = kinds

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        """Each row through its kind's adapter; in eval mode one of an unknown kind without any."""
        return forward_by_task(batch, lambda kind, rows: self._answer(model, kind, rows).logits)

    def _answer(self, model: nn.Module, kind: str, rows: Batch) -> Output:
        if not self.kinds:
            return super().forward(model, rows)
        if kind in self.kinds:
            return _adapters(model).call(model, rows, self._place(kind))
        if model.training:
            raise StrategyError(
                f"multi-lora: a row of kind {kind!r} is to be trained on, and no row of the task was of that kind, "
                "so that it has no adapter; have it among the task's rows from the start"
            )
        with placed(model, self._base):
            return super().forward(model, rows)

    def after_step(self, ctx: Context, batches: Sequence[Batch], outputs: Sequence[Output]) -> None:
        """Take the step's new rows into the means of their kinds."""
        if self.infer != "nearest":
            return
        for batch in batches:
            new = [i for i, row in enumerate(batch.examples) if row.source == TASK]
            if new:
                self._take_in(ctx, batch if len(new) == len(batch.examples) else rows_of(batch, new))

    def after_task(self, ctx: Context) -> None:
        """Take in kinds that were trained elsewhere, as the first stage of a branch was."""
        rows = [row for row in ctx.task.train if row.task in self.kinds and row.task not in self.prototypes.means]
        for part in parts(rows) if self.infer == "nearest" else ():
            self._take_in(ctx, ctx.collate(part))

    def _take_in(self, ctx: Context, batch: Batch) -> None:
        with placed(ctx.model, self._base), ctx.autocast():
            found = features(ctx.model, batch, ctx.objective)
        for kind, places in by_task(batch).items():
            self.prototypes.add(kind, found[places])

    def identify(self, model: nn.Module, batch: Batch) -> list[str]:
        """The kind that `infer` finds."""
        if self.infer == "nearest":
            return self.prototypes.nearest(model, batch, self._objective, lambda: placed(model, self._base))
        return surest(self.forward, model, batch, self.kinds, self._objective)

    def serving(self, model: nn.Module, task: str) -> AbstractContextManager[Any]:
        """The kind's adapter in the place of the model's own; for an unknown kind what that was before training."""
        if not self.kinds:
            return nullcontext()
        return placed(
            model, _adapters(model).values(model, self._place(task)) if task in self.kinds else self._base
        )

    def usage(self, model: nn.Module) -> dict[str, dict[str, int]]:
        """The weights of each kind's adapter, by the layer that they belong to."""
        found: dict[str, dict[str, int]] = {}
        for kind in self.kinds:
            for name, value in _adapters(model).values(model, self._place(kind)).items():
                layer = found.setdefault(name.rpartition(".")[0], {})
                layer[kind] = layer.get(kind, 0) + value.numel()
        return found

    def export(self, model: Any, folder: Path) -> None:
        """A folder for each kind, as `save_pretrained` writes it; multi_lora.json says whose is which."""
        if not self.kinds:
            model.save_pretrained(folder)
            return
        folders = {kind: f"{i}-{_plain(kind)}" for i, kind in enumerate(self.kinds, start=1)}
        for kind, name in folders.items():
            with self.serving(model, kind):
                model.save_pretrained(folder / name)
        text = json.dumps({"format": 1, "kinds": folders}, indent=2) + "\n"
        (folder / FACTS).write_text(text, encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        """Kinds, what adapters start from, and prototypes; adapters are the model's, and saved with it."""
        return {
            "kinds": list(self.kinds),
            "known": list(self._known),
            "base": dict(self._base),
            "prototypes": self.prototypes.state_dict(),
        }

    def regrow(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Have an adapter for each kind that was saved."""
        if state["kinds"] != self.kinds:
            self._grow(model, list(state["kinds"]), 1)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore all of it."""
        self.kinds, self._known = list(state["kinds"]), list(state["known"])
        like = self._base
        self._base = {name: value.to(like.get(name, value), copy=True) for name, value in state["base"].items()}
        self.prototypes.load_state_dict(state["prototypes"])

    def _place(self, kind: str) -> int:
        return self.kinds.index(kind)


class Adapters(Columns):
    """Columns that do not hear one another, and that all go on learning."""

    def grow(self, model: nn.Module, base: Mapping[str, Tensor], rank: int = 1, rng: Any = None) -> None:
        """Add one that computes just what the base did."""
        super().grow(model, base, rank, rng)

    def freeze(self, model: nn.Module) -> None:
        """Rows of any kind may come again."""


def _adapters(model: nn.Module) -> Adapters:
    adapters = model.get_submodule(CHILD)
    assert isinstance(adapters, Adapters)
    return adapters


def _plain(kind: str) -> str:
    """A part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", kind)[:40]
