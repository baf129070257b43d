"""Learning without forgetting: the model as the last task left it goes on teaching what it says of the new rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.models.adapters import moving
from perdure.models.objectives import answers
from perdure.strategies.base import Strategy
from perdure.strategies.settings import number
from perdure.strategies.swap import forward_with
from perdure.types import Batch, Context, Output


class LwF(Strategy):
    """loss + strength · mean over targets of T² · KL(teacher ‖ student), from the second task on.

    The teacher is the model as the task before left it, in eval mode, on the very rows of the step: of a causal
    language model where a token is learnt. It is the same network with the old values of what is trained, so that
    with adapters no second base is held. In a regression it is ½(student − teacher)²: both are Gaussians.

    A classifier is distilled over the classes that earlier tasks had: a class that is yet to be learnt has no
    probability under the teacher, and must not be taught away.

    Args:
        strength: weight of the term, at least 0.
        temperature: T, above 0.

    Attributes:
        teacher: old values by name; empty until the first task has ended.
        classes: those of earlier tasks; None where the objective has none.

    Source: Li & Hoiem 2016 (arXiv:1606.09282); T²: Hinton et al. 2015 (arXiv:1503.02531).
    """

    name: ClassVar[str] = "lwf"
    summary: ClassVar[str] = "the model before the task goes on teaching what it says of the new rows"
    needs: ClassVar[str] = "one copy of the trainable weights; no stored rows, no task ids"
    cost: ClassVar[str] = "one more forward pass a step"
    source: ClassVar[str] = "Li & Hoiem 2016 (arXiv:1606.09282)"

    def __init__(self, strength: float = 1.0, temperature: float = 2.0) -> None:
        self.strength = number("lwf", "strength", strength)
        self.temperature = number("lwf", "temperature", temperature, above=True)
        self.teacher: dict[str, Tensor] = {}
        self.classes: list[int] | None = None

    def prepare(self, ctx: Context) -> None:
        """What is trained from this task on was the teacher's too, as it is now."""
        if self.teacher:
            new = {name: value for name, value in moving(ctx.model).items() if name not in self.teacher}
            self.teacher |= {name: value.detach().clone() for name, value in new.items()}

    def penalty(self, ctx: Context, batch: Batch, output: Output) -> Tensor | float:
        """Strength times the distillation term, summed over the batch's targets."""
        if not self.teacher or self.strength == 0:
            return 0.0
        device = output.logits.device
        self.teacher = {name: value.to(device) for name, value in self.teacher.items()}  # no copy where it is there
        taught = answers(forward_with(ctx, self.teacher, batch), batch, ctx.objective)
        said = answers(output, batch, ctx.objective)
        if ctx.objective == "regression":
            return self.strength * 0.5 * (said - taught).square().sum()
        if self.classes is not None:
            columns = torch.tensor(self.classes, device=device)
            said, taught = said[:, columns], taught[:, columns]
        return self.strength * distillation(said, taught, self.temperature) * len(said)

    def after_task(self, ctx: Context) -> None:
        """Keep what is trained as it is now, and the classes that were met."""
        self.teacher = {name: value.detach().clone() for name, value in moving(ctx.model).items()}
        targets = [row.y for row in ctx.task.train if row.y is not None]
        if ctx.objective == "classification" and not any(y.is_floating_point() for y in targets):
            self.classes = sorted({*(self.classes or ()), *(int(y) for y in targets)})

    def state_dict(self) -> dict[str, Any]:
        """The teacher's values and the classes."""
        return {"teacher": dict(self.teacher), "classes": self.classes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore both."""
        self.teacher = {name: value.clone() for name, value in state["teacher"].items()}
        self.classes = state["classes"]


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of the softened distributions, mean over rows.

    Args:
        student: logits [B, V].
        teacher: logits [B, V]; no gradient flows into them.
        temperature: T; T² keeps the gradient's size whatever T is (as T grows, the value tends to ‖Δz‖² / 2V with
            the logits' differences Δz centred).

    Returns:
        A scalar; 0 for no rows.
    """
    if not len(student):
        return student.sum()
    said = (student / temperature).log_softmax(-1)
    taught = (teacher.detach() / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(said, taught, reduction="batchmean", log_target=True)
