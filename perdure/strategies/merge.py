"""What MagMax, TIES, EMA and SLAO share: weights that are served apart from those that are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perdure.errors import StrategyError
from perdure.strategies.base import Strategy
from perdure.types import Context

Start = Literal["last", "merged", "base"]
STARTS = ("last", "merged", "base")


class Merging(Strategy):
    """After a task the model holds merged weights, which are evaluated, exported and generated with.

    At the next `prepare` it gets the weights that training goes on from. One task's merge is that task's weights.
    Parameters that are trainable in a task take part in its merge, buffers never do.

    Attributes:
        start: what the next task starts from: the weights that were trained "last", the "merged" ones, or the
            "base" weights from before all training.
        tasks: how many tasks have ended.
        base: the weights before all training, by name; empty where neither the rule nor `start` needs them.
        last: between two tasks, with `start` "last": the weights that were trained last, by name.
        held: the rule's running values, by kind and name; as many for any number of tasks.
    """

    merges: bool = True
    wants_base: bool = False

    def __init__(self, start: Start) -> None:
        if start not in STARTS:
            raise StrategyError(f"{self.name}: start must be one of {', '.join(STARTS)}, got {start!r}")
        self.start: Start = start
        self.tasks = 0
        self.base: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.held: dict[str, dict[str, Tensor]] = {}

    def fold(self, trained: Mapping[str, Tensor]) -> None:
        """Take a task's weights, copies by name, into the running values."""
        raise NotImplementedError

    def merged(self, name: str) -> Tensor:
        """The merged value of a parameter, from the running values."""
        raise NotImplementedError

    def takes_part(self, name: str) -> bool:
        """Whether a trainable parameter of that name is merged."""
        return True

    def prepare(self, ctx: Context) -> None:
        """Put the weights that training starts from into the model."""
        own = self._own(ctx.model)
        if self.wants_base or self.start == "base":
            new = {name: parameter for name, parameter in own.items() if name not in self.base}
            self.base |= copies(new)
        # A resumed run loads weights and state after this, so what is written then does not matter.
        write(own, {"last": self.last, "base": self.base}.get(self.start, {}))
        self.last = {}

    def after_task(self, ctx: Context) -> None:
        """Merge what was trained, and put the result into the model."""
        own = self._own(ctx.model)
        for held in (self.base, *self.held.values()):  # loaded, and not moved since
            held.update({name: value.to(own[name].device) for name, value in held.items() if name in own})
        self.tasks += 1
        self.fold(copies(own))
        if self.tasks > 1:
            self.last = copies(own) if self.start == "last" else {}
            write(own, {name: self.merged(name) for name in own})

    def _own(self, model: nn.Module) -> dict[str, Tensor]:
        return {n: p for n, p in model.named_parameters() if p.requires_grad and self.takes_part(n)}

    def state_dict(self) -> dict[str, Any]:
        """Base, running values, and between two tasks the weights that were trained last."""
        return {
            "tasks": self.tasks,
            "base": dict(self.base),
            "last": dict(self.last),
            "held": {kind: dict(values) for kind, values in self.held.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore all of it."""
        self.tasks = state["tasks"]
        self.base = {name: value.clone() for name, value in state["base"].items()}
        self.last = {name: value.clone() for name, value in state["last"].items()}
        self.held = {kind: {n: v.clone() for n, v in values.items()} for kind, values in state["held"].items()}


def copies(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies in float32 at least: sums and averages of many tasks would be rounded away in bf16."""
    return {
        name: value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
        for name, value in values.items()
    }


def write(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Set the parameters that there are values for."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name in values:
                parameter.copy_(values[name])
