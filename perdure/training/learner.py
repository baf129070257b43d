"""One optimizer step, and all that it needs: model, strategy, optimizer, schedule, precision.

Knows nothing of epochs, files or progress: the task loop and the online loop both stand on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from perdure.config import TrainingSettings
from perdure.errors import ConfigError, ModelError, NonFiniteError, UsageError
from perdure.evaluation.score import INFERRED, evaluating, score
from perdure.models.objectives import (
    check_objective,
    collate,
    forward,
    group_counts,
    group_losses,
    losses,
    total_loss,
)
from perdure.order import priority
from perdure.strategies.base import STEP, Strategy
from perdure.training.fitting import ran_out
from perdure.training.optim import build_optimizer, learning_rate, load_named_state, named_state
from perdure.training.scaling import Scaling
from perdure.types import TASK, Batch, Context, Example, Output, Phase, Task


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: mean over the step's targets, penalties included.
        lr: the learning rate used.
        tokens: real input tokens (or rows) that went through the model.
        targets: targets that the loss was taken over.
        rows: rows, replayed ones included.
        replayed_rows: rows that a strategy added.
        replayed_targets: targets of those.
        gradient_norm: before clipping.
        examples: the step's rows, replayed ones included.
        skipped: why the update was left out, where it was (`skip_bad_batches`).
        overflow: whether the update was left out since gradients overflowed in fp16; the scale of the loss has been
            halved. A few such steps are part of fp16, so that nothing is said of them.
        logged: other values that the strategy recorded.
    """

    loss: float
    lr: float
    tokens: int
    targets: int
    rows: int
    replayed_rows: int
    replayed_targets: int
    gradient_norm: float
    examples: Sequence[Example] = ()
    skipped: str | None = None
    overflow: bool = False
    logged: Mapping[str, float] = field(default_factory=dict)


CURE = "A lower optimizer.lr, or clip: 1.0, is the usual cure; skip_bad_batches leaves such a step out and goes on."


