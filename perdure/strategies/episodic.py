"""What GEM and A-GEM share: a few rows of each past task, and gradients on them as one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perdure.memory.pack import pack, unpack
from perdure.models.objectives import count_targets
from perdure.order import take
from perdure.strategies.base import Strategy
from perdure.strategies.settings import whole
from perdure.types import Batch, Context, Example


class Episodic(Strategy):
    """A strategy that bounds the step by gradients on `per_task` kept rows of each past task.

    Args:
        per_task: rows kept of each task, chosen by key.

    Attributes:
        rows: the kept rows by task.
    """

    bounds_gradient = True

    def __init__(self, per_task: int) -> None:
        self.per_task = whole(self.name, "per_task", per_task, "rows")
        self.rows: dict[str, list[Example]] = {}

    def after_task(self, ctx: Context) -> None:
        """Keep rows of the task."""
        name = ctx.task.name
        self.rows[name] = take(ctx.task.train, self.per_task, ctx.seed, self.name, name, key=lambda row: row.key)

    def reference(self, ctx: Context, rows: Sequence[Example], batches: Sequence[Batch]) -> Tensor:
        """The gradient [P] of the task loss on these rows: a mean over their targets, in eval mode.

        It is taken in pieces of as many rows as the step's micro-batches have.
        """
        size = max((len(batch.examples) for batch in batches), default=1)
        ordered = sorted(rows, key=lambda row: 0 if row.x is None or row.x.dim() == 0 else row.x.shape[0])
        targets = max(sum(count_targets(row, ctx.objective) for row in rows), 1)
        weights = trainable(ctx.model)
        total: list[Tensor] | None = None
        for start in range(0, len(ordered), size):
            loss = ctx.loss_of(ordered[start : start + size], reduction="sum") / targets
            found = torch.autograd.grad(loss, weights, allow_unused=True)
            part = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
            if total is None:
                total = part
            else:
                torch._foreach_add_(total, part)
        assert total is not None
        return torch.cat([g.reshape(-1) for g in total])

    def kept(self) -> int:
        """Rows of all tasks."""
        return sum(map(len, self.rows.values()))

    def state_dict(self) -> dict[str, Any]:
        """The kept rows."""
        return {"rows": {name: pack(rows) for name, rows in self.rows.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.rows = {name: unpack(packed) for name, packed in state["rows"].items()}


# Columns that are turned into float64 at a time: sums over them are exact enough without a double copy of it all.
COLUMNS = 1 << 18


def products(gradient: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """GGᵀ [T, T] and Gg [T] of references G [T, P] and a gradient g [P], in float64 on the CPU, block by block."""
    gram = torch.zeros(len(references), len(references), dtype=torch.float64)
    found = torch.zeros(len(references), dtype=torch.float64)
    for start in range(0, gradient.numel(), COLUMNS):
        block = references[:, start : start + COLUMNS].double()
        gram += (block @ block.T).cpu()
        found += (block @ gradient[start : start + COLUMNS].double()).cpu()
    return gram, found


def trainable(model: nn.Module) -> list[Tensor]:
    """What is trained, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradient_vector(model: nn.Module) -> Tensor:
    """All gradients end to end [P]; zeros where a weight has none."""
    return torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).reshape(-1) for w in trainable(model)])


def put_gradient(model: nn.Module, vector: Tensor) -> None:
    """Write a vector [P] back into the gradients."""
    start = 0
    for weight in trainable(model):
        piece = vector[start : start + weight.numel()].view_as(weight)
        start += weight.numel()
        if weight.grad is None:
            weight.grad = piece.to(weight.dtype).clone()
        else:
            weight.grad.copy_(piece)
