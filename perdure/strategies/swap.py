"""The same model with other values in it, for a forward pass."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from perdure.types import Batch, Context, Output


class _Bound(nn.Module):
    """A model with the forward pass of a strategy, as one module for `functional_call`."""

    def __init__(self, model: nn.Module, ctx: Context) -> None:
        super().__init__()
        self.model = model
        self._ctx = ctx

    def forward(self, batch: Batch) -> Tensor:
        return self._ctx.forward(self.model, batch).logits


def forward_with(ctx: Context, values: Mapping[str, Tensor], batch: Batch) -> Output:
    """The output with these parameters and buffers in place of the own ones: in eval mode, without gradients.

    It is taken at the run's precision. What is not named stays. The model itself is not changed, and no random
    number is drawn.
    """
    modes = {module: module.training for module in ctx.model.modules()}
    ctx.model.eval()
    try:
        with torch.no_grad(), ctx.autocast():
            named = {f"model.{name}": value for name, value in values.items()}
            return Output(functional_call(_Bound(ctx.model, ctx), named, (batch,)))
    finally:
        for module, training in modes.items():
            module.training = training
