"""Per-example gradients of the loss or another value, by `torch.func` where the model allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from perdure.models.objectives import total_loss
from perdure.types import Batch, Context, Example, Objective, Output

# Per-example gradients of this many weights are held at once (float32: 256 MiB).
HELD = 64_000_000


# A scalar of a model's output on a batch.
Value = Callable[[Output, Batch, Objective], Tensor]


class _Bound(nn.Module):
    """A model with the forward pass of a strategy, as one module for `functional_call`."""

    def __init__(self, model: nn.Module, ctx: Context, value: Value) -> None:
        super().__init__()
        self.model = model
        self._ctx = ctx
        self._value = value

    def forward(self, batch: Batch) -> Tensor:
        return self._value(self._ctx.forward(self.model, batch), batch, self._ctx.objective)


def per_example_gradients(
    ctx: Context,
    examples: Sequence[Example],
    label: Callable[[Batch], Tensor] | None = None,
    value: Value = total_loss,
    parameters: Mapping[str, Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Gradients of each example's summed loss (or another value) by the trainable weights, in eval mode.

    Args:
        ctx: the strategy's context.
        examples: encoded rows; those of like length are taken together.
        label: replaces a batch's targets (to sample them from the model, say); None keeps the rows' own.
        value: what is differentiated; a sum over examples.
        parameters: by name, what it is differentiated by, in place of the trainable weights.

    Yields:
        Dicts from parameter name to a tensor [B, *shape], until every example was met once.
    """
    was_training = ctx.model.training
    ctx.model.eval()
    try:
        if parameters is None:
            parameters = {name: p for name, p in ctx.model.named_parameters() if p.requires_grad}
        held = sum(p.numel() for p in parameters.values())
        chunk = max(1, min(32, HELD // max(held, 1)))
        rows = sorted(examples, key=lambda e: 0 if e.x is None or e.x.dim() == 0 else e.x.shape[0])
        vectorised = chunk > 1
        for start in range(0, len(rows), chunk):
            batch = ctx.collate(rows[start : start + chunk])
            targets = batch.y if label is None else label(batch)
            if vectorised:
                try:
                    yield _together(ctx, parameters, batch, targets, value)
                    continue
                except RuntimeError:
                    # Some models branch on values or checkpoint activations, which vmap refuses.
                    vectorised = False
            yield from _one_by_one(ctx, parameters, batch, targets, value)
    finally:
        ctx.model.train(was_training)


def _together(
    ctx: Context, parameters: Mapping[str, Tensor], batch: Batch, targets: Tensor, value: Value
) -> dict[str, Tensor]:
    bound = _Bound(ctx.model, ctx, value)
    values = {f"model.{name}": p.detach() for name, p in parameters.items()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        row = Batch(batch.examples[:1], x[None], y[None], (1,), 0)
        return functional_call(bound, weights, (row,))

    assert isinstance(batch.x, Tensor)
    # The fused attention kernels have no batching rule: vmap would run them row by row. The plain one has.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="error")(values, batch.x, targets)
    return {name.removeprefix("model."): each for name, each in gradients.items()}


def _one_by_one(
    ctx: Context, parameters: Mapping[str, Tensor], batch: Batch, targets: Tensor, value: Value
) -> Iterator[dict[str, Tensor]]:
    names, tensors = list(parameters), list(parameters.values())
    frozen = [p for p in tensors if not p.requires_grad]
    assert isinstance(batch.x, Tensor)
    try:
        for p in frozen:
            p.requires_grad_(True)
        for i in range(len(batch.examples)):
            row = Batch(batch.examples[i : i + 1], batch.x[i : i + 1], targets[i : i + 1], (1,), 0)
            with torch.enable_grad():
                scalar = value(ctx.forward(ctx.model, row), row, ctx.objective)
                found = torch.autograd.grad(scalar, tensors, allow_unused=True)
            yield {
                name: (torch.zeros_like(p) if g is None else g)[None]
                for name, p, g in zip(names, tensors, found, strict=True)
            }
    finally:
        for p in frozen:
            p.requires_grad_(False)
