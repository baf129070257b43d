"""Dropout whose mask is cheap on a CPU, where PyTorch's own takes as long to draw as a layer takes to compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEVELS = 1 << 16


class Dropout(nn.Dropout):
    """As `nn.Dropout`, with masks of 16 random bits an element on a CPU.

    There p counts as the nearest multiple of 2⁻¹⁶, and what is kept is scaled by the inverse of the share that is
    kept (rounded as x is), so that the mean is unchanged. Draws come from torch's global generator. Elsewhere it is
    `nn.Dropout`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The input with each element dropped with probability p, in training mode; else as it is."""
        return drop(x, self.p) if self.training and x.device.type == "cpu" else super().forward(x)


def drop(x: Tensor, p: float) -> Tensor:
    """Each element of a tensor on a CPU dropped with probability p, to the nearest 2⁻¹⁶; the mean is unchanged."""
    dropped = round(p * _LEVELS)
    if not 0 < dropped < _LEVELS or torch.compiler.is_compiling():  # a compiler knows no draws of whole numbers
        return F.dropout(x, p)
    # One draw of 64 bits makes four elements' bits; PyTorch draws 53 bits for each.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(1 << 63), None)
    bits = draws.view(torch.int16)
    # In place, so that no truth values have to be turned into numbers, which costs more than the comparison.
    kept = bits[: x.numel()].ge_(dropped - _LEVELS // 2).view(x.shape)
    return x * kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))


def use(model: nn.Module) -> None:
    """Put it in the place of each `nn.Dropout` of a model."""
    for part in list(model.modules()):
        for name, child in list(part._modules.items()):  # `named_children` leaves a second name of one out
            if type(child) is nn.Dropout:
                setattr(part, name, Dropout(child.p).train(child.training))
