"""Looking at what a model says, without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients: no dropout, and no running statistics that move.

    Each module's own mode is put back afterwards: parts of a model may be in another than the whole.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
