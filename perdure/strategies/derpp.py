"""Dark experience replay++: kept rows are trained on, and kept logits are matched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from perdure.errors import StrategyError
from perdure.memory import Buffer
from perdure.models.objectives import answers
from perdure.strategies.parts import parts
from perdure.strategies.quota import Unit
from perdure.strategies.rehearsal import Memory, Offer, Ratio, Rehearsal
from perdure.strategies.settings import number, whole
from perdure.strategies.swap import forward_with
from perdure.types import Batch, Context, Example, Output


class DERpp(Rehearsal):
    """loss(new) + alpha · mean ‖z(x₁) − z₁‖² + beta · loss(x₂), with x₁ and x₂ drawn apart from the memory.

    z₁ are the logits that the model had on x₁ at the end of its task, or with `offer` "step" right after the update
    of the step that it was kept from: in eval mode, at each target (of a causal language model, those that predict
    a learnt token). The mean is over the targets of x₁. Of the logits the `top_k` largest are kept and compared,
    with their places. For regression z is the prediction.

    Args:
        buffer: what keeps the rows; None makes one of `memory` and `capacity` from the run's seed.
        alpha: weight of the logits' term, at least 0.
        beta: weight of the kept rows' own loss, at least 0.
        ratio: rows of x₁, and as many of x₂, per new row, above 0; or "once": all of them for each, once an epoch.
        capacity: rows kept, or a size such as "2MB" or "20000 tokens", where no buffer is given.
        top_k: logits kept for each target, at least 1.
        memory: "reservoir", "balanced" (by task), "class-balanced" or "ring" (the newest of each task).
        unit: what `ratio` and `resample` count: "examples", or "tokens", which are targets.
        select: the policy that chooses rows, see `perdure.memory.POLICIES`; None lets the memory's own rule do.
        field: the column that says how difficult a row is.
        resample: the share of the kept rows that `select` chooses anew for each pass; None: rows are chosen once.
        offer: when new rows are offered to the memory: all of a "task" when it ends, or those of a "step" after its
            update, for a stream without tasks.

    Source: Buzzega et al. 2020 (arXiv:2004.07211). There logits are kept as they were when a row was met; here they
    are those of the end of the task, or of the end of the step.
    """

    name: ClassVar[str] = "derpp"
    summary: ClassVar[str] = "kept rows are trained on, and the logits kept with them are matched"
    needs: ClassVar[str] = "a memory of rows with their logits; no extra weights, no task ids"
    cost: ClassVar[str] = "a step has (1 + 2 · ratio) times the rows; one forward pass a row at the end of a task"
    source: ClassVar[str] = "Buzzega et al. 2020 (arXiv:2004.07211)"

    def __init__(
        self,
        buffer: Buffer | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        ratio: Ratio = 1.0,
        capacity: int | str = 1000,
        top_k: int = 32,
        memory: Memory = "reservoir",
        unit: Unit = "examples",
        select: str | None = None,
        field: str = "level",
        resample: float | None = None,
        offer: Offer = "task",
    ) -> None:
        super().__init__(buffer, ratio, capacity, memory, unit, select, field, resample, offer, quotas=2)
        self.alpha = number("derpp", "alpha", alpha)
        self.beta = number("derpp", "beta", beta)
        if self.alpha == self.beta == 0:
            raise StrategyError("derpp: with alpha 0 and beta 0 nothing is replayed; set one of them above 0")
        self.top_k = whole("derpp", "top_k", top_k, "logits")
        # Rows of x₁ are in the step for their logits alone, so that their own loss has no weight.
        self.weights = MappingProxyType({"derpp-logits": 0.0, "derpp-rows": beta})

    def mix(self, ctx: Context, examples: list[Example]) -> list[Example]:
        """The new rows, followed by x₁ and x₂."""
        groups = [("derpp-logits", self.alpha), ("derpp-rows", self.beta)]
        drawn = [(group, self.draw(ctx, examples, i)) for i, (group, weight) in enumerate(groups) if weight]
        return [*examples, *(row.but(source=self.name, group=group) for group, rows in drawn for row in rows)]

    def penalty(self, ctx: Context, batch: Batch, output: Output) -> dict[str, Tensor]:
        """alpha · Σ ‖z − z₁‖² over the targets of the rows of x₁."""
        chosen = [i for i, row in enumerate(batch.examples) if row.group == "derpp-logits"]
        if not chosen:
            return {}
        rows = tuple(batch.examples[i] for i in chosen)
        part = Batch(rows, torch.empty(0), batch.y[chosen], tuple(batch.counts[i] for i in chosen), 0)
        said = answers(Output(output.logits[chosen]), part, ctx.objective)  # [N, V]
        kept = torch.cat([row.extras["logits"] for row in rows]).to(said)  # [N, k]
        places = torch.cat([row.extras["places"] for row in rows]).to(said.device, torch.long)
        return {"derpp-logits": self.alpha * (said.gather(1, places) - kept).square().sum()}

    def remembered(self, ctx: Context, rows: Sequence[Example]) -> Iterator[Example]:
        """The rows with their logits."""
        return self._with_logits(ctx, rows)

    def prepare(self, ctx: Context) -> None:
        """Make the memory; one that was filled elsewhere must hold logits."""
        super().prepare(ctx)
        assert self.buffer is not None
        bare = [row.key for row in self.buffer if "logits" not in row.extras]
        if bare:
            raise StrategyError(
                f"derpp: the buffer holds rows without logits ({bare[0]!r} is one); start with an empty one"
            )

    def _with_logits(self, ctx: Context, rows: Sequence[Example]) -> Iterator[Example]:
        for part in parts(rows):  # in the rows' own order, which a ring keeps by
            batch = ctx.collate(part)
            found = answers(forward_with(ctx, {}, batch), batch, ctx.objective)
            # A regression has no largest outputs to choose from.
            k = found.shape[1] if ctx.objective == "regression" else min(self.top_k, found.shape[1])
            best = found.topk(k)
            sizes = list(batch.counts) if ctx.objective == "causal_lm" else [1] * len(part)
            kept, places = best.values.cpu().split(sizes), best.indices.cpu().to(torch.int32).split(sizes)
            for row, logits, at in zip(part, kept, places, strict=True):
                yield row.but(extras={**row.extras, "logits": logits, "places": at})
