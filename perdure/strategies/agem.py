"""Averaged gradient episodic memory: a step may not raise the loss on a draw from the memory, to first order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, ClassVar

from torch import Tensor

from perdure.order import priority
from perdure.strategies.episodic import Episodic, gradient_vector, products, put_gradient
from perdure.strategies.settings import whole
from perdure.types import Batch, Context


class AGEM(Episodic):
    """If the gradient g points against the gradient r on rows drawn from the memory, that part is taken out.

    g̃ = g − (g·r / r·r) r where g·r < 0. The rows are drawn anew in each step, uniformly over those kept of all past
    tasks, without replacement. All trainable weights are one vector. The projection is made before clipping.

    Args:
        per_task: rows kept of each task.
        sample: rows drawn in each step.

    Source: Chaudhry et al. 2019, "Efficient Lifelong Learning with A-GEM" (arXiv:1812.00420).
    """

    name: ClassVar[str] = "agem"
    summary: ClassVar[str] = "what of the gradient would raise the loss on rows drawn from memory is taken out"
    needs: ClassVar[str] = "per_task rows of each task; no extra weights between steps, no task ids"
    cost: ClassVar[str] = "a step has one more backward pass, over sample rows"
    source: ClassVar[str] = "Chaudhry et al. 2019 (arXiv:1812.00420)"

    def __init__(self, per_task: int = 64, sample: int = 32) -> None:
        super().__init__(per_task)
        self.sample = whole("agem", "sample", sample, "rows")
        self._draws = 0

    def gradient(self, ctx: Context, batches: Sequence[Batch]) -> None:
        """Project the gradient."""
        kept = [row for name, rows in self.rows.items() if name != ctx.task.name for row in rows]
        if not kept:
            return
        draw = Random(priority(ctx.seed, "agem", self._draws, key=""))
        self._draws += 1
        reference = self.reference(ctx, draw.sample(kept, min(self.sample, len(kept))), batches)
        gradient = gradient_vector(ctx.model)
        projected = project_agem(gradient, reference)
        ctx.log("projected", float(projected is not gradient))
        if projected is not gradient:
            put_gradient(ctx.model, projected)

    def bookmark(self) -> int:
        """The number of draws."""
        return self._draws

    def turn_back(self, bookmark: int) -> None:
        """Count as before."""
        self._draws = bookmark

    def state_dict(self) -> dict[str, Any]:
        """The kept rows and the number of draws."""
        return {**super().state_dict(), "draws": self._draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore both."""
        super().load_state_dict(state)
        self._draws = state["draws"]


def project_agem(gradient: Tensor, reference: Tensor) -> Tensor:
    """The gradient without the part that points against the reference; as it is where there is none.

    Args:
        gradient: g [P].
        reference: r [P], the gradient on the rows drawn from memory.

    Returns:
        g − (g·r / r·r) r [P] where g·r < 0, else g itself; in the gradient's type.
    """
    (length,), (against,) = (values.flatten() for values in products(gradient, reference[None]))
    if against >= 0:
        return gradient
    return gradient - (against / length).to(gradient.device, gradient.dtype) * reference.to(gradient.dtype)
