"""What the stages did to the weights: how far each moved them, and how much of the capacity each task has."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perdure.models.adapters import moving
from perdure.strategies.freeze import stack
from perdure.training.learner import Learner

# Numbers that are compared at a time, in double precision.
CHUNK = 1 << 20
EMBEDDINGS, OTHER = "embeddings", "other"


class Changes:
    """Drift and usage by stage.

    Drift is measured over every parameter that is or was trainable: ‖θ_t − θ_{t−1}‖ and ‖θ_t − θ_0‖, and both
    relative to the norm of what they start from. The weights of a group stand together under one norm, above and
    below: a LoRA matrix B, which starts at 0, is divided by the norm of it and its A. A parameter that was not
    there before, or had another shape, is counted as new and left out of the norms. Buffers are left out.

    Attributes:
        start: θ_0 by name, on the CPU.
        before: θ_{t−1}, the same; None where nobody knows it.
        drift: of each stage what `compare` gave; None where it is not known where a stage began.
        usage: of each stage what `Strategy.usage` gave; empty where weights are shared.
    """

    def __init__(self) -> None:
        self.start: Mapping[str, Tensor] = {}
        self.before: Mapping[str, Tensor] | None = None
        self.drift: list[dict[str, Any] | None] = []
        self.usage: list[dict[str, dict[str, int]]] = []
        self._group_of: Callable[[str], str] = grouping(nn.Module())

    def begin(self, model: nn.Module, start: Mapping[str, Tensor] | None = None) -> None:
        """Take up θ_0, and the groups of a model that no strategy has changed yet.

        Args:
            model: as it was built.
            start: θ_0, on the CPU; None copies what is trainable now.
        """
        self._group_of = grouping(model)
        self.start = copied(moving(model)) if start is None else start

    def begin_stage(self, learner: Learner, again: bool = False) -> None:
        """Take up θ_{t−1}, before the strategy prepares, which may put other values in its place.

        Args:
            learner: as the stage before has left it.
            again: whether the stage begins from θ_0, as the first one does.
        """
        self.before = self.start if again or not learner.trained else copied(_trained(learner))

    def measure(self, stage: int, learner: Learner) -> dict[str, Any] | None:
        """Record a stage, and return its drift if it is known where the stage began.

        Args:
            stage: its number, from 1; what was recorded of it and later ones is forgotten.
            learner: at the stage's end.
        """
        found = None
        if self.before is not None:
            found = compare(_trained(learner), self.before, self.start, self._group_of)
        used = learner.strategy.usage(learner.model)
        counts = {layer: {task: int(n) for task, n in by_task.items()} for layer, by_task in used.items()}
        # A version that did not measure may have trained the stages before.
        missing = stage - 1 - len(self.drift)
        self.drift = [*self.drift[: stage - 1], *[None] * missing, found]
        self.usage = [*self.usage[: stage - 1], *[{}] * missing, counts]
        return found

    def results(self) -> dict[str, Any]:
        """What results.json holds of it."""
        return {"drift": list(self.drift), "usage": list(self.usage) if any(self.usage) else None}

    def state_dict(self) -> dict[str, Any]:
        """What was measured; not θ_0."""
        return {"drift": list(self.drift), "usage": list(self.usage)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what was saved; an older version has saved nothing."""
        self.drift, self.usage = list(state.get("drift", ())), list(state.get("usage", ()))


@dataclasses.dataclass(slots=True)
class _Sums:
    """Over the values of a group: how many, how many without a counterpart, squares of change and counterpart."""

    values: int = 0
    new: int = 0
    change: float = 0.0
    size: float = 0.0

    def add(self, value: Tensor, other: Tensor | None) -> None:
        self.values += value.numel()
        if other is None or other.shape != value.shape:
            self.new += value.numel()
            return
        for one, two in zip(value.detach().flatten().split(CHUNK), other.flatten().split(CHUNK), strict=True):
            here, there = one.cpu().double(), two.cpu().double()
            self.change += float(torch.linalg.vector_norm(here - there)) ** 2
            self.size += float(torch.linalg.vector_norm(there)) ** 2

    def norms(self) -> tuple[float, float]:
        """‖change‖ and its quotient by the counterpart's norm; NaN where that is 0, or too little has one.

        Too little: most of the values are new, or all that moved are, for old ones that are frozen say nothing.
        """
        if 2 * self.new > self.values or (self.new and not self.change):
            return math.nan, math.nan
        return math.sqrt(self.change), math.sqrt(self.change / self.size) if self.size else math.nan


def _trained(learner: Learner) -> dict[str, Tensor]:
    """Parameters that are or were trainable, by name."""
    return {name: p for name, p in learner.model.named_parameters() if name in learner.trained}


def compare(
    now: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    group_of: Callable[[str], str],
) -> dict[str, Any]:
    """How far parameters have moved, in sum and by group.

    Returns:
        "total" and "groups", by name. Each has "weights" (how many values), "new" (how many of them `before` has
        not), "change" and "relative_change" (since `before`), "new_since_start", "change_from_start" and
        "relative_change_from_start".
    """
    groups: dict[str, tuple[_Sums, _Sums]] = {}
    for name, value in now.items():
        sums = groups.setdefault(group_of(name), (_Sums(), _Sums()))
        for one, other in zip(sums, (before, start), strict=True):
            one.add(value, other.get(name))
    whole = [_added(one) for one in zip(*groups.values(), strict=True)] or [_Sums(), _Sums()]
    return {"total": _entry(*whole), "groups": {name: _entry(*sums) for name, sums in groups.items()}}


def _added(parts: Sequence[_Sums]) -> _Sums:
    return _Sums(*(sum(values) for values in zip(*(dataclasses.astuple(part) for part in parts), strict=True)))


def _entry(since: _Sums, from_start: _Sums) -> dict[str, Any]:
    change, relative = since.norms()
    whole, relative_whole = from_start.norms()
    return {
        "weights": since.values,
        "new": since.new,
        "change": change,
        "relative_change": relative,
        "new_since_start": from_start.new,
        "change_from_start": whole,
        "relative_change_from_start": relative_whole,
    }


def grouping(model: nn.Module) -> Callable[[str], str]:
    """The group of a parameter's name: "block 3" of the model's stack, "embeddings", or "other".

    A model without a stack is grouped by its children. A child that is added to a model later, as a progressive
    network's columns are, is a group of its own.
    """
    blocks = stack(model)
    inside = {module for block in blocks for module in block.modules()}
    places: dict[str, str] = {}
    for name, module in model.named_modules():
        if module in blocks:
            places[name] = f"block {name.rpartition('.')[2]}"
        elif isinstance(module, nn.Embedding) and module not in inside:
            places[name] = EMBEDDINGS
    children = {name for name, _ in model.named_children()} if blocks else set()

    def group_of(name: str) -> str:
        path = name.split(".")
        for length in range(len(path) - 1, 0, -1):
            if (place := ".".join(path[:length])) in places:
                return places[place]
        return OTHER if len(path) == 1 or path[0] in children else path[0]

    return group_of


def copied(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU."""
    with torch.no_grad():
        return {name: value.detach().to("cpu", copy=True) for name, value in values.items()}
