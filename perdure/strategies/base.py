"""The interface of every strategy: hooks that add nothing unless a method fills them in.

A strategy returns values. It sees neither the trainer nor the optimizer, and never writes to a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from perdure.errors import StrategyError
from perdure.models import objectives
from perdure.types import Batch, Context, Example, Objective, Output, Phase, Task

# Stands for all rows of a step where a penalty is given by group.
STEP = ""
# Stands, in `usage`, for weights that no task owns yet.
FREE = "free"
Penalty = Tensor | float | Mapping[str, Tensor]


class Strategy:
    """How not to forget. Subclass it and override the hooks that the method needs.

    Class attributes:
        name: as used on the command line and in configs.
        summary: one line for `perdure list strategies`.
        needs: what it holds or has to be told, for `perdure list strategies` and its page.
        cost: what it adds to training, for the same.
        source: where it comes from.
        wants_task_ids: whether inference needs to be told the task; a row's task is `example.task`.
        merges: whether `after_task` leaves other weights in the model than were trained.
        infers: whether `identify` can do without being told, for the objective at hand.
        isolates: whether a finished task's weights never change again, so that rehearsing its rows trains nothing.
        wants_task_gradient: whether `observe` must see the loss's gradient without penalties that go through
            autograd; their gradients are then taken in a pass of their own.
        bounds_gradient: whether `gradient` bounds what was there before it: in a chain none may add to it after.
        renames: whether each task trains other parameters than the last, so that nothing may be held by name.
        adds_to_forward: whether what it adds takes part in the model's own forward pass, so that the model with its
            first weights is no longer the model that the stream began with.
        freezes: whether it decides that weights of the model are trained no more.
        owns_training: whether it decides alone on what is trained, so that a member that freezes has no say.
        virtual_tokens: positions of a language model that it takes before every row, which text cannot have.
        needs_boundaries: whether it protects only what came before the end, or the beginning, of a task, so that a
            stream of rows without tasks would be plain training; so, unless it says otherwise, where it does
            anything when a task ends.
        weights: weight of each group of rows in the loss; a group that is not named weighs 1.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    needs: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    source: ClassVar[str] = ""
    wants_task_ids: bool = False
    merges: bool = False
    infers: bool = True
    isolates: bool = False
    wants_task_gradient: bool = False
    bounds_gradient: bool = False
    renames: bool = False
    adds_to_forward: bool = False
    freezes: bool = False
    owns_training: bool = False
    virtual_tokens: int = 0
    _claimed: bool = False
    weights: Mapping[str, float] = MappingProxyType({})

    @property
    def needs_boundaries(self) -> bool:
        """Whether a stream without tasks would leave it doing nothing; see the class."""
        return type(self).after_task is not Strategy.after_task

    def check(self, model: nn.Module, objective: Objective) -> None:
        """Before any training: StrategyError where the method makes no sense for the model or the objective."""

    def claim(self) -> None:
        """Begin to serve a training; what it holds belongs to that one.

        Raises:
            StrategyError: it served another.
        """
        if self._claimed:
            raise StrategyError(
                f"{self.name or type(self).__name__}: this object has served another training, whose memory "
                "or anchors it may still hold; make a new one for each"
            )
        self._claimed = True

    def __repr__(self) -> str:
        known = [name for name in inspect.signature(type(self).__init__).parameters if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in known)})"

    def prepare(self, ctx: Context) -> None:
        """Before a task: grow, snapshot, freeze. The shape of what it makes may depend on config and index only."""

    def phases(self, task: Task, plan: Sequence[Phase]) -> Sequence[Phase]:
        """The stretches of training within this task, given the planned ones."""
        return plan

    def mix(self, ctx: Context, examples: list[Example]) -> list[Example]:
        """Once an optimizer step, before collation: the step's rows, perhaps with others added."""
        return examples

    def bookmark(self) -> Any:
        """What `mix` changes in the strategy itself, to be given to `turn_back`; it is asked for at every step."""
        return None

    def turn_back(self, bookmark: Any) -> None:
        """Undo a `mix` whose step was not taken."""

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        """The model's forward pass, in training and in evaluation."""
        return objectives.forward(model, batch)

    @property
    def forwards_plainly(self) -> bool:
        """Whether `forward` is the model's own and nothing more."""
        return type(self).forward is Strategy.forward

    def penalty(self, ctx: Context, batch: Batch, output: Output) -> Penalty:
        """A sum over the micro-batch's targets, added to the loss after division by the step's targets.

        A mapping gives such sums by group of rows, each divided by the targets of its group in the step.
        """
        return 0.0

    def observe(self, ctx: Context, batches: Sequence[Batch]) -> None:
        """Once a step, after backward, before any `gradient` hook: `.grad` is there to be looked at.

        It is the loss's own if `wants_task_gradient`, else that of loss and penalties.
        """

    def gradient(self, ctx: Context, batches: Sequence[Batch]) -> None:
        """Once a step, after backward and before clipping: change `.grad` in place.

        A penalty in closed form belongs here; report its value with `ctx.log("penalty", value)`.
        """

    @property
    def wants_outputs(self) -> bool:
        """Whether `after_step` looks at outputs, which are then held to the end of the step."""
        return type(self).after_step is not Strategy.after_step

    def after_step(self, ctx: Context, batches: Sequence[Batch], outputs: Sequence[Output]) -> None:
        """After the optimizer's update; outputs are detached, and none are given if not wanted."""

    def after_phase(self, ctx: Context, phase: Phase) -> None:
        """After each phase of a task."""

    def after_task(self, ctx: Context) -> None:
        """After a task: estimate importance, fill memory, prune, merge."""

    def identify(self, model: nn.Module, batch: Batch) -> list[str]:
        """The task of each row where nobody tells it; only asked of a strategy with `wants_task_ids`.

        Labels must not be looked at. In eval mode and without gradients.
        """
        return [row.task for row in batch.examples]

    def serving(self, model: nn.Module, task: str) -> AbstractContextManager[Any] | None:
        """A context in which the model, called as it is, answers for a task: generation then keeps a cache.

        None where only `forward` can answer; generation then goes through that, at every token anew.
        """
        return nullcontext() if type(self).forward is Strategy.forward else None

    def usage(self, model: nn.Module) -> dict[str, dict[str, int]]:
        """Capacity: how many weights of each layer belong to each task, `FREE` ones included; empty if shared."""
        return {}

    def export(self, model: Any, folder: Path) -> None:
        """Write the trained model for others to load: as `save_pretrained` does, unless the method needs more."""
        model.save_pretrained(folder)

    def kept(self) -> int:
        """How many rows of earlier tasks it holds now."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """All that the strategy holds: tensors and plain values, nested in dicts and lists."""
        return {}

    def regrow(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Add what a saved state has parameters for, where `prepare` could not know; they are loaded next."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the strategy that was saved; `prepare` has been called for the tasks so far."""
