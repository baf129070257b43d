"""How right a model is on some rows, and how far it has gone from another: one forward pass, nothing generated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from perdure.evaluation.score import evaluating
from perdure.training.learner import Learner
from perdure.types import IGNORE, Batch, Example

FEW = 1 << 24  # numbers that the base's probabilities may take


@dataclass(frozen=True, slots=True)
class Mark:
    """How a model does on one row.

    Attributes:
        right: whether each token of the right answer is the arg max after those before it, so that the greedy
            answer is the right one.
        sure: the smallest probability of a token of the right answer.
        loss: of the right answer, mean over its tokens, in nats.
    """

    right: bool
    sure: float
    loss: float


def marks(learner: Learner, rows: Sequence[Example]) -> list[Mark]:
    """A mark for each row, in order."""
    found: dict[int, Mark] = {}
    for places, batch, logits in _forward(learner, rows):
        logs = logits.float().log_softmax(-1)  # [B, T-1, V]
        for i, place in enumerate(places):
            wanted = batch.y[i, 1:]
            learnt = wanted != IGNORE
            own, targets = logs[i][learnt], wanted[learnt]
            values = own.gather(1, targets[:, None])[:, 0]
            right = bool((own.argmax(-1) == targets).all())
            found[place] = Mark(right, float(values.min().exp()), -float(values.mean()))
    return [found[i] for i in range(len(rows))]


def log_probabilities(learner: Learner, rows: Sequence[Example]) -> list[Tensor]:
    """The next token's log-probabilities at each row's targets, [targets, V] in fp32 on the CPU, in order."""
    found: dict[int, Tensor] = {}
    for places, batch, logits in _forward(learner, rows):
        for i, place in enumerate(places):
            found[place] = logits[i][batch.y[i, 1:] != IGNORE].float().log_softmax(-1).cpu()
    return [found[i] for i in range(len(rows))]


def _forward(learner: Learner, rows: Sequence[Example]) -> Iterator[tuple[list[int], Batch, Tensor]]:
    """Places, batch and next-token logits [B, T-1, V] of rows of like length."""
    order = sorted(range(len(rows)), key=lambda i: len(_ids(rows[i])))
    size = learner.settings.evaluation_batch_size
    with evaluating(learner.model), learner.autocast():
        for start in range(0, len(order), size):
            places = order[start : start + size]
            batch = learner.collate([rows[i] for i in places])
            yield places, batch, learner.strategy.forward(learner.model, batch).logits[:, :-1]


def _ids(row: Example) -> Tensor:
    assert row.x is not None
    return row.x


class Distance:
    """KL(base ‖ model) of the next token, in nats, a mean over the tokens of some rows.

    Args:
        learner: whose model is the base as long as this is made.
        rows: new prompts: what is never learnt from. So many of them are looked at as there is room for.
    """

    def __init__(self, learner: Learner, rows: Sequence[Example]) -> None:
        self._rows: list[Example] = []
        self._base: list[Tensor] = []
        room = FEW
        for row in rows:
            logits = next(_forward(learner, [row]))[2]
            if logits.numel() > room:
                continue
            room -= logits.numel()
            self._rows.append(row)
            self._base.append(logits[0].float().log_softmax(-1).cpu())

    def __call__(self, learner: Learner) -> float:
        """How far the model is now; NaN without rows."""
        total, tokens = 0.0, 0
        for places, _, logits in _forward(learner, self._rows):
            for i, place in enumerate(places):
                base = self._base[place]
                now = logits[i, : len(base)].float().log_softmax(-1).cpu()
                total += float((base.exp() * (base - now)).sum())
                tokens += len(base)
        return max(0.0, total / tokens) if tokens else math.nan  # rounding would leave -1e-9
