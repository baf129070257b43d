"""MagMax: of all tasks' changes of a weight, the largest is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from perdure.strategies.merge import Merging, Start
from perdure.strategies.settings import number


class MagMax(Merging):
    """θ = θ₀ + scale · τ, with τ_i the τ_{t,i} of largest magnitude among tasks t, and τ_t = θ_t − θ₀.

    θ₀ are the weights before all training, θ_t those at the end of task t; of two equally far, the later is taken.
    After the first task the model holds θ₁ as it is.

    Args:
        scale: λ, at least 0; from the second task on.
        start: what the next task starts from; the paper's is "last", fine-tuning in sequence.

    Source: Marczak et al. 2024 (arXiv:2407.06322).
    """

    name: ClassVar[str] = "magmax"
    summary: ClassVar[str] = "of all tasks' changes of a weight the largest is served"
    needs: ClassVar[str] = (
        "2 values a trainable weight, 3 between tasks, however many tasks; no stored rows, no task ids"
    )
    cost: ClassVar[str] = "nothing a step; a few passes over the weights at the end of a task"
    source: ClassVar[str] = "Marczak et al. 2024 (arXiv:2407.06322)"
    wants_base = True

    def __init__(self, scale: float = 1.0, start: Start = "last") -> None:
        super().__init__(start)
        self.scale = number("magmax", "scale", scale)
        # The weight of largest change, not the change: at scale 1 it is served to the last bit.
        self.held = {"farthest": {}}

    def fold(self, trained: Mapping[str, Tensor]) -> None:
        """Keep of each weight the value that is farthest from the base."""
        farthest = self.held["farthest"]
        for name, new in trained.items():
            old, base = farthest.get(name, new), self.base[name]
            farthest[name] = torch.where((new - base).abs() >= (old - base).abs(), new, old)

    def merged(self, name: str) -> Tensor:
        """θ₀ + scale · τ."""
        return torch.lerp(self.base[name], self.held["farthest"][name], self.scale)
