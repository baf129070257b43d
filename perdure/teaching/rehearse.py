"""What goes into each step of a lesson beside it: rows of earlier lessons, and of the general probe's training
side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from perdure.order import prioritiser
from perdure.strategies import Strategy
from perdure.teaching.packing import packed
from perdure.types import IGNORE, Batch, Context, Example, Output

EARLIER, GENERAL = "earlier", "general"


class Rehearsed(Strategy):
    """Replay of two sorts of rows, each a group of its own, so that its share of the loss does not hang on its
    size.

    A step draws from each sort the rows that came least often in this lesson, among equals those with the smallest
    keyed priority: what is drawn hangs on the lesson, the step and the rows alone. Half of the earlier ones are
    those that the model is least sure of.

    Args:
        earlier: rows of earlier lessons in a step.
        general: rows of the probe's training side in a step.
        anchor: weight of KL(base ‖ model) on the general rows; their answers themselves are not learnt.
    """

    weights = MappingProxyType({GENERAL: 0.0})
    name = "rehearsed"
    summary = "rows of earlier lessons and of the general probe in every step of a lesson"

    def __init__(self, earlier: int, general: int, anchor: float) -> None:
        self.counts = {EARLIER: earlier, GENERAL: general}
        self.rows: dict[str, Sequence[Example]] = {EARLIER: (), GENERAL: ()}
        self._least_sure: Sequence[Example] = ()
        self._orders: dict[str, list[Example]] = {}
        self._step, self._times = 0, 1
        self._base: dict[str, Tensor] = {}
        self.anchor = anchor
        self.packs = False  # whether rows may share a line in a step

    def begin(
        self, lesson: str, seed: int, earlier: Sequence[Example], sure: Sequence[float], times: int = 1
    ) -> None:
        """Before a lesson: its key, the rows of earlier ones, how sure the model is of each, times as many rows."""
        self.rows[EARLIER] = earlier
        self._times = times
        self.focus(sure)
        self._orders, self._step = {}, 0
        for sort, rows in self.rows.items():
            rank = prioritiser(seed, "rehearse", lesson, sort)
            self._orders[sort] = sorted(rows, key=lambda row: rank(row.key))

    def focus(self, sure: Sequence[float]) -> None:
        """How sure the model is of each row of earlier lessons now; half of what is drawn are the least sure."""
        earlier = self.rows[EARLIER]
        worst = sorted(range(len(earlier)), key=lambda i: (sure[i], earlier[i].key))
        self._least_sure = [earlier[i] for i in worst[: self._times * self.counts[EARLIER] // 2]]

    def mix(self, ctx: Context, examples: list[Example]) -> list[Example]:
        """The lesson's rows, and those that are drawn for this step."""
        found = list(examples)
        for sort, count in self.counts.items():
            chosen = list(self._least_sure) if sort == EARLIER else []
            taken = {row.key for row in chosen}
            others = [row for row in self._orders[sort] if row.key not in taken]
            wanted = min(self._times * count - len(chosen), len(others))
            start = self._step * wanted
            chosen += [others[(start + i) % len(others)] for i in range(wanted)]
            found += [row.but(source=self.name, group=sort) for row in chosen]
        self._step += 1
        return found

    def hold(self, rows: Sequence[Example], base: Sequence[Tensor]) -> None:
        """The probe's training side, and the base's log-probabilities at each row's targets, [targets, V]."""
        self.rows[GENERAL] = tuple(rows)
        self._base = {row.key: logs for row, logs in zip(rows, base, strict=True)}

    def choose(self, rows: Sequence[Example]) -> None:
        """Draw from these of the rows that are held."""
        self.rows[GENERAL] = tuple(rows)

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        """The model's forward pass; in a step, of rows that share lines where that saves padding."""
        found = packed(model, batch) if self.packs and model.training else None
        return super().forward(model, batch) if found is None else found

    def penalty(self, ctx: Context, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """KL(base ‖ model) of the next token, summed over the targets of the general rows, times its weight."""
        places = [i for i, row in enumerate(batch.examples) if row.group == GENERAL]
        if not places:
            return {}
        rows = torch.tensor(places, device=batch.y.device)
        learnt = batch.y[rows, 1:] != IGNORE
        which, where = learnt.nonzero(as_tuple=True)
        # One look-up for all: each one's gradient would be a block of zeros as large as all logits.
        now = output.logits[rows[which], where].float().log_softmax(-1)  # [targets, V]
        base = torch.cat([self._base[batch.examples[i].key] for i in places]).to(now.device)
        parts = (base.exp() * (base - now)).split(learnt.sum(1).tolist())
        return {GENERAL: self.anchor * torch.stack([part.sum() for part in parts]).sum()}

    def bookmark(self) -> int:
        """The step."""
        return self._step

    def turn_back(self, bookmark: int) -> None:
        """Draw for that step again."""
        self._step = bookmark
