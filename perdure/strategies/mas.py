"""Memory aware synapses: weights that the output is sensitive to are held where the last task left them."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from perdure.order import take
from perdure.strategies.fisher import per_example_gradients
from perdure.strategies.quadratic import QuadraticPull
from perdure.strategies.settings import whole
from perdure.types import IGNORE, Batch, Context, Objective, Output


class MAS(QuadraticPull):
    """loss + strength/2 · Σ_i Ω_i (θ_i − θ*_i)², over the trainable weights.

    Ω is the mean over rows of |∂‖f(x)‖²/∂θ|, in eval mode at the end of a task, summed over tasks; θ* are the
    newest weights. f is the model's output: logits, or the prediction; a causal language model's logits are taken
    where the next token is learnt. No targets are needed.

    Args:
        strength: λ, at least 0.
        samples: rows that Ω is estimated on; None takes all of the task's.

    Source: Aljundi et al. 2018 (arXiv:1711.09601).
    """

    name: ClassVar[str] = "mas"
    summary: ClassVar[str] = "weights that the output is sensitive to are pulled back to where they were left"
    needs: ClassVar[str] = (
        "2 values a trainable weight, however many tasks; no stored rows, no targets, no task ids"
    )
    cost: ClassVar[str] = "a few passes over the weights a step; one backward pass a row at the end of a task"
    source: ClassVar[str] = "Aljundi et al. 2018 (arXiv:1711.09601)"

    def __init__(self, strength: float = 1.0, samples: int | None = None) -> None:
        super().__init__(strength)
        if samples is not None:
            whole("mas", "samples", samples, "rows (or None for all)")
        self.samples = samples

    def after_task(self, ctx: Context) -> None:
        """Estimate the sensitivity on the task's rows and fold it in."""
        rows = ctx.task.train
        if self.samples is not None:
            rows = take(rows, self.samples, ctx.seed, "mas", ctx.task.name, key=lambda e: e.key)
        self.fold(ctx, self._estimate(ctx, rows), newest=True)

    def _estimate(self, ctx: Context, rows: Any) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        count = 0
        for gradients in per_example_gradients(ctx, rows, value=squared_norm):
            for name, each in gradients.items():
                summed = each.abs().sum(0)
                total[name] = total[name] + summed if name in total else summed
            count += each.shape[0]
        return {name: value / count for name, value in total.items()}


def squared_norm(output: Output, batch: Batch, objective: Objective) -> Tensor:
    """‖f(x)‖², summed over the batch; of a causal LM's logits, those that predict a learnt token."""
    squared = output.logits.float().square() if output.logits.dtype.itemsize < 4 else output.logits.square()
    if objective != "causal_lm":
        return squared.sum()
    learnt = batch.y[:, 1:] != IGNORE  # the logits at t predict the label at t + 1
    return (squared[:, :-1].sum(-1) * learnt).sum()
