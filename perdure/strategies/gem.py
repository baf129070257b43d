"""Gradient episodic memory: a step may raise no past task's loss, to first order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from perdure.strategies.episodic import Episodic, gradient_vector, products, put_gradient
from perdure.strategies.settings import number
from perdure.types import Batch, Context


class GEM(Episodic):
    """The gradient is projected onto the half-spaces in which no past task's loss rises.

    g̃ = g + Σ_k v_k g_k, where g_k is the gradient on the kept rows of task k, taken anew in each step, and v solves
    min ½ vᵀGGᵀv + gᵀGᵀv with v ≥ margin. If g·g_k ≥ 0 for all k already, g stays. All trainable weights are one
    vector. The projection is made before clipping.

    Args:
        per_task: rows kept of each task.
        margin: at least 0; above it, a step that had to be projected is drawn further towards the past tasks.

    Source: Lopez-Paz & Ranzato 2017 (arXiv:1706.08840).
    """

    name: ClassVar[str] = "gem"
    summary: ClassVar[str] = "the gradient is projected so that no past task's loss rises on its kept rows"
    needs: ClassVar[str] = "per_task rows of each task; no extra weights between steps, no task ids"
    cost: ClassVar[str] = "a step has a backward pass over per_task rows of each past task, and holds its gradient"
    source: ClassVar[str] = "Lopez-Paz & Ranzato 2017 (arXiv:1706.08840)"

    def __init__(self, per_task: int = 64, margin: float = 0.0) -> None:
        super().__init__(per_task)
        self.margin = number("gem", "margin", margin)

    def gradient(self, ctx: Context, batches: Sequence[Batch]) -> None:
        """Project the gradient."""
        past = [rows for name, rows in self.rows.items() if name != ctx.task.name and rows]
        if not past:
            return
        gradient = gradient_vector(ctx.model)
        references = gradient.new_empty(len(past), len(gradient))
        for row, rows in zip(references, past, strict=True):
            row.copy_(self.reference(ctx, rows, batches))
        projected = project_gem(gradient, references, self.margin)
        ctx.log("projected", float(projected is not gradient))
        if projected is not gradient:
            put_gradient(ctx.model, projected)


def project_gem(gradient: Tensor, references: Tensor, margin: float = 0.0) -> Tensor:
    """The vector nearest to the gradient that has no negative product with any reference.

    With a margin above 0 it goes further towards the references. A gradient that has no negative product already is
    returned as it is.

    Args:
        gradient: g [P].
        references: G [T, P], a row for each past task.
        margin: lower bound of the dual variables v.

    Returns:
        g + Gᵀv [P], in the gradient's type.
    """
    gram, found = products(gradient, references)
    if not (gram.isfinite().all() and found.isfinite().all()):
        return gradient + torch.nan  # whoever looks at the gradient's norm finds out
    if bool((found >= 0).all()):
        return gradient
    dual = _solve(gram, found, margin).to(gradient.device, gradient.dtype)
    return gradient + dual @ references.to(gradient.dtype)


def _solve(gram: Tensor, products: Tensor, margin: float) -> Tensor:
    """min ½ vᵀ·gram·v + products·v with v ≥ margin: non-negative least squares in u = v − margin.

    Lawson and Hanson's active set (1974), on rows scaled to unit length, so that small gradients count alike.
    """
    scale = gram.diagonal().sqrt()
    live = scale > 0  # a reference of zeros bounds nothing
    scale = torch.where(live, scale, 1.0)
    matrix = gram / scale[:, None] / scale
    target = -(products + margin * gram.sum(1)) / scale
    tolerance = 1e-13 * float(target.abs().max().clamp(min=1e-300))
    u = torch.zeros_like(target)
    free = torch.zeros_like(live)
    for _ in range(3 * len(u) * len(u) + 3):
        slope = torch.where(live & ~free, target - matrix @ u, -torch.inf)
        best = int(slope.argmax())
        if slope[best] <= tolerance:
            break
        free[best] = True
        while True:
            found = torch.zeros_like(u)
            found[free] = torch.linalg.lstsq(matrix[free][:, free], target[free, None], driver="gelsd").solution[
                :, 0
            ]
            low = free & (found <= 0)
            if not low.any():
                u = found
                break
            # As far towards the free solution as the bounds allow; what meets its bound is free no more.
            steps = torch.where(low, u / (u - found).clamp(min=1e-300), torch.inf)
            step = steps.min()
            u = torch.where(free, u + step * (found - u), u)
            free &= ~(low & (steps <= step))
            u = torch.where(free, u, 0.0)
    return u / scale + margin
