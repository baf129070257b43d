"""What EWC, SI and MAS share: a quadratic pull towards earlier weights, added to the gradients in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from perdure.errors import StrategyError
from perdure.strategies.base import Strategy
from perdure.types import Context


class QuadraticPull(Strategy):
    """loss + strength/2 · Σ_i importance_i (θ_i − anchor_i)², over the trainable weights.

    Attributes:
        strength: λ, at least 0.
        importance: by parameter name; empty until the first task has ended.
        anchor: by parameter name, where the weights are pulled to.
    """

    def __init__(self, strength: float) -> None:
        if not 0 <= strength < float("inf"):
            raise StrategyError(f"{self.name}: strength must be a finite number of at least 0, got {strength}")
        self.strength = strength
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self._offset = 0.0  # Σ over tasks of the quadratics' value at the common anchor, for the logged loss

    def gradient(self, ctx: Context, batches: object) -> None:
        """Add strength · importance (θ − anchor) to the gradients and log the penalty's value."""
        if not self.importance or self.strength == 0:
            return
        with torch.no_grad():
            weights: list[Tensor] = []
            gradients: list[Tensor] = []
            importances: list[Tensor] = []
            anchors: list[Tensor] = []
            for name, parameter in ctx.model.named_parameters():
                if not parameter.requires_grad or name not in self.importance:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if self.importance[name].device != parameter.device:
                    self.importance[name] = self.importance[name].to(parameter.device)
                    self.anchor[name] = self.anchor[name].to(parameter.device)
                weights.append(parameter)
                gradients.append(parameter.grad)
                importances.append(self.importance[name])
                anchors.append(self.anchor[name])
            if not weights:
                return
            moved = list(torch._foreach_sub(weights, anchors))
            pull = torch._foreach_mul(moved, importances)
            torch._foreach_add_(gradients, pull, alpha=self.strength)
            value = sum(torch.dot(m.flatten(), p.flatten()) for m, p in zip(moved, pull, strict=True))
        ctx.log("penalty", self.strength / 2 * (value + self._offset))

    def fold(self, ctx: Context, new: Mapping[str, Tensor], decay: float = 1.0, newest: bool = False) -> None:
        """Take in a task's importance at the weights as they are now.

        Args:
            ctx: of the task that has ended.
            new: its importance by parameter name.
            decay: what earlier importance is multiplied by.
            newest: anchor all importance at the newest weights; else each task's quadratic keeps its own minimum,
                and the anchor is that of their sum.
        """
        here = {name: p.detach().clone() for name, p in ctx.model.named_parameters() if name in new}
        for name, fresh in new.items():
            old = self.importance.get(name)
            if old is None:
                self.importance[name], self.anchor[name] = fresh, here[name]
                continue
            if old.device != fresh.device:  # loaded, and no step was taken since
                old = old.to(fresh.device)
                self.anchor[name] = self.anchor[name].to(fresh.device)
            old.mul_(decay)
            total = old + fresh
            if newest:
                self.anchor[name] = here[name]
            else:
                share = torch.where(total > 0, fresh / total, 1.0)
                gap = here[name] - self.anchor[name]
                self._offset += float((old * share * gap.square()).sum())
                self.anchor[name] = torch.lerp(self.anchor[name], here[name], share)
            self.importance[name] = total

    def state_dict(self) -> dict[str, Any]:
        """Importance and anchor."""
        return {"importance": dict(self.importance), "anchor": dict(self.anchor), "offset": self._offset}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore importance and anchor."""
        self.importance = {name: value.clone() for name, value in state["importance"].items()}
        self.anchor = {name: value.clone() for name, value in state["anchor"].items()}
        self._offset = state["offset"]