class Learner:
    """A model under a strategy.

    Args:
        model: what is trained; parameters with `requires_grad` are trainable.
        strategy: how not to forget.
        objective: "classification", "causal_lm" or "regression".
        settings: optimizer, schedule, batch sizes, precision, device.
        seed: of every keyed draw.
    """

    def __init__(
        self, model: nn.Module, strategy: Strategy, objective: str, settings: TrainingSettings, seed: int
    ) -> None:
        self.objective = check_objective(objective)
        self.settings = settings
        self.strategy = strategy
        strategy.claim()
        strategy.check(model, self.objective)
        self.seed = seed
        self.accelerator = _accelerator(settings)
        self.device = self.accelerator.device
        self.model: nn.Module = model
        self.model.to(self.device)
        if settings.gradient_checkpointing:
            if not hasattr(model, "gradient_checkpointing_enable"):
                raise ModelError("gradient_checkpointing: this model cannot do it; leave the setting out")
            self.checkpoint_gradients()
        if settings.compile:
            model.compile()
        self.scaling = Scaling(self.device) if settings.precision == "fp16" else None
        self.rng = torch.Generator().manual_seed(priority(seed, "strategy", key=strategy.name) >> 1)
        self.optimizer: torch.optim.Optimizer | None = None
        self.names: list[str] = []
        # Every parameter that was ever trainable: a strategy may freeze some later.
        self.trained: set[str] = set()
        self.steps = 0
        self.schedule_step = 0
        self.total_steps: int | None = None
        self.whole = True  # False where an update was begun and not ended
        self.ctx: Context | None = None
        self._logged: dict[str, float] = {}
        self._buffers: list[Tensor] = []  # those that training changes, such as running means

    def begin_task(self, task: Task, index: int, total_steps: int | None = None, resuming: bool = False) -> None:
        """Let the strategy prepare, then build the optimizer over what is trainable now.

        Args:
            task: the task to come.
            index: its position in the stream, from 0.
            total_steps: the schedule's horizon: the task's steps, or the stream's under "continue".
            resuming: a state will be loaded next: nothing is carried over.
        """
        self.ctx = self._context(task, index)
        self.strategy.prepare(self.ctx)
        persistent = self.model.state_dict()
        self._buffers = [buffer for name, buffer in self.model.named_buffers() if name in persistent]
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ConfigError(f"task {task.name!r}: no parameter of the model is trainable (requires_grad)")
        carried: dict[str, dict[str, Any]] = {}
        if self.optimizer is not None and self.settings.optimizer.at_boundary == "continue" and not resuming:
            carried = named_state(self.optimizer, self.names)
        self._build_optimizer(carried)
        if self.settings.schedule.at_boundary == "reset":
            self.schedule_step = 0
        self.total_steps = total_steps
        learning_rate(self.settings.optimizer, self.settings.schedule, 0, total_steps)

    def _build_optimizer(self, carried: dict[str, dict[str, Any]]) -> None:
        parameters = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in parameters]
        self.trained.update(self.names)
        self.optimizer = build_optimizer([p for _, p in parameters], self.settings.optimizer)
        self.optimizer.zero_grad()
        if carried:
            load_named_state(self.optimizer, self.names, carried)

    def phases(self, task: Task, epochs: int) -> list[Phase]:
        """The phases of a task under this strategy."""
        return list(self.strategy.phases(task, [Phase("train", epochs)]))

    def step(self, examples: Sequence[Example]) -> StepResult:
        """One optimizer step on these rows and whatever the strategy adds.

        The loss is the sum over groups of weight times mean over all of the group's targets in the step, so that
        cutting the step into micro-batches changes nothing. In fp16 gradients that overflow leave the update out,
        as `skip_bad_batches` does, as long as the scale of the loss can be lowered.

        Raises:
            NonFiniteError: loss or gradient is nan or infinite; everything is as before the step. With
                `skip_bad_batches` weights and buffers are, the step counts, and the result says what was skipped.
            ModelError: the model does what the device cannot do in fp16.
        """
        ctx, optimizer = self._ready()
        strategy, settings = self.strategy, self.settings
        self._logged = {}
        before = self._bookmark()
        try:
            rows, batches, outputs, value, overflow = self._gradients(ctx, examples)
        except Exception as error:
            # A strategy's own error, or a device out of memory: the next step must find nothing of this one.
            optimizer.zero_grad()
            self._turn_back(before, True)
            if self.scaling is not None and "not implemented for 'Half'" in str(error):
                raise ModelError(f"precision fp16: {error} on {self.device.type}; use bf16 or fp32") from error
            raise
        targets = sum(sum(batch.counts) for batch in batches)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        result = value + self._logged.pop("penalty", 0.0)
        skipped = None
        if overflow:
            optimizer.zero_grad()
            self._turn_back(before, False)
        elif not (math.isfinite(result) and math.isfinite(float(norm))):
            optimizer.zero_grad()
            self._turn_back(before, not settings.skip_bad_batches)
            what = _diagnose(self.steps + 1, ctx.task.name, rows, result, float(norm))
            if not settings.skip_bad_batches:
                raise NonFiniteError(f"{what} {CURE}")
            skipped = what
        elif settings.clip is not None:
            trainable = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(trainable, settings.clip, norm)
        lr = learning_rate(settings.optimizer, settings.schedule, self.schedule_step, self.total_steps)
        for settings_of_group in optimizer.param_groups:
            settings_of_group["lr"] = lr
        self.whole = False
        taken = skipped is None and not overflow
        if taken:
            optimizer.step()
            optimizer.zero_grad()
        self.schedule_step += 1
        self.steps += 1
        if taken:
            strategy.after_step(ctx, batches, outputs)
        self.whole = True
        replayed = [
            (row, n) for b in batches for row, n in zip(b.examples, b.counts, strict=True) if row.source != TASK
        ]
        return StepResult(
            loss=result,
            lr=lr,
            tokens=sum(batch.tokens for batch in batches),
            targets=targets,
            rows=len(rows),
            replayed_rows=len(replayed),
            replayed_targets=sum(n for _, n in replayed),
            gradient_norm=float(norm),
            examples=rows,
            skipped=skipped,
            overflow=overflow,
            logged=self._logged,
        )

    def _gradients(
        self, ctx: Context, examples: Sequence[Example]
    ) -> tuple[list[Example], list[Batch], list[Output], float, bool]:
        """The step's rows, cut into batches, with the outputs and the loss; its gradient is left in `.grad`.

        Last comes whether it overflowed, and the scale of the loss was lowered.
        """
        strategy, model = self.strategy, self.model
        model.train()
        rows = strategy.mix(ctx, list(examples))
        batches = self._micro_batches(rows)
        totals = group_counts(batches)
        targets = sum(totals.values())
        weights = strategy.weights
        value: Any = 0.0
        outputs: list[Output] = []
        aside: dict[Tensor, Tensor] = {}
        for batch in batches:
            with self.autocast():
                output = strategy.forward(model, batch)
                if strategy.wants_outputs:
                    outputs.append(Output(output.logits.detach()))
                loss: Any = 0.0
                for group, summed in group_losses(output, batch, self.objective).items():
                    if totals[group] and weights.get(group, 1):
                        part = summed / totals[group]
                        loss = loss + (part if group not in weights else weights[group] * part)
                penalties = strategy.penalty(ctx, batch, output)
                extra: Any = 0.0
                for group, term in (penalties if isinstance(penalties, Mapping) else {STEP: penalties}).items():
                    count = targets if group == STEP else totals.get(group, 0)
                    if count and (isinstance(term, Tensor) or term):
                        extra = extra + term / count
            if strategy.wants_task_gradient and isinstance(extra, Tensor) and extra.requires_grad:
                self._backward_aside(extra, aside)
                value = value + extra.detach()
            elif isinstance(extra, Tensor) or extra:
                loss = loss + extra
            if isinstance(loss, Tensor):
                self._backward(loss)
                value = value + loss.detach()
        if not self._unscale(aside) and math.isfinite(float(value)) and self._lower():
            return rows, batches, outputs, float(value), True
        strategy.observe(ctx, batches)
        for parameter, gradient in aside.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        strategy.gradient(ctx, batches)
        return rows, batches, outputs, float(value), False

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss if self.scaling is None else self.scaling.scaled(loss))

    def _unscale(self, aside: Mapping[Tensor, Tensor]) -> bool:
        """Whether the gradients are finite, where their loss was scaled; they are then as if it had not been."""
        return self.scaling is None or self.scaling.unscale(self._ready()[1], aside)

    def _lower(self) -> bool:
        return self.scaling is not None and self.scaling.lower()

    def _backward_aside(self, extra: Tensor, aside: dict[Tensor, Tensor]) -> None:
        """Add a penalty's gradients to those that wait until the loss's own were looked at."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        extra = extra if self.scaling is None else self.scaling.scaled(extra)
        for parameter, gradient in zip(
            trained, torch.autograd.grad(extra, trained, retain_graph=True, allow_unused=True), strict=True
        ):
            if gradient is not None:
                aside[parameter] = aside[parameter] + gradient if parameter in aside else gradient

    def _bookmark(self) -> dict[str, Any]:
        """What a step changes before its update."""
        return {
            "strategy": self.strategy.bookmark(),
            "rng": self.rng.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": _cuda_state(),
            "buffers": [buffer.clone() for buffer in self._buffers],
            "scaling": None if self.scaling is None else self.scaling.state_dict(),
        }

    def _turn_back(self, before: Mapping[str, Any], draws: bool) -> None:
        """Undo a step that was not taken: the model's buffers, and its draws if they are to be drawn again."""
        for buffer, value in zip(self._buffers, before["buffers"], strict=True):
            buffer.copy_(value)
        if draws:
            self.strategy.turn_back(before["strategy"])
            self.rng.set_state(before["rng"])
            torch.set_rng_state(before["torch"])
            if self.scaling is not None:
                self.scaling.load_state_dict(before["scaling"])
            if before["cuda"]:
                torch.cuda.set_rng_state_all(before["cuda"]["cuda"])

    def checkpoint_gradients(self) -> None:
        """Work activations out again in the backward pass instead of keeping them."""
        self.model.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )

    def fits(self, rows: Sequence[Example]) -> bool:
        """Whether these rows go forward and back through the model together; everything is afterwards as it was."""
        _, optimizer = self._ready()
        before = self._bookmark()
        self.model.train()
        try:
            batch = self.collate(rows)
            with self.autocast():
                loss = total_loss(self.strategy.forward(self.model, batch), batch, self.objective)
            self.accelerator.backward(loss)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            return False
        finally:
            optimizer.zero_grad()
            self._turn_back(before, True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    def end_phase(self, phase: Phase) -> None:
        """Tell the strategy that a phase is over."""
        self.strategy.after_phase(self._ready()[0], phase)

    def end_task(self, rows: Sequence[Example] | None = None) -> None:
        """Tell the strategy that the task is over.

        Args:
            rows: those that were trained on, where the task had more to draw from; None: all of the task's.
        """
        ctx, optimizer = self._ready()
        if rows is not None:
            ctx = ctx.but(task=replace(ctx.task, train=rows))
        self.strategy.after_task(ctx)
        optimizer.zero_grad()

    def score(self, examples: Sequence[Example], plain: bool = False) -> dict[str, float]:
        """Metrics on held-out rows, without touching the model's mode or gradients.

        Args:
            examples: rows; a strategy that wants task ids is told each row's task by the row.
            plain: through the model as it is, without the strategy.
        """
        with self.autocast():
            return score(
                self.model,
                examples,
                self.objective,
                forward if plain else self.strategy.forward,
                self.collate,
                self.settings.evaluation_batch_size,
            )

    def score_both(self, examples: Sequence[Example]) -> dict[str, float]:
        """As `score` and, where the strategy is told tasks, the same metrics untold, as "accuracy_inferred"."""
        found = self.score(examples)
        if self.infers:
            untold = self.score(self.identified(examples))
            found |= {name + INFERRED: value for name, value in untold.items()}
        return found

    @property
    def infers(self) -> bool:
        """Whether the strategy is told tasks, and can do without."""
        return self.strategy.wants_task_ids and self.strategy.infers

    def identified(self, examples: Sequence[Example]) -> list[Example]:
        """The rows with the tasks that the strategy takes them for; as they are where it needs no task."""
        found = list(examples)
        if not self.strategy.wants_task_ids:
            return found
        size = self.settings.evaluation_batch_size
        lengths = [0 if row.x is None or row.x.dim() == 0 else len(row.x) for row in found]
        order = sorted(range(len(found)), key=lambda i: lengths[i])
        with evaluating(self.model), self.autocast():
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                batch = self.collate([found[i] for i in chosen])
                for i, task in zip(chosen, self.strategy.identify(self.model, batch), strict=True):
                    found[i] = found[i].but(task=task)
        return found

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass at this learner's precision."""
        # Not Accelerate's: all of its accelerators share one state, so a later learner's precision would hold here.
        if self.settings.precision == "fp32":
            return nullcontext()
        dtype = torch.float16 if self.settings.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Examples to a batch on the model's device."""
        return collate(examples, self.objective, self.device)

    def state_dict(self, optimizer: bool = True) -> dict[str, Any]:
        """Everything that a step depends on: what is or was trainable, buffers, optimizer, strategy, generators.

        Args:
            optimizer: False leaves its state out, where the next task resets it anyway.
        """
        keep: dict[str, Tensor] = {n: p for n, p in self.model.named_parameters() if n in self.trained}
        persistent = self.model.state_dict()
        keep.update({name: value for name, value in self.model.named_buffers() if name in persistent})
        return {
            "model": keep,
            "trained": sorted(self.trained),
            "optimizer": named_state(self.optimizer, self.names) if optimizer and self.optimizer else None,
            "steps": self.steps,
            "schedule_step": self.schedule_step,
            "strategy": self.strategy.state_dict(),
            "rng": {"strategy": self.rng.get_state(), "torch": torch.get_rng_state(), **_cuda_state()},
            **({} if self.scaling is None else {"scaling": self.scaling.state_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what was saved; `begin_task` has been called for every task so far."""
        self.strategy.regrow(self.model, state["strategy"])
        if self.names != [name for name, p in self.model.named_parameters() if p.requires_grad]:
            self._build_optimizer({})
        own: dict[str, Tensor] = dict(self.model.named_parameters())
        own.update(self.model.named_buffers())
        strange = sorted(set(state["model"]) - set(own))
        if strange:
            raise UsageError(f"the saved state is of another model: it has {strange[0]!r}, which this one lacks")
        with torch.no_grad():
            for name, value in state["model"].items():
                if own[name].shape != value.shape:
                    raise UsageError(
                        f"the saved state is of another model: {name!r} is {tuple(value.shape)} there and "
                        f"{tuple(own[name].shape)} here"
                    )
                own[name].copy_(value)
        self.trained = set(state["trained"])
        if state["optimizer"] is not None and self.optimizer is not None:
            load_named_state(self.optimizer, self.names, state["optimizer"])
        self.steps, self.schedule_step = state["steps"], state["schedule_step"]
        self.strategy.load_state_dict(state["strategy"])
        if self.scaling is not None and "scaling" in state:
            self.scaling.load_state_dict(state["scaling"])
        self.rng.set_state(state["rng"]["strategy"])
        torch.set_rng_state(state["rng"]["torch"])
        if "cuda" in state["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])

    def _ready(self) -> tuple[Context, torch.optim.Optimizer]:
        assert self.ctx is not None, "begin_task first"
        assert self.optimizer is not None, "begin_task first"
        return self.ctx, self.optimizer

    def _micro_batches(self, rows: Sequence[Example]) -> list[Batch]:
        size = self.settings.micro_batch_size
        if size is None or len(rows) <= size:
            return [self.collate(rows)]
        ordered = sorted(rows, key=lambda row: 0 if row.x is None or row.x.dim() == 0 else -row.x.shape[0])
        return [self.collate(ordered[i : i + size]) for i in range(0, len(ordered), size)]

    def _log(self, name: str, value: Any) -> None:
        self._logged[name] = self._logged.get(name, 0.0) + float(value)

    def _context(self, task: Task, index: int) -> Context:
        return Context(
            model=self.model,
            task=task,
            index=index,
            objective=self.objective,
            forward=self.strategy.forward,
            collate=self.collate,
            loss_of=self.loss_of,
            rng=self.rng,
            seed=self.seed,
            log=self._log,
            autocast=self.autocast,
        )

    def loss_of(
        self,
        examples: Sequence[Example],
        params: Mapping[str, Tensor] | None = None,
        reduction: str = "mean",
        train: bool = False,
    ) -> Tensor:
        """The task loss alone; see `Context.loss_of`."""
        batch = self.collate(examples)

        # Nothing scales this loss: in fp16 its gradients would fall below the smallest number there is.
        context = self.autocast if self.scaling is None else nullcontext

        def compute() -> Tensor:
            with context():
                output = self.strategy.forward(self.model, batch)
                if reduction == "none":
                    return losses(output, batch, self.objective)
                summed = total_loss(output, batch, self.objective)
                return summed / max(sum(batch.counts), 1) if reduction == "mean" else summed

        was_training = self.model.training
        self.model.train(train)
        try:
            if params is None:
                return compute()
            return torch.func.functional_call(
                _Wrapped(self.model, compute), {f"model.{name}": p for name, p in params.items()}, ()
            )
        finally:
            self.model.train(was_training)


class _Wrapped(nn.Module):
    """A computation on a model, as a module whose parameters can be swapped."""

    def __init__(self, model: nn.Module, compute: Any) -> None:
        super().__init__()
        self.model = model
        self._compute = compute

    def forward(self) -> Tensor:
        return self._compute()


def _diagnose(step: int, task: str, rows: Sequence[Example], loss: float, norm: float) -> str:
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
    keys = ", ".join(repr(row.key) for row in rows[:8]) + (", …" if len(rows) > 8 else "")
    return f"step {step}, task {task!r}: the {what} on the rows {keys}. The weights were not updated."


def _cuda_state() -> dict[str, Any]:
    return {"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {}


def _accelerator(settings: TrainingSettings) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # In fp16 it would scale losses by itself, and on a CPU it refuses; the learner does its own.
    precision = "bf16" if settings.precision == "bf16" else "no"
    shared = AcceleratorState._shared_state
    if shared and shared.get("_mixed_precision") != precision:
        # Accelerate keeps the precision for the whole process and refuses another; runs here follow one another.
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, cpu=settings.device == "cpu")
    if accelerator.num_processes > 1:
        raise UsageError(
            f"{accelerator.num_processes} processes: perdure trains in one so far; start it without a launcher"
        )
    return accelerator
