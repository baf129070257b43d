"""Score a model on held-out rows: loss and the objective's own metrics, over all rows at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from perdure.models.objectives import total_loss
from perdure.types import Batch, Example, Objective, Output

# Tokens of a chunk, padding counted. On a processor more of them fall out of its caches; elsewhere their logits,
# over a vocabulary of 32,000 and in fp32, must fit.
CPU_TOKENS, TOKENS = 8192, 16384
# Ends the name of a metric for which the model was not told a row's task, where it otherwise is.
INFERRED = "_inferred"
# Ends the name of a metric that was measured on rows that were trained on: it says nothing of what was learnt.
TRAINING = "_training"
# Direction of every metric that is measured anywhere.
HIGHER_IS_BETTER = {
    "loss": False,
    "accuracy": True,
    "exact_match": True,
    "f1": True,
    "rmse": False,
    "mae": False,
    "r2": True,
}
HIGHER_IS_BETTER |= {metric + TRAINING: HIGHER_IS_BETTER[metric] for metric in ("loss", "rmse", "mae", "r2")}
HIGHER_IS_BETTER |= {metric + INFERRED: higher for metric, higher in HIGHER_IS_BETTER.items()}
# The metric that summarises an objective; the first that was measured counts.
MAIN = {"classification": ("accuracy",), "causal_lm": ("exact_match", "loss"), "regression": ("r2",)}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the model's mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def by_length(examples: Sequence[Example], size: int, tokens: int | None = None) -> Iterator[list[Example]]:
    """Chunks of at most `size` rows, longest first, so that little is padding; and of at most so many tokens."""
    rows, start = sorted(examples, key=lambda row: -_length(row)), 0
    while start < len(rows):
        fitting = size if tokens is None else max(1, min(size, tokens // max(_length(rows[start]), 1)))
        yield rows[start : start + fitting]
        start += fitting


def _length(row: Example) -> int:
    return 0 if row.x is None or row.x.dim() == 0 else row.x.shape[0]


def score(
    model: nn.Module,
    examples: Sequence[Example],
    objective: Objective,
    forward: Callable[[nn.Module, Batch], Output],
    collate: Callable[[Sequence[Example]], Batch],
    batch_size: int = 64,
) -> dict[str, float]:
    """Metrics of the model on these rows.

    Returns:
        "loss" (the training loss: mean over targets), and for classification "accuracy"; for regression "rmse",
        "mae" and "r2", all over every row. Empty where there are no rows.
    """
    if not examples:
        return {}
    loss, targets = 0.0, 0
    truths: list[Tensor] = []
    outputs: list[Tensor] = []
    with evaluating(model):
        tokens = None
        if objective == "causal_lm":
            device = next((p.device.type for p in model.parameters()), "cpu")
            tokens = CPU_TOKENS if device == "cpu" else TOKENS
        for rows in by_length(examples, batch_size, tokens):
            batch = collate(rows)
            output = forward(model, batch)
            loss += float(total_loss(output, batch, objective))
            targets += sum(batch.counts)
            if objective != "causal_lm":
                truths.append(batch.y.cpu())
                logits = output.logits
                outputs.append((logits.argmax(-1) if objective == "classification" else logits).cpu())
    found = {"loss": loss / max(targets, 1)}
    if objective == "classification":
        found["accuracy"] = float((torch.cat(outputs) == torch.cat(truths)).double().mean())
    elif objective == "regression":
        found.update(
            regression_metrics(torch.cat(outputs).double().flatten(), torch.cat(truths).double().flatten())
        )
    return found


def regression_metrics(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """RMSE, MAE and R² = 1 − SSE/SST over all values; R² of constant targets is nan."""
    error = predicted - true
    spread = float((true - true.mean()).square().sum())
    return {
        "rmse": float(error.square().mean().sqrt()),
        "mae": float(error.abs().mean()),
        "r2": 1 - float(error.square().sum()) / spread if spread > 0 else float("nan"),
    }
