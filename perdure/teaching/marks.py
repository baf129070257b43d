"""How right a model is on some rows, and how far it has gone from another: one forward pass, nothing generated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from perdure.evaluation.score import evaluating
from perdure.training.learner import Learner
from perdure.types import IGNORE, Batch, Example

FEW = 1 << 24  # numbers that the base's probabilities may take
# What a batch costs beside its tokens, in tokens: a processor soon has enough to do, others do not.
OF_A_BATCH, ELSEWHERE = 96, 4096

Watch = Callable[[Example, Tensor], None]


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


def marks(learner: Learner, rows: Sequence[Example], watch: Watch | None = None) -> list[Mark]:
    """A mark for each row, in order; `watch` is shown each row with its next-token logits [T-1, V]."""
    found: dict[int, Mark] = {}
    for places, batch, logits in _forward(learner, rows):
        for i, place in enumerate(places):
            if watch is not None:
                watch(rows[place], logits[i, : len(_ids(rows[place])) - 1])
            wanted = batch.y[i, 1:]
            learnt = wanted != IGNORE
            own, targets = logits[i][learnt].float().log_softmax(-1), wanted[learnt]  # [targets, V]
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
    fixed = OF_A_BATCH if learner.device.type == "cpu" else ELSEWHERE
    sizes = cut(tuple(len(_ids(rows[i])) for i in order), learner.settings.evaluation_batch_size, fixed)
    with evaluating(learner.model), learner.autocast():
        for size in sizes:
            places, order = order[:size], order[size:]
            batch = learner.collate([rows[i] for i in places])
            yield places, batch, learner.strategy.forward(learner.model, batch).logits[:, :-1]


@lru_cache(maxsize=64)
def cut(lengths: tuple[int, ...], most: int, fixed: int) -> tuple[int, ...]:
    """How many rows go into each batch, so that padding and batches together cost least.

    Args:
        lengths: of the rows, rising.
        most: rows in a batch.
        fixed: what a batch costs beside its tokens, padding counted, in tokens.

    Example:
        >>> cut((4, 4, 5, 40), 64, 96)
        (3, 1)
        >>> cut((4, 4, 5, 40), 64, 200)
        (4,)
    """
    best = [(0, 0)]  # of the first so many rows: the cost, and the size of the last batch
    for end, longest in enumerate(lengths, start=1):
        sizes = range(1, min(most, end) + 1)
        best.append(min((best[end - size][0] + fixed + size * longest, size) for size in sizes))
    found, end = list[int](), len(lengths)
    while end:
        found.append(best[end][1])
        end -= found[-1]
    return tuple(reversed(found))


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
        self._base: dict[str, Tensor] = {}  # by the row's key
        room = FEW
        for row in rows:
            logits = next(_forward(learner, [row]))[2]
            if logits.numel() > room:
                continue
            room -= logits.numel()
            self._rows.append(row)
            self._base[row.key] = logits[0].float().log_softmax(-1).cpu()

    def __call__(self, learner: Learner) -> float:
        """How far the model is now; NaN without rows."""
        return self.beside(learner, self._rows)[1]

    def beside(self, learner: Learner, rows: Sequence[Example]) -> tuple[list[Mark], float]:
        """The marks of rows, and how far the model is on those of them that are its own: one look for both."""
        found: dict[str, float] = {}

        def watch(row: Example, logits: Tensor) -> None:
            if row.key in self._base:
                base = self._base[row.key]
                now = logits.float().log_softmax(-1).cpu()
                found[row.key] = float((base.exp() * (base - now)).sum())

        marked = marks(learner, rows, watch)
        return marked, self._mean(found)

    def _mean(self, found: Mapping[str, float]) -> float:
        tokens = sum(len(base) for key, base in self._base.items() if key in found)
        total = math.fsum(found[key] for key in self._base if key in found)
        return max(0.0, total / tokens) if tokens else math.nan  # rounding would leave -1e-9
