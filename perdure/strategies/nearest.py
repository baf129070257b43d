"""Whose row is it, by how it looks: the mean features of each task's rows, in a network that no longer changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.models import objectives
from perdure.models.modes import looking
from perdure.strategies.identity import prompt_ends
from perdure.types import Batch, Context, Example, Objective

ROWS = 64  # of one forward pass
Serving = Callable[[], AbstractContextManager[Any]]


class Prototypes:
    """One vector a task; a row belongs to the task whose vector points most nearly where its own features do.

    Features are what the last linear layer of the model takes in; of a causal language model, their mean over the
    tokens of the prompt. Directions are those from the mean of all vectors: features of one network point much the
    same way, and what tells tasks apart is where they go from there. All tasks are seen through the same network,
    which must not change once the first vector was taken.

    Attributes:
        means: float32 [D] by task.
        counts: how many rows `add` has taken in, by task.
    """

    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def learn(self, ctx: Context, serving: Serving = nullcontext) -> None:
        """Take the mean over the rows of the task that has ended.

        Args:
            ctx: of the task.
            serving: puts the network in place.
        """
        rows = sorted(ctx.task.train, key=_length)
        with serving(), ctx.autocast():
            sums = [
                features(ctx.model, ctx.collate(rows[start : start + ROWS]), ctx.objective).sum(0)
                for start in range(0, len(rows), ROWS)
            ]
        if sums:
            self.means[ctx.task.name] = torch.stack(sums).sum(0) / len(rows)

    def add(self, task: str, found: Tensor) -> None:
        """Take more rows of a task into its mean.

        Args:
            task: whose rows they are.
            found: their features, [B, D].
        """
        count = self.counts.get(task, 0) + len(found)
        mean = self.means.get(task, torch.zeros_like(found[0])).to(found.device)
        self.means[task] = mean + (found - mean).sum(0) / count
        self.counts[task] = count

    def nearest(
        self, model: nn.Module, batch: Batch, objective: Objective, serving: Serving = nullcontext
    ) -> list[str]:
        """The task of each row; of equals the earliest; "" where no task has ended."""
        if not self.means:
            return ["" for _ in batch.examples]
        with serving():
            found = features(model, batch, objective)
        known = torch.stack([mean.to(found.device) for mean in self.means.values()])
        centre = known.mean(0)
        with torch.autocast(found.device.type, enabled=False):
            cosines = F.normalize(found - centre, dim=1) @ F.normalize(known - centre, dim=1).T  # [B, tasks]
        tasks = list(self.means)
        return [tasks[i] for i in cosines.argmax(1).tolist()]

    def state_dict(self) -> dict[str, Any]:
        """The vectors, and their order."""
        return {"tasks": list(self.means), "means": dict(self.means), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.means = {task: state["means"][task].clone() for task in state["tasks"]}
        self.counts = dict(state.get("counts", {}))  # of older states none was added to


def features(model: nn.Module, batch: Batch, objective: Objective) -> Tensor:
    """What the model's last linear layer takes in, in eval mode, without gradients: float32 [B, D].

    That is the output layer of a language model, else the last `nn.Linear` in order of definition; a model without
    any is described by its output. Labels only mark where a prompt ends.
    """
    layer = _last_linear(model)
    seen: list[Tensor] = []

    def look(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(next(iter((*args, *kwargs.values()))))

    hook = layer.register_forward_pre_hook(look, with_kwargs=True) if layer is not None else None
    try:
        with looking(model):
            logits = objectives.forward(model, batch).logits
    finally:
        if hook is not None:
            hook.remove()
    found = (seen[-1] if seen else logits).float()
    if objective != "causal_lm":
        return found.reshape(len(batch.examples), -1)
    found = found[:, found.shape[1] - batch.y.shape[1] :]  # a soft prompt stands before
    ends = prompt_ends(batch).to(found.device)
    inside = torch.arange(found.shape[1], device=found.device) <= ends[:, None]
    return (found * inside[..., None]).sum(1) / (ends + 1)[:, None]


def _last_linear(model: nn.Module) -> nn.Module | None:
    whole: Any = model
    base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    output: nn.Module | None = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if output is not None:
        return output
    # An adapter's layer counts as the one that it wraps, whose parts are no layers of their own.
    parts = {part for m in model.modules() if hasattr(m, "lora_A") for part in m.modules() if part is not m}
    layers = [m for m in model.modules() if m not in parts and isinstance(getattr(m, "base_layer", m), nn.Linear)]
    return layers[-1] if layers else None


def _length(row: Example) -> int:
    return 0 if row.x is None or row.x.dim() == 0 else row.x.shape[0]
