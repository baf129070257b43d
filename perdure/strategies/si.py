"""Synaptic intelligence: weights are held by how much they lowered the loss on their way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from perdure.strategies.quadratic import QuadraticPull
from perdure.strategies.settings import number
from perdure.types import Context


class SI(QuadraticPull):
    """loss + strength/2 · Σ_i Ω_i (θ_i − θ*_i)², over the trainable weights.

    Along a task, ω_i = −Σ_steps g_i Δθ_i, with g the gradient of the loss alone (no penalty, before clipping) and
    Δθ the step that was really taken. At its end Ω_i ← Ω_i + max(0, ω_i) / (D_i² + ξ), with D the way from
    the task's beginning to its end, and θ* ← θ. The paper's c is strength/2.

    Args:
        strength: λ, at least 0.
        damping: ξ, above 0: bounds Ω where a weight ended where it began.

    Source: Zenke et al. 2017 (arXiv:1703.04200).
    """

    name: ClassVar[str] = "si"
    wants_outputs = False
    summary: ClassVar[str] = "weights that lowered earlier losses are pulled back to where the last task left them"
    needs: ClassVar[str] = "2 values a trainable weight, however many tasks; no stored rows, no task ids"
    cost: ClassVar[str] = "a few passes over the weights a step"
    source: ClassVar[str] = "Zenke et al. 2017 (arXiv:1703.04200)"

    wants_task_gradient = True

    def __init__(self, strength: float = 1.0, damping: float = 0.1) -> None:
        super().__init__(strength)
        self.damping = number("si", "damping", damping, above=True)
        self.path: dict[str, Tensor] = {}  # ω of the present task
        self._start: dict[str, Tensor] = {}  # where a weight's first task began; later ones begin at θ*
        self._before: dict[str, tuple[Tensor, Tensor]] = {}  # gradient and weight of the step under way

    def prepare(self, ctx: Context) -> None:
        """Remember where the way begins."""
        for name, parameter in ctx.model.named_parameters():
            if parameter.requires_grad and name not in self.anchor and name not in self._start:
                self._start[name] = parameter.detach().clone()

    def observe(self, ctx: Context, batches: object) -> None:
        """Keep the loss's gradient and the weights until the step is taken."""
        self._before = {
            name: (p.grad.detach().clone(), p.detach().clone())
            for name, p in ctx.model.named_parameters()
            if p.requires_grad and p.grad is not None
        }

    def after_step(self, ctx: Context, batches: object, outputs: object) -> None:
        """Add the step to the path."""
        with torch.no_grad():
            for name, parameter in ctx.model.named_parameters():
                if name in self._before:
                    gradient, before = self._before[name]
                    if name not in self.path:
                        self.path[name] = torch.zeros_like(before)
                    self.path[name] = self.path[name].to(before.device)
                    self.path[name].addcmul_(gradient, parameter.detach() - before, value=-1)
        self._before = {}

    def after_task(self, ctx: Context) -> None:
        """Turn the path into importance and fold it in."""
        new = {}
        for name, parameter in ctx.model.named_parameters():
            if name in self.path:
                began = self.anchor.get(name, self._start.get(name, parameter)).to(parameter.device)
                way = parameter.detach() - began
                new[name] = self.path[name].to(way.device).clamp(min=0) / (way.square() + self.damping)
        self.fold(ctx, new, newest=True)
        self.path, self._start = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Importance, anchor, and of a task under way its path and beginning."""
        return {**super().state_dict(), "path": dict(self.path), "start": dict(self._start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore all of it."""
        super().load_state_dict(state)
        self.path = {name: value.clone() for name, value in state["path"].items()}
        self._start = {name: value.clone() for name, value in state["start"].items()}
