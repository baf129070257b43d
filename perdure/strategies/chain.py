"""Several strategies as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perdure.errors import StrategyError
from perdure.order import priority
from perdure.strategies.base import STEP, Penalty, Strategy
from perdure.types import Batch, Context, Example, Objective, Output, Phase, Task


class Chain(Strategy):
    """Penalties add; `mix` and `gradient` run in order; at most one member owns `forward`, and one `phases`.

    Each member draws from a generator of its own, so that adding a strategy never shifts another's draws.

    Args:
        strategies: one at least, each of another class; their order is that of `mix` and `gradient`.

    Raises:
        StrategyError: two of them cannot stand together, or not in this order; the message says why.
    """

    name: ClassVar[str] = "chain"
    summary: ClassVar[str] = "several strategies together, as in replay+ewc"

    def __init__(self, strategies: Sequence[Strategy]) -> None:
        if not strategies:
            raise StrategyError("chain: at least one strategy is needed")
        names = [strategy.name for strategy in strategies]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise StrategyError(f"chain: {', '.join(twice)} stands in it more than once")
        self.strategies = tuple(strategies)
        self.wants_task_ids = any(strategy.wants_task_ids for strategy in strategies)
        self.wants_task_gradient = any(strategy.wants_task_gradient for strategy in strategies)
        self.bounds_gradient = any(strategy.bounds_gradient for strategy in strategies)
        self.virtual_tokens = sum(strategy.virtual_tokens for strategy in strategies)
        self.adds_to_forward = any(strategy.adds_to_forward for strategy in strategies)
        self.isolates = any(strategy.isolates for strategy in strategies)
        self.merges = any(strategy.merges for strategy in strategies)
        self._refuse_broken_bounds()
        self._refuse_idle_rehearsal()
        self._refuse_clashing_merges()
        self._refuse_lost_names()
        self._refuse_idle_freezing()
        memories = [id(memory) for s in strategies if (memory := getattr(s, "buffer", None)) is not None]
        if len(set(memories)) < len(memories):
            raise StrategyError("chain: two of its strategies share one buffer; give each its own")
        self.weights = self._weights()
        self._forward = self._owner("forward")
        self._phases = self._owner("phases")
        self._export = self._owner("export")
        self._rngs: list[torch.Generator] = []

    def check(self, model: nn.Module, objective: Objective) -> None:
        """Every member's."""
        for strategy in self.strategies:
            strategy.check(model, objective)

    def _refuse_broken_bounds(self) -> None:
        bounded = ""
        for strategy in self.strategies:
            if bounded and strategy.bounds_gradient:
                raise StrategyError(
                    f"chain: {bounded} and {strategy.name} both bound the gradient, and the second would undo the "
                    "first; take one of them"
                )
            if bounded and type(strategy).gradient is not Strategy.gradient:
                raise StrategyError(
                    f"chain: {strategy.name} changes the gradient after {bounded} has bounded it, so the bound "
                    f"would not hold; put {bounded} last"
                )
            bounded = strategy.name if strategy.bounds_gradient else bounded

    def _refuse_idle_rehearsal(self) -> None:
        owners = [s.name for s in self.strategies if s.isolates]
        kept = [s.name for s in self.strategies if type(s).kept is not Strategy.kept]
        if owners and kept:
            raise StrategyError(
                f"chain: {owners[0]} never changes a finished task's weights, so the rows that {kept[0]} keeps of "
                f"such tasks would train nothing; take one of them"
            )

    def _refuse_lost_names(self) -> None:
        renaming = [s.name for s in self.strategies if s.renames]
        # What keeps rows holds those; what else looks back at a task's end holds weights, in LoRA's weight space by
        # the names of the base.
        holders = [
            s.name
            for s in self.strategies
            if not s.renames
            and type(s).after_task is not Strategy.after_task
            and type(s).kept is Strategy.kept
            and getattr(s, "space", "") != "weight"
        ]
        if renaming and holders:
            raise StrategyError(
                f"chain: {renaming[0]} trains other parameters in each task, so that what {holders[0]} holds of "
                "them from the end of a task would act on nothing later; take one of them"
            )

    def _refuse_idle_freezing(self) -> None:
        owners = [s.name for s in self.strategies if s.owns_training]
        freezing = [s.name for s in self.strategies if s.freezes]
        if owners and freezing:
            raise StrategyError(
                f"chain: {owners[0]} decides alone on what is trained, so that {freezing[0]} would freeze nothing, "
                "or not for good; take one of them"
            )

    def _refuse_clashing_merges(self) -> None:
        merging = [s.name for s in self.strategies if s.merges]
        growing = [i for i, s in enumerate(self.strategies) if s.owns_training]
        if merging and growing and self.strategies[growing[-1]].name != self.strategies[0].name:
            raise StrategyError(
                f"chain: {self.strategies[growing[-1]].name} adds what {merging[0]} is to merge; put "
                f"{self.strategies[growing[-1]].name} first"
            )
        owners = [s.name for s in self.strategies if s.isolates]
        if len(merging) > 1:
            raise StrategyError(
                f"chain: {' and '.join(merging)} both decide which weights are served; take one of them"
            )
        if merging and owners:
            raise StrategyError(
                f"chain: {merging[0]} changes weights when a task ends, which {owners[0]} must keep as they are; "
                "take one of them"
            )

    def claim(self) -> None:
        """Every member's."""
        super().claim()
        for strategy in self.strategies:
            strategy.claim()

    def _owner(self, hook: str) -> Strategy:
        owners = [s for s in self.strategies if getattr(type(s), hook) is not getattr(Strategy, hook)]
        if len(owners) > 1:
            names = " and ".join(s.name for s in owners)
            raise StrategyError(f"chain: {names} both decide on {hook}; only one strategy in a chain can")
        return owners[0] if owners else self.strategies[0]

    def _each(self, ctx: Context) -> list[tuple[Strategy, Context]]:
        if not self._rngs:
            self._rngs = [
                torch.Generator().manual_seed(priority(ctx.seed, "chain", key=s.name) >> 1) for s in self.strategies
            ]
        return [(s, ctx.but(rng=rng)) for s, rng in zip(self.strategies, self._rngs, strict=True)]

    def prepare(self, ctx: Context) -> None:
        """Every member's, in order."""
        for strategy, own in self._each(ctx):
            strategy.prepare(own)

    def phases(self, task: Task, plan: Sequence[Phase]) -> Sequence[Phase]:
        """The owner's."""
        return self._phases.phases(task, plan)

    def mix(self, ctx: Context, examples: list[Example]) -> list[Example]:
        """Every member's, in order, each on what the one before returned."""
        for strategy, own in self._each(ctx):
            examples = strategy.mix(own, examples)
        self.weights = self._weights()
        return examples

    def _weights(self) -> dict[str, float]:
        # A member's may depend on what it has just mixed in.
        return {group: w for strategy in self.strategies for group, w in strategy.weights.items()}

    def bookmark(self) -> tuple[list[Any], list[Tensor]]:
        """Every member's, and the generators."""
        return [s.bookmark() for s in self.strategies], [rng.get_state() for rng in self._rngs]

    def turn_back(self, bookmark: tuple[list[Any], list[Tensor]]) -> None:
        """Every member's, and the generators."""
        for strategy, own in zip(self.strategies, bookmark[0], strict=True):
            strategy.turn_back(own)
        for rng, state in zip(self._rngs, bookmark[1], strict=True):
            rng.set_state(state)

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        """The owner's."""
        return self._forward.forward(model, batch)

    @property
    def forwards_plainly(self) -> bool:
        """Whether the owner's is."""
        return self._forward.forwards_plainly

    @property
    def infers(self) -> bool:  # type: ignore[override]
        """Of the owner of `forward`."""
        return self._forward.infers

    def identify(self, model: nn.Module, batch: Batch) -> list[str]:
        """The owner's of `forward`."""
        return self._forward.identify(model, batch)

    def serving(self, model: nn.Module, task: str) -> AbstractContextManager[Any] | None:
        """The owner's of `forward`."""
        return self._forward.serving(model, task)

    def usage(self, model: nn.Module) -> dict[str, dict[str, int]]:
        """That of the first member that knows."""
        return next((found for s in self.strategies if (found := s.usage(model))), {})

    def export(self, model: Any, folder: Path) -> None:
        """The owner's."""
        self._export.export(model, folder)

    def penalty(self, ctx: Context, batch: Batch, output: Output) -> Penalty:
        """The sum of the members', by group."""
        total: dict[str, Any] = {}
        for strategy, own in self._each(ctx):
            penalty = strategy.penalty(own, batch, output)
            for group, summed in (penalty if isinstance(penalty, Mapping) else {STEP: penalty}).items():
                total[group] = total.get(group, 0.0) + summed
        return total

    def observe(self, ctx: Context, batches: Sequence[Batch]) -> None:
        """Every member's, before any changes a gradient."""
        for strategy, own in self._each(ctx):
            strategy.observe(own, batches)

    def gradient(self, ctx: Context, batches: Sequence[Batch]) -> None:
        """Every member's, in order."""
        for strategy, own in self._each(ctx):
            strategy.gradient(own, batches)

    @property
    def needs_boundaries(self) -> bool:
        """Whether a member does."""
        return any(strategy.needs_boundaries for strategy in self.strategies)

    @property
    def wants_outputs(self) -> bool:
        """Whether a member does."""
        return any(strategy.wants_outputs for strategy in self.strategies)

    def after_step(self, ctx: Context, batches: Sequence[Batch], outputs: Sequence[Output]) -> None:
        """Every member's, in order."""
        for strategy, own in self._each(ctx):
            strategy.after_step(own, batches, outputs)

    def after_phase(self, ctx: Context, phase: Phase) -> None:
        """Every member's, in order."""
        for strategy, own in self._each(ctx):
            strategy.after_phase(own, phase)

    def after_task(self, ctx: Context) -> None:
        """Every member's, in order."""
        for strategy, own in self._each(ctx):
            strategy.after_task(own)

    def kept(self) -> int:
        """The sum of the members'."""
        return sum(strategy.kept() for strategy in self.strategies)

    def state_dict(self) -> dict[str, Any]:
        """Every member's state and generator, by name."""
        return {
            "members": {s.name: s.state_dict() for s in self.strategies},
            "rngs": [rng.get_state() for rng in self._rngs],
        }

    def regrow(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Every member's."""
        for strategy in self.strategies:
            strategy.regrow(model, state["members"][strategy.name])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore every member."""
        for strategy in self.strategies:
            strategy.load_state_dict(state["members"][strategy.name])
        self._rngs = [torch.Generator() for _ in state["rngs"]]
        for rng, saved in zip(self._rngs, state["rngs"], strict=True):
            rng.set_state(saved)
