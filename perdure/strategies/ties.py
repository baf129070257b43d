"""TIES: trim each task's change of the weights, elect signs, and average the changes that agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from perdure.errors import StrategyError
from perdure.strategies.merge import Merging, Start
from perdure.strategies.settings import number


class TIES(Merging):
    """θ = θ₀ + scale · τ, with τ_i the mean of the trimmed τ_{t,i} that have the elected sign.

    Of τ_t = θ_t − θ₀ the `density` entries of largest magnitude are kept, over all weights together; the others
    become 0. The elected sign is that of the sum over tasks; where that is 0, so is τ_i. Sums and counts of what
    is above and below 0 give all of it, exactly, for any number of tasks. After the first task the model holds θ₁
    as it is, untrimmed: there is nothing to merge yet.

    Args:
        density: the share of entries that trimming keeps, above 0 and at most 1.
        scale: λ, at least 0; from the second task on.
        start: what the next task starts from; the paper's is "base", tasks apart.

    Source: Yadav et al. 2023 (arXiv:2306.01708).
    """

    name: ClassVar[str] = "ties"
    summary: ClassVar[str] = "tasks' changes of the weights are trimmed, and those of the elected sign averaged"
    needs: ClassVar[str] = (
        "3 values and 2 counts a trainable weight, however many tasks; with `start: last` 1 value more between "
        "tasks; no stored rows, no task ids"
    )
    cost: ClassVar[str] = "nothing a step; a few passes over the weights at the end of a task"
    source: ClassVar[str] = "Yadav et al. 2023 (arXiv:2306.01708)"
    wants_base = True

    def __init__(self, density: float = 0.2, scale: float = 1.0, start: Start = "base") -> None:
        super().__init__(start)
        self.density = number("ties", "density", density, above=True)
        if self.density > 1:
            raise StrategyError(f"ties: density is a share of the entries, at most 1, got {density!r}")
        self.scale = number("ties", "scale", scale)
        self.held = {kind: {} for kind in ("above", "below", "num_above", "num_below")}

    def fold(self, trained: Mapping[str, Tensor]) -> None:
        """Trim the task's change and add it to the sums and counts of its signs."""
        moved = {name: new - self.base[name] for name, new in trained.items()}
        least = smallest_kept(moved, self.density)
        for name, change in moved.items():
            kept = torch.where(change.abs() >= least, change, 0.0)
            for side, part in (("above", kept.clamp(min=0)), ("below", kept.clamp(max=0))):
                sums, counts = self.held[side], self.held[f"num_{side}"]
                count = (part != 0).to(torch.int16)
                sums[name] = sums[name] + part if name in sums else part
                counts[name] = counts[name] + count if name in counts else count

    def merged(self, name: str) -> Tensor:
        """θ₀ + scale · τ."""
        above, below = self.held["above"][name], self.held["below"][name]
        elected = above + below
        up = above / self.held["num_above"][name].clamp(min=1)
        down = below / self.held["num_below"][name].clamp(min=1)
        mean = torch.where(elected > 0, up, torch.where(elected < 0, down, 0.0))
        return torch.add(self.base[name], mean, alpha=self.scale)


def smallest_kept(moved: Mapping[str, Tensor], density: float) -> Tensor:
    """The magnitude from which on entries belong to the largest share `density` of all, at least one: scalar."""
    flat = torch.cat([change.abs().flatten() for change in moved.values()])
    kept = max(1, round(density * len(flat)))
    return flat.kthvalue(len(flat) - kept + 1).values
