"""The same model with other values in it, for a forward pass or for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.func import functional_call

from perdure.models.modes import looking
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
    with looking(ctx.model), ctx.autocast():
        named = {f"model.{name}": value for name, value in values.items()}
        return Output(functional_call(_Bound(ctx.model, ctx), named, (batch,)))


@contextmanager
def placed(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, the parameters of these names hold these values; no number is copied.

    For looking only: what autograd has kept of a parameter would be the other value.
    """
    own = {name: model.get_parameter(name) for name in values}
    kept = {name: parameter.data for name, parameter in own.items()}
    try:
        for name, parameter in own.items():
            parameter.data = values[name].detach()
        yield
    finally:
        for name, parameter in own.items():
            parameter.data = kept[name]
