"""Several short rows one behind the other in one row of a batch, so that little of a step is padding.

Each keeps its own positions and sees nothing of the others. Whether a model can do that is tried, not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perdure.models.adapters import soft_prompt
from perdure.types import Batch, Example, Output

WORTH = 0.15  # share of the positions that packing must save
TOLERANCE = 1e-3  # of logits, in a try in fp32


def plan(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which rows share a line of at most so many tokens: the longest first, each where it fits first.

    Example:
        >>> plan([3, 9, 5, 2], 10)
        [[1], [2, 0, 3]]
    """
    lines: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = next((k for k, free in enumerate(room) if free >= lengths[i]), len(lines))
        if at == len(lines):
            lines.append([])
            room.append(width)
        lines[at].append(i)
        room[at] -= lengths[i]
    return lines


def packed(model: Any, batch: Batch) -> Output | None:
    """Logits [B, T, V] as of the padded batch, 0 at padding; None where packing would save little."""
    lengths = [_length(row) for row in batch.examples]
    if not lengths:
        return None
    longest = max(lengths)
    lines = min((plan(lengths, width * longest) for width in (1, 2, 3)), key=lambda found: _size(found, lengths))
    if _size(lines, lengths) > (1 - WORTH) * len(lengths) * longest:
        return None
    return _through(model, batch, lines, lengths)


def can_pack(model: Any, rows: Sequence[Batch]) -> bool:
    """Whether rows that share a line come out as they do alone, by a try."""
    if soft_prompt(model) is not None:
        return False
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in rows:
                lengths = [_length(row) for row in batch.examples]
                whole = model(input_ids=batch.x, use_cache=False).logits
                shared = _through(model, batch, [list(range(len(lengths)))], lengths).logits
                real = _real(lengths, _tokens(batch))
                if (whole - shared)[real].abs().max() > TOLERANCE:
                    return False
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(was_training)
    return True


def _through(model: Any, batch: Batch, lines: Sequence[Sequence[int]], lengths: Sequence[int]) -> Output:
    """Through the model, line by line; then each row's logits where the padded batch has them."""
    x = _tokens(batch)
    width = max(sum(lengths[i] for i in line) for line in lines)
    ids = x.new_zeros(len(lines), width)
    positions = torch.zeros_like(ids)  # a token of padding is a sequence of its own
    rows, places, lines_of, ats = list[int](), list[int](), list[int](), list[int]()
    for k, line in enumerate(lines):
        start = 0
        for i in line:
            ids[k, start : start + lengths[i]] = x[i, : lengths[i]]
            positions[k, start : start + lengths[i]] = torch.arange(lengths[i], device=ids.device)
            rows += [i] * lengths[i]
            places += range(lengths[i])
            lines_of += [k] * lengths[i]
            ats += range(start, start + lengths[i])
            start += lengths[i]
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    to = [torch.tensor(index, device=ids.device) for index in (rows, places, lines_of, ats)]
    found = logits.new_zeros(*x.shape, logits.shape[-1])
    return Output(found.index_put((to[0], to[1]), logits[to[2], to[3]]))


def _size(lines: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return len(lines) * max(sum(lengths[i] for i in line) for line in lines)


def _tokens(batch: Batch) -> Tensor:
    assert isinstance(batch.x, Tensor)
    return batch.x


def _real(lengths: Sequence[int], x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device) < torch.tensor(lengths, device=x.device)[:, None]


def _length(row: Example) -> int:
    return 0 if row.x is None else len(row.x)
