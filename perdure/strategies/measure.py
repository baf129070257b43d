"""What rows are to the model as it is: the loss of each, and what it looks like."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from perdure.errors import NonFiniteError
from perdure.memory.buffer import name_of
from perdure.models.modes import looking
from perdure.models.objectives import losses
from perdure.strategies.nearest import features
from perdure.strategies.parts import length, parts
from perdure.types import Context, Example

Measure = Callable[[Context, Sequence[Example]], Mapping[str, float]]


def checked(strategy: str, rows: Sequence[Example], found: Mapping[str, float]) -> Mapping[str, float]:
    """Losses that rows can be chosen by.

    Raises:
        NonFiniteError: one of them is nan or infinite.
    """
    for row in rows:
        if not math.isfinite(loss := found[str(name_of(row))]):
            raise NonFiniteError(
                f"{strategy}: the loss of row {row.key!r} of task {row.task!r} is {loss}, so that rows cannot be "
                "chosen by it. A lower optimizer.lr, or clip: 1.0, is the usual cure."
            )
    return found


def row_losses(ctx: Context, rows: Sequence[Example]) -> dict[str, float]:
    """Each row's mean loss over its targets under the model as it is, by `name_of(row)`; 0 without targets.

    In eval mode, without gradients and outside autocast, so that a row's loss does not depend on what stands beside
    it. The model's mode is put back, and no random number is drawn.
    """
    found: dict[str, float] = {}
    with _measuring(ctx):
        for part in parts(sorted(rows, key=length)):
            batch = ctx.collate(part)
            sums = losses(ctx.forward(ctx.model, batch), batch, ctx.objective).tolist()
            for row, summed, count in zip(part, sums, batch.counts, strict=True):
                found[str(name_of(row))] = summed / max(count, 1)
    return found


def row_features(ctx: Context, rows: Sequence[Example]) -> Tensor:
    """What each row looks like to the model as it is, see `perdure.strategies.nearest.features`: float32 [N, D]."""
    places = sorted(range(len(rows)), key=lambda i: length(rows[i]))
    with _measuring(ctx):
        found = [
            features(ctx.model, ctx.collate(part), ctx.objective).cpu() for part in parts([rows[i] for i in places])
        ]
    return torch.cat(found)[torch.tensor(places).argsort()]


@contextmanager
def _measuring(ctx: Context) -> Iterator[None]:
    with looking(ctx.model), torch.autocast(_device(ctx.model), enabled=False):
        yield


def _device(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")
