"""Elastic weight consolidation: important weights are held near where earlier tasks left them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from perdure.errors import StrategyError
from perdure.order import take
from perdure.strategies import weight_space
from perdure.strategies.fisher import per_example_gradients
from perdure.strategies.quadratic import QuadraticPull
from perdure.strategies.settings import whole
from perdure.types import IGNORE, Batch, Context, Objective


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
        space: "parameter" protects each trained weight. "weight" is for LoRA: F and the anchor are those of the
            full weights W that an adapter changes, and the pull towards their ΔW* reaches the factors A and B by
            the chain rule. What is protected is then what the layer does, not which factors say it. Two full
            matrices an adapted layer are held. Trained weights that are no LoRA factor are protected as they are.

    Source: Kirkpatrick et al. 2017 (arXiv:1612.00796); online: Schwarz et al. 2018 (arXiv:1805.06370); the sum as
    one quadratic: Huszár 2018 (arXiv:1712.03847).
    """

    name: ClassVar[str] = "ewc"
    summary: ClassVar[str] = "weights important to earlier tasks are pulled back to where those left them"
    needs: ClassVar[str] = (
        "2 values a trainable weight, in weight space a full one, however many tasks; no stored rows, no task ids"
    )
    cost: ClassVar[str] = "a few passes over the weights a step; one backward pass a row at the end of a task"
    source: ClassVar[str] = "Kirkpatrick et al. 2017 (arXiv:1612.00796)"

    def __init__(
        self,
        strength: float = 100.0,
        decay: float = 1.0,
        fisher: Literal["empirical", "true"] = "empirical",
        samples: int | None = None,
        space: Literal["parameter", "weight"] = "parameter",
    ) -> None:
        super().__init__(strength)
        if not isinstance(decay, int | float) or not 0 < decay <= 1:
            raise StrategyError(f"ewc: decay must be above 0 and at most 1, got {decay}")
        if fisher not in ("empirical", "true"):
            raise StrategyError(f'ewc: fisher must be "empirical" or "true", got {fisher!r}')
        if samples is not None:
            whole("ewc", "samples", samples, "rows (or None for all)")
        self.decay = decay
        self.fisher = fisher
        if space not in ("parameter", "weight"):
            raise StrategyError(f'ewc: space must be "parameter" or "weight", got {space!r}')
        self.samples = samples
        self.space = space

    def check(self, model: nn.Module, objective: Objective) -> None:
        """`space="weight"` needs LoRA on linear layers."""
        if self.space == "weight":
            weight_space.check(model)

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """What is pulled: the trainable weights, in weight space ΔW in place of LoRA's factors."""
        own = super().values(model)
        return own if self.space == "parameter" else weight_space.values(model, own)

    def push(self, model: nn.Module, pulls: Mapping[str, Tensor]) -> None:
        """Add the pull to the gradients, in weight space through LoRA's factors."""
        layers = weight_space.layers(model) if self.space == "weight" else {}
        for name, layer in layers.items():
            if name in pulls:
                weight_space.push(layer, self.strength * pulls[name])
        super().push(model, {name: pull for name, pull in pulls.items() if name not in layers})

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
        by = None
        if self.space == "weight":
            # The gradient by W is the same whether W's base or its ΔW is moved; the base is one plain parameter.
            wanted = self.values(ctx.model)
            by = {n: p for n, p in ctx.model.named_parameters() if n in wanted}
        for gradients in per_example_gradients(ctx, rows, label, parameters=by):
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
