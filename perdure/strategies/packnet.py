"""PackNet: each task trains the weights that no earlier one owns, keeps the best of them, and frees the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from perdure.errors import StrategyError
from perdure.models import objectives
from perdure.strategies.base import FREE, Strategy
from perdure.strategies.identity import Rule, check_rule, forward_by_task, surest
from perdure.strategies.masks import apply_mask, masked, packable, prune, shown, write_masks
from perdure.strategies.nearest import Prototypes
from perdure.strategies.settings import number, whole
from perdure.types import Batch, Context, Example, Objective, Output, Phase, Task

__all__ = ["PackNet", "apply_mask"]

MOST_TASKS = 255  # an owner is one byte, and 0 stands for a free weight
ROWS = 32  # of one pass for |w·∂L/∂w|


class PackNet(Strategy):
    """Train a task on the free weights, prune, retrain what is kept, and freeze it.

    Layer by layer, of the n weights that no earlier task owns, the ⌊prune_percentage · n⌋ of lowest score are set
    to zero and left to later tasks; the rest are the task's own from then on. What is packed are the trainable
    weights of linear (LoRA's factors too), convolution, recurrent and attention layers. All else (biases, norms,
    running statistics, embeddings, and an output layer that shares an embedding's weights) is trained in the first
    task only. A row of task k is answered with the weights of tasks 1 to k, all others zero; one of a task that was
    not begun by the network as it is.

    Args:
        prune_percentage: the share that is pruned, between 0 and 1; it counts as the decimal that was written.
        use_magnitude_pruning: the score of a weight: its magnitude |w|, or if False |w·∂L/∂w|, with L the loss over
            the task's rows, in eval mode.
        retrain_epochs: epochs after pruning, beside the planned ones; None takes half as many, rounded up.
        prune_to: what a pruned weight becomes: "zero"; or "start", what it was before the first task, for a model
            that was trained before. That then stands for zero throughout, and the distance from it for |w|.
        infer: whose task a row is where nobody tells: "nearest", of those that have ended, by its features in the
            first task's network (see `Prototypes`), or "surest", the one whose network is (see `surest`).

    Source: Mallya & Lazebnik 2018 (arXiv:1711.05769); |w·∂L/∂w|: Molchanov et al. 2017 (arXiv:1611.06440); back to
    the start instead of zero: Ansell et al. 2022 (arXiv:2110.07560).
    """

    name: ClassVar[str] = "packnet"
    wants_outputs = False
    summary: ClassVar[str] = (
        "each task keeps the best of the weights that are free, and the rest are left to later tasks"
    )
    needs: ClassVar[str] = (
        "1 byte a weight, while a task is trained 1 value and 1 byte more; no stored rows; task ids, told or "
        "inferred"
    )
    cost: ClassVar[str] = "half as many steps again, to retrain; two passes over the weights a step"
    source: ClassVar[str] = "Mallya & Lazebnik 2018 (arXiv:1711.05769)"
    wants_task_ids = True
    isolates = True

    def __init__(
        self,
        prune_percentage: float = 0.75,
        use_magnitude_pruning: bool = True,
        retrain_epochs: int | None = None,
        prune_to: Literal["zero", "start"] = "zero",
        infer: Rule = "nearest",
    ) -> None:
        if not 0 < number("packnet", "prune_percentage", prune_percentage) < 1:
            raise StrategyError(
                "packnet: prune_percentage must be a share between 0 and 1 (0.75 prunes 75 %), got "
                f"{prune_percentage}"
            )
        if prune_to not in ("zero", "start"):
            raise StrategyError(f'packnet: prune_to must be "zero" or "start", got {prune_to!r}')
        if retrain_epochs is not None:
            whole("packnet", "retrain_epochs", retrain_epochs, "epochs (or None for half of the planned)")
        self.prune_percentage = prune_percentage
        self.use_magnitude_pruning = use_magnitude_pruning
        self.prune_to = prune_to
        self.retrain_epochs = retrain_epochs
        self.infer = check_rule("packnet", infer)
        self.owners: dict[str, Tensor] = {}  # uint8, by parameter name: 0 is free, k the k-th task's
        self.start: dict[str, Tensor] = {}  # by parameter name, what pruned weights go back to if not to zero
        self.prototypes = Prototypes()
        self.tasks: list[str] = []
        self._finished = 0
        self._pruned = False
        self._weights: dict[str, nn.Parameter] = {}
        # While a task is trained, for each layer: which weights are trained, and the values of the others.
        self._fixed: dict[str, tuple[Tensor, Tensor]] = {}

    def check(self, model: nn.Module, objective: Objective) -> None:
        """There must be weights to prune."""
        self._objective: Objective = objective
        self.infers = self.infer == "nearest" or objective != "regression"
        if not packable(model):
            raise StrategyError(
                "packnet: nothing that is trained is the weight of a linear, convolution, recurrent or attention "
                "layer (embeddings, and so a soft prompt, are none of these), so there is nothing to prune; tune "
                "all weights or LoRA, or choose another strategy"
            )

    def prepare(self, ctx: Context) -> None:
        """Freeze what earlier tasks own, and all that is not packed."""
        if ctx.index >= MOST_TASKS:
            raise StrategyError(
                f"packnet: an owner is kept in one byte a weight, which tells {MOST_TASKS} tasks apart; task "
                f"{ctx.task.name!r} would be number {ctx.index + 1}"
            )
        if ctx.index == 0:
            self._weights = packable(ctx.model)
            self.owners = {
                n: torch.zeros(p.shape, dtype=torch.uint8, device=p.device) for n, p in self._weights.items()
            }
            if self.prune_to == "start":
                self.start = {n: p.detach().clone() for n, p in self._weights.items()}
        # A task that failed is begun again.
        self.tasks[ctx.index :] = [ctx.task.name]
        self.owners = {name: owner * (owner <= ctx.index) for name, owner in self.owners.items()}
        self._finished, self._pruned = ctx.index, False
        if not any(bool((owner == 0).any()) for owner in self.owners.values()):
            raise StrategyError(
                f"packnet: no weight is free for task {ctx.task.name!r}: earlier tasks own them all; a larger "
                f"prune_percentage than {self.prune_percentage:g} leaves more to later tasks"
            )
        if ctx.index:
            own = set(self._weights.values())
            for p in ctx.model.parameters():
                if p not in own:
                    p.requires_grad_(False)
        self._fix()

    def phases(self, task: Task, plan: Sequence[Phase]) -> Sequence[Phase]:
        """The planned epochs, then those of retraining."""
        planned = sum(phase.epochs for phase in plan)
        return [*plan, Phase("retrain", self.retrain_epochs or -(-planned // 2))]

    def mix(self, ctx: Context, examples: list[Example]) -> list[Example]:
        """The rows as they are; the loop has just set train mode, in which running statistics would move."""
        for module in ctx.model.modules() if ctx.index else ():
            if getattr(module, "running_mean", None) is not None:
                module.eval()
        return examples

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        """Each row by its task's network; gradients flow for the newest task and for those not begun."""

        def answer(task: str, rows: Batch) -> Tensor:
            if not self._has_mask(task):
                return objectives.forward(model, rows).logits
            with torch.no_grad(), self.serving(model, task):
                return objectives.forward(model, rows).logits

        return forward_by_task(batch, answer)

    def gradient(self, ctx: Context, batches: Sequence[Batch]) -> None:
        """None for what is fixed, so that it counts neither in the gradient's norm nor in the moments."""
        for name, (trained, _) in self._fixed.items():
            if (gradient := self._weights[name].grad) is not None:
                gradient.mul_(trained)

    def after_step(self, ctx: Context, batches: Sequence[Batch], outputs: Sequence[Output]) -> None:
        """Put back what is fixed: weight decay and moments of earlier steps have moved it."""
        with torch.no_grad():
            for name, (trained, values) in self._fixed.items():
                # To the bit, for finite weights: 1 · w + 0 is w, and 0 · w + v is v. Picking with torch.where takes
                # five times as long.
                self._weights[name].mul_(trained).add_(values)

    def after_phase(self, ctx: Context, phase: Phase) -> None:
        """Prune, once the task was trained."""
        if self._pruned:
            return
        scores = self._scores(ctx)
        with torch.no_grad():
            for name, p in self._weights.items():
                self.owners[name] = prune(self.owners[name], scores[name], self.prune_percentage, len(self.tasks))
                p.copy_(shown(p, self.owners[name], len(self.tasks), self.start.get(name)))
        self._pruned = True
        self._fix()

    def after_task(self, ctx: Context) -> None:
        """From now on the task's weights are fixed; note what its rows look like to the first task's network."""
        self._finished, self._fixed = ctx.index + 1, {}
        if self.infer == "nearest":
            self.prototypes.learn(ctx, lambda: self.serving(ctx.model, self.tasks[0]))

    def identify(self, model: nn.Module, batch: Batch) -> list[str]:
        """Of the tasks that have ended, the one that `infer` finds."""
        if self.infer == "nearest":
            first = self.tasks[0] if self.tasks else ""
            return self.prototypes.nearest(model, batch, self._objective, lambda: self.serving(model, first))
        return surest(self.forward, model, batch, self.tasks[: self._finished], self._objective)

    def serving(self, model: nn.Module, task: str) -> AbstractContextManager[Any]:
        """The task's mask on the weights; afterwards they are as they were, bit for bit."""
        if not self._has_mask(task):
            return nullcontext()
        return masked(self._weights, self.owners, self.tasks.index(task) + 1, self.start)

    def usage(self, model: nn.Module) -> dict[str, dict[str, int]]:
        """How many weights of each layer each task owns, by the name of the module or of its parameter."""
        found = {}
        for name, owner in self.owners.items():
            counts = torch.bincount(owner.flatten(), minlength=len(self.tasks) + 1).tolist()
            found[name.removesuffix(".weight")] = dict(
                zip([*self.tasks, FREE], [*counts[1:], counts[0]], strict=True)
            )
        return found

    def export(self, model: Any, folder: Path) -> None:
        """The whole network, as `save_pretrained` writes it, with owners and tasks beside it; see `apply_mask`."""
        model.save_pretrained(folder)
        write_masks(folder, self.owners, self.tasks, self.start)

    def state_dict(self) -> dict[str, Any]:
        """Owners, tasks and any start. What is fixed is in the model itself."""
        return {
            "owners": dict(self.owners),
            "start": dict(self.start),
            "prototypes": self.prototypes.state_dict(),
            "tasks": list(self.tasks),
            "finished": self._finished,
            "pruned": self._pruned,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what was saved; the model has its saved weights by now."""
        self.owners = {name: owner.to(self._weights[name].device) for name, owner in state["owners"].items()}
        self.start = {name: values.to(self._weights[name].device) for name, values in state["start"].items()}
        self.prototypes.load_state_dict(state["prototypes"])
        self.tasks, self._finished, self._pruned = list(state["tasks"]), state["finished"], state["pruned"]
        self._fix()

    def _has_mask(self, task: str) -> bool:
        """Whether a task's network is another than the model as it is: after it, a later one was begun."""
        return task in self.tasks[: min(self._finished, len(self.tasks) - 1)]

    def _fix(self) -> None:
        """Note what is trained now (in a task what nobody owns, then what it owns itself), and all other values."""
        own = len(self.tasks) if self._pruned else 0
        self._fixed = {}
        for name, p in self._weights.items() if self._finished < len(self.tasks) else ():
            trained = self.owners[name] == own
            if not trained.all():
                self._fixed[name] = trained, p.detach().masked_fill(trained, 0)

    def _scores(self, ctx: Context) -> dict[str, Tensor]:
        values = {name: p.detach() - self.start.get(name, 0) for name, p in self._weights.items()}
        if self.use_magnitude_pruning:
            return {name: value.abs() for name, value in values.items()}
        # A partner in a chain may have frozen some; they had no gradient.
        live = {name: p for name, p in self._weights.items() if p.requires_grad}
        total = {name: torch.zeros_like(p) for name, p in self._weights.items()}
        rows = sorted(ctx.task.train, key=lambda e: 0 if e.x is None or e.x.dim() == 0 else e.x.shape[0])
        for start in range(0, len(rows), ROWS):
            loss = ctx.loss_of(rows[start : start + ROWS], reduction="sum")
            for name, g in zip(
                live, torch.autograd.grad(loss, list(live.values()), allow_unused=True), strict=True
            ):
                total[name] += 0 if g is None else g
        return {name: (value * total[name]).abs() for name, value in values.items()}
