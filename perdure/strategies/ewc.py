"""Elastic weight consolidation: important weights are held near where earlier tasks left them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from perdure.errors import StrategyError
from perdure.order import take
from perdure.strategies.base import Strategy
from perdure.strategies.fisher import per_example_gradients
from perdure.types import IGNORE, Batch, Context


class EWC(Strategy):
    """loss + strength/2 · Σ_tasks Σ_i F_i (θ_i − θ*_i)², over the trainable weights.

    F is the diagonal Fisher information: the per-example gradient of the log-likelihood, squared, then averaged, in
    eval mode at θ*, without penalties. A sum of quadratics is one quadratic, so that two tensors a weight say it
    all, however many tasks: `importance` ΣF and `anchor` ΣFθ*/ΣF. The penalty's gradient is added in closed form.

    Args:
        strength: λ, at least 0.
        decay: γ in (0, 1]. 1 sums over the tasks exactly. Below 1 is online EWC: F ← γF + F_new with one anchor,
            the newest weights.
        fisher: "empirical" takes each row's own target; "true" draws the target from the model.
        samples: rows that F is estimated on; None takes all of the task's.

    Source: Kirkpatrick et al. 2017 (arXiv:1612.00796); online: Schwarz et al. 2018 (arXiv:1805.06370); the sum as
    one quadratic: Huszár 2018 (arXiv:1712.03847).
    """

    name: ClassVar[str] = "ewc"
    summary: ClassVar[str] = "weights important to earlier tasks are pulled back to where those left them"

    def __init__(
        self,
        strength: float = 100.0,
        decay: float = 1.0,
        fisher: Literal["empirical", "true"] = "empirical",
        samples: int | None = None,
    ) -> None:
        if not 0 <= strength < float("inf"):
            raise StrategyError(f"ewc: strength must be a finite number of at least 0, got {strength}")
        if not 0 < decay <= 1:
            raise StrategyError(f"ewc: decay must be above 0 and at most 1, got {decay}")
        if fisher not in ("empirical", "true"):
            raise StrategyError(f'ewc: fisher must be "empirical" or "true", got {fisher!r}')
        if samples is not None and samples < 1:
            raise StrategyError(f"ewc: samples must be at least 1 (or None for all rows), got {samples}")
        self.strength = strength
        self.decay = decay
        self.fisher = fisher
        self.samples = samples
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self._offset = 0.0  # Σ over tasks of the quadratics' value at the common anchor, for the logged loss

    def gradient(self, ctx: Context, batches: object) -> None:
        """Add strength · F (θ − θ*) to the gradients and log the penalty's value."""
        if not self.importance or self.strength == 0:
            return
        with torch.no_grad():
            weights: list[Tensor] = []
            gradients: list[Tensor] = []
            fishers: list[Tensor] = []
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
                fishers.append(self.importance[name])
                anchors.append(self.anchor[name])
            if not weights:
                return
            moved = list(torch._foreach_sub(weights, anchors))
            pull = torch._foreach_mul(moved, fishers)
            torch._foreach_add_(gradients, pull, alpha=self.strength)
            value = sum(torch.dot(m.flatten(), p.flatten()) for m, p in zip(moved, pull, strict=True))
        ctx.log("penalty", self.strength / 2 * (value + self._offset))

    def after_task(self, ctx: Context) -> None:
        """Estimate the Fisher information on the task's rows and fold it in."""
        rows = ctx.task.train
        if self.samples is not None:
            rows = take(rows, self.samples, ctx.seed, "fisher", ctx.task.name, key=lambda e: e.key)
        new = self._estimate(ctx, rows)
        here = {name: p.detach().clone() for name, p in ctx.model.named_parameters() if name in new}
        for name, fresh in new.items():
            old = self.importance.get(name)
            if old is None:
                self.importance[name], self.anchor[name] = fresh, here[name]
                continue
            if old.device != fresh.device:  # loaded, and no step was taken since
                old = old.to(fresh.device)
                self.anchor[name] = self.anchor[name].to(fresh.device)
            old.mul_(self.decay)
            total = old + fresh
            if self.decay < 1:
                self.anchor[name] = here[name]
            else:
                share = torch.where(total > 0, fresh / total, 1.0)
                gap = here[name] - self.anchor[name]
                self._offset += float((old * share * gap.square()).sum())
                self.anchor[name] = torch.lerp(self.anchor[name], here[name], share)
            self.importance[name] = total

    def _estimate(self, ctx: Context, rows: Any) -> dict[str, Tensor]:
        label = None if self.fisher == "empirical" else lambda batch: self._draw(ctx, batch)
        fisher: dict[str, Tensor] = {}
        count = 0
        for gradients in per_example_gradients(ctx, rows, label):
            for name, each in gradients.items():
                squared = each.square().sum(0)
                if name in fisher:
                    fisher[name] += squared
                else:
                    fisher[name] = squared
            count += each.shape[0]
        return {name: value / count for name, value in fisher.items()}

    @staticmethod
    def _draw(ctx: Context, batch: Batch) -> Tensor:
        """Targets drawn from the model itself, where the rows have targets."""
        with torch.no_grad():
            logits = ctx.forward(ctx.model, batch).logits.float().cpu()
        if ctx.objective == "regression":
            noise = torch.randn(logits.shape, generator=ctx.rng)
            return (logits + noise).view(batch.y.shape).to(batch.y)
        chances = logits.softmax(-1)
        drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=ctx.rng).view(chances.shape[:-1])
        drawn = drawn.to(batch.y.device)
        if ctx.objective == "causal_lm":
            drawn = torch.cat([batch.y[:, :1], drawn[:, :-1]], 1)  # the logits at t predict the label at t + 1
            return torch.where(batch.y == IGNORE, batch.y, drawn)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """Importance and anchor."""
        return {"importance": dict(self.importance), "anchor": dict(self.anchor), "offset": self._offset}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore importance and anchor."""
        self.importance = {name: value.clone() for name, value in state["importance"].items()}
        self.anchor = {name: value.clone() for name, value in state["anchor"].items()}
        self._offset = state["offset"]
