"""Elastic weight consolidation: important weights are held near where earlier tasks left them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from perdure.errors import StrategyError
from perdure.order import take
from perdure.strategies.fisher import per_example_gradients
from perdure.strategies.quadratic import QuadraticPull
from perdure.types import IGNORE, Batch, Context


class EWC(QuadraticPull):
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
        super().__init__(strength)
        if not 0 < decay <= 1:
            raise StrategyError(f"ewc: decay must be above 0 and at most 1, got {decay}")
        if fisher not in ("empirical", "true"):
            raise StrategyError(f'ewc: fisher must be "empirical" or "true", got {fisher!r}')
        if samples is not None and samples < 1:
            raise StrategyError(f"ewc: samples must be at least 1 (or None for all rows), got {samples}")
        self.decay = decay
        self.fisher = fisher
        self.samples = samples

    def after_task(self, ctx: Context) -> None:
        """Estimate the Fisher information on the task's rows and fold it in."""
        rows = ctx.task.train
        if self.samples is not None:
            rows = take(rows, self.samples, ctx.seed, "fisher", ctx.task.name, key=lambda e: e.key)
        new = self._estimate(ctx, rows)
        self.fold(ctx, new, self.decay, newest=self.decay < 1)

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
