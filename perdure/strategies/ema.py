"""EMA: an exponential moving average of the weights is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from perdure.errors import StrategyError
from perdure.strategies.merge import Merging, Start
from perdure.strategies.settings import number
from perdure.types import Batch, Context, Output


class EMA(Merging):
    """slow ← decay · slow + (1 − decay) · θ, after every task or step from the second task on.

    At the end of the first task slow is its θ. The model holds slow between tasks.

    Args:
        decay: the share of slow that stays, at least 0 and below 1.
        every: "task" averages the ends of tasks, "step" the way as well.
        start: what the next task starts from: "last" keeps a fast learner beside the slow one, "merged" makes the
            average the next task's beginning.

    Sources: by step, a slow learner beside a fast one: Arani et al. 2022 (arXiv:2201.12604), and without stored
    rows Stojanovski et al. 2022 (arXiv:2211.03186); by task, CoMA: Marouf et al. 2023 (arXiv:2312.08977).
    """

    name: ClassVar[str] = "ema"
    wants_outputs = False
    summary: ClassVar[str] = "an exponential moving average of the weights over tasks or steps is served"
    needs: ClassVar[str] = (
        "1 value a trainable weight, with `start: last` 2 between tasks, with `start: base` 2; no stored rows, no "
        "task ids"
    )
    cost: ClassVar[str] = "one pass over the weights at the end of a task, with `every: step` one a step"
    source: ClassVar[str] = "Arani et al. 2022 (arXiv:2201.12604); by task, Marouf et al. 2023 (arXiv:2312.08977)"

    def __init__(self, decay: float = 0.3, every: Literal["task", "step"] = "task", start: Start = "last") -> None:
        super().__init__(start)
        self.decay = number("ema", "decay", decay)
        if self.decay >= 1:
            raise StrategyError(f"ema: decay must be below 1, or nothing new is ever served; got {decay!r}")
        if every not in ("task", "step"):
            raise StrategyError(f"ema: every must be task or step, got {every!r}")
        self.every = every
        self.held = {"slow": {}}

    def after_step(self, ctx: Context, batches: Sequence[Batch], outputs: Sequence[Output]) -> None:
        """Move the average towards the weights, if it is taken by step."""
        if self.every == "step" and self.tasks:
            self._move({name: p.detach() for name, p in self._own(ctx.model).items()})

    def fold(self, trained: Mapping[str, Tensor]) -> None:
        """Begin the average of what is new to it; move the rest of it, if it is taken by task."""
        if self.every == "task":
            self._move(trained)
        self.held["slow"] = {**trained, **self.held["slow"]}

    def merged(self, name: str) -> Tensor:
        """slow."""
        return self.held["slow"][name]

    def _move(self, weights: Mapping[str, Tensor]) -> None:
        slow = self.held["slow"]
        names = [name for name in weights if name in slow]
        for name in names:  # a loaded average is on the CPU
            slow[name] = slow[name].to(weights[name].device)
        if names:
            own = [weights[name].to(slow[name].dtype) for name in names]
            torch._foreach_lerp_([slow[name] for name in names], own, 1 - self.decay)
