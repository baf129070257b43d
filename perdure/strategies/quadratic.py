"""What EWC, SI and MAS share: a quadratic pull towards earlier weights, added to the gradients in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perdure.strategies.base import Strategy
from perdure.strategies.settings import number
from perdure.types import Context


class QuadraticPull(Strategy):
    """loss + strength/2 · Σ_i importance_i (θ_i − anchor_i)², over the trainable weights (see `values`).

    Attributes:
        strength: λ, at least 0.
        importance: by parameter name; empty until the first task has ended.
        anchor: by parameter name, where the weights are pulled to.
    """

    def __init__(self, strength: float) -> None:
        self.strength = number(self.name, "strength", strength)
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self._offset = 0.0  # Σ over tasks of the quadratics' value at the common anchor, for the logged loss

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """What is pulled, by name: the trainable weights."""
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def push(self, model: nn.Module, pulls: Mapping[str, Tensor]) -> None:
        """Add strength times the pull on each of `values` to the gradients."""
        weights = dict(model.named_parameters())
        gradients: list[Tensor] = []
        for name in pulls:
            weight = weights[name]
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            gradients.append(weight.grad)
        if gradients:
            torch._foreach_add_(gradients, list(pulls.values()), alpha=self.strength)

    def gradient(self, ctx: Context, batches: object) -> None:
        """Add strength · importance (θ − anchor) to the gradients and log the penalty's value."""
        if not self.importance or self.strength == 0:
            return
        with torch.no_grad():
            values = {name: v for name, v in self.values(ctx.model).items() if name in self.importance}
            if not values:
                return
            for name, present in values.items():
                if self.importance[name].device != present.device:
                    self.importance[name] = self.importance[name].to(present.device)
                    self.anchor[name] = self.anchor[name].to(present.device)
            moved = torch._foreach_sub(list(values.values()), [self.anchor[name] for name in values])
            pulls = torch._foreach_mul(moved, [self.importance[name] for name in values])
            self.push(ctx.model, dict(zip(values, pulls, strict=True)))
            value = sum(torch.dot(m.flatten(), p.flatten()) for m, p in zip(moved, pulls, strict=True))
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
        here = {name: v.detach().clone() for name, v in self.values(ctx.model).items() if name in new}
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
