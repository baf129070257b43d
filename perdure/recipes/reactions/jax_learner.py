"""A training in JAX as a run sees it: tasks, steps, scores and state under the names that torch's learner has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from perdure.errors import RunFailure, UsageError
from perdure.evaluation.score import regression_metrics
from perdure.jax import Learner as Fit
from perdure.jax import Row, RowTask
from perdure.jax.hidden import rounded
from perdure.jax.rows import name_of
from perdure.jax.tree import filled, named
from perdure.recipes.reactions.foretell import Foretold, Method
from perdure.storage import write_json
from perdure.strategies.base import Strategy
from perdure.training.learner import Learner, StepResult
from perdure.training.optim import learning_rate
from perdure.training.settings import RunSettings
from perdure.types import Example, Phase, Task

REPLAY = "replay"
FULL = "RESOURCE_EXHAUSTED"  # how XLA says that memory is full


class Weights(nn.Module):
    """The weights of a regressor in JAX as torch's tools see them: to count, to compare, to write.

    Trained ones are copies of what they are at the moment; frozen ones are shapes alone.

    Args:
        fit: whose weights.
    """

    def __init__(self, fit: Fit) -> None:
        super().__init__()
        self.fit = fit

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """All of them by name."""
        trained = named(self.fit.state.trained)
        for name, leaf in named(self.fit.model).items():
            if name in trained:
                yield prefix + name, nn.Parameter(tensor(trained[name]))
            else:
                yield prefix + name, nn.Parameter(torch.empty(leaf.shape, device="meta"), requires_grad=False)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Nothing: the backbone was loaded so."""

    def remember(self, rows: Sequence[Tensor], tell: Callable[[int, int], None] = lambda done, of: None) -> int:
        """Work out and hold the hidden states of these token rows, where the backbone is frozen."""
        if self.fit.settings.tuning != "head":
            return 0
        return self.fit.remember([Row("", tuple(row.tolist()), 0.0) for row in rows], tell)

    def save_pretrained(self, folder: Path) -> None:
        """Write the head under torch's names, and what was trained of the backbone under JAX's."""
        trained = {name: tensor(leaf) for name, leaf in named(self.fit.state.trained).items()}
        head = {name.removeprefix("head."): v for name, v in trained.items() if name.startswith("head.")}
        rest = {name.removeprefix("backbone."): v for name, v in trained.items() if not name.startswith("head.")}
        save_file(head, folder / "head.safetensors")
        shapes = {name: list(value.shape) for name, value in head.items()}
        write_json(folder / "head.json", {"format": 1, "head": "MHAR", "shapes": shapes})
        if rest:
            save_file(rest, folder / f"{'lora' if self.fit.settings.tuning == 'lora' else 'backbone'}.safetensors")


class JaxStrategy(Strategy):
    """Stands for a strategy that JAX has compiled into its step; says how many rows it keeps.

    Args:
        rows: kept at the end.
        settings: numbers that hang on the stream's rows, such as a capacity that was given as a share.
    """

    name: ClassVar[str] = "jax"

    def __init__(self, rows: int, settings: Mapping[str, int | None] | None = None) -> None:
        self.rows = rows
        self.description = {self.name: dict(settings or {})}

    def claim(self) -> None:
        """It holds nothing that a second training could find."""

    def kept(self) -> int:
        """How many rows of earlier tasks are held."""
        return self.rows


class JaxLearner(Learner):
    """A training in JAX, driven as torch's is.

    Args:
        model: of the JAX learner that is driven.
        strategy: stands for the one that JAX has.
        settings: of the run.
    """

    def __init__(self, model: Weights, strategy: JaxStrategy, settings: RunSettings) -> None:
        super().__init__(model, strategy, "regression", settings, settings.seed)
        self.fit = model.fit
        self.names = list(named(self.fit.state.trained))
        self.tasks: list[RowTask] = []
        self._examples: dict[str, Example] = {}
        self._in_task = 0

    def begin_task(self, task: Task, index: int, total_steps: int | None = None, resuming: bool = False) -> None:
        """Make ready for a task; see `Learner`."""
        self.tasks = [*self.tasks[:index], RowTask(task.name, tuple(map(row_of, task.train)))]
        self._examples |= {name_of(row): e for row, e in zip(self.tasks[-1].rows, task.train, strict=True)}
        self.fit.begin_task(self.tasks[:index], self.tasks[-1])
        self._in_task = 0
        self.trained.update(self.names)
        if self.settings.schedule.at_boundary == "reset":
            self.schedule_step = 0
        self.total_steps = total_steps
        learning_rate(self.settings.optimizer, self.settings.schedule, 0, total_steps)

    def step(self, examples: Sequence[Example]) -> StepResult:
        """One step on these rows and on what is replayed.

        Raises:
            NonFiniteError: loss or gradient is nan or infinite; the weights are as they were.
            RunFailure: out of memory.
        """
        lr = learning_rate(self.settings.optimizer, self.settings.schedule, self.schedule_step, self.total_steps)
        try:
            found = self.fit.step([row_of(example) for example in examples], lr)
        except RuntimeError as error:
            if FULL not in str(error):
                raise
            raise RunFailure(
                f"out of memory in step {self.steps + 1}, of {self.fit.settings.slots} rows of "
                f"{self.fit.settings.length} tokens. A smaller --batch-size, --precision bf16 or --set "
                "gradient_checkpointing=true needs less; changed settings need a new --out."
            ) from error
        self.steps, self.schedule_step, self._in_task = self.fit.steps, self.schedule_step + 1, self._in_task + 1
        old = [self._examples[name_of(row)].but(source=REPLAY) for row in found.rows[found.new :]]
        return StepResult(
            loss=found.loss + found.penalty,
            lr=lr,
            tokens=len(found.rows),  # what a regression counts
            targets=len(found.rows),
            rows=len(found.rows),
            replayed_rows=found.replayed,
            replayed_targets=found.replayed,
            gradient_norm=found.norm,
            examples=[*examples, *old],
        )

    def end_phase(self, phase: Phase) -> None:
        """Nothing: a task here is one phase."""

    def end_task(self, rows: Sequence[Example] | None = None) -> None:
        """Estimate what EWC needs of the task."""
        self.fit.end_task(self.tasks[-1])

    def score(self, examples: Sequence[Example], plain: bool = False) -> dict[str, float]:
        """Loss, RMSE, MAE and R² over all rows at once."""
        if not examples:
            return {}
        rows = [row_of(example) for example in examples]
        made = torch.from_numpy(self.fit.predict(rows)).double()
        true = torch.tensor([row.y for row in rows], dtype=torch.float64)
        return {"loss": float(0.5 * (made - true).square().mean()), **regression_metrics(made, true)}

    def state_dict(self, optimizer: bool = True) -> dict[str, Any]:
        """All that the rest of the training depends on, by the names that a run's checkpoint has."""
        state: dict[str, dict[str, Tensor]] = {"trained": {}, "optimizer": {}, "anchors": {}}
        for name, leaf in named(self.fit.state).items():
            part, _, rest = name.partition(".")
            if part != "optimizer" or optimizer:
                state[part][rest] = tensor(leaf)
        return {
            "backend": "jax",
            "model": state["trained"],
            "trained": sorted(self.trained),
            "optimizer": state["optimizer"] if optimizer else None,
            "strategy": state["anchors"],
            "steps": self.steps,
            "schedule_step": self.schedule_step,
            "in_task": self._in_task,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what was saved; `begin_task` has been called for every task so far."""
        if state.get("backend") != "jax":
            raise UsageError("the saved state is of the torch backend; go on with --backend torch")
        own = named(self.fit.state)
        parts = {"trained": state["model"], "optimizer": state["optimizer"] or {}, "anchors": state["strategy"]}
        saved = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        wanted = {n: tuple(v.shape) for n, v in own.items() if state["optimizer"] or not n.startswith("optimizer.")}
        if wanted != {name: tuple(value.shape) for name, value in saved.items()}:
            raise UsageError("the saved state is of another model: its weights have other names or shapes")
        # Copies, since the step reuses their memory.
        arrays = {name: jnp.array(value.numpy(), copy=True) for name, value in saved.items()}
        self.fit.state = filled(self.fit.state, {**own, **arrays})
        self.trained = set(state["trained"])
        self.steps = self.fit.steps = state["steps"]
        self.schedule_step, self._in_task = state["schedule_step"], state["in_task"]
        if self.tasks and self._in_task:
            self.fit.begin_task(self.tasks[:-1], self.tasks[-1], self._in_task)


def foretell(learner: Learner, rows: Sequence[Example], method: Method, samples: int, seed: int) -> Foretold:
    """Predictions of rows, in their order, and how they spread; as `perdure.recipes.reactions.foretell` does."""
    assert isinstance(learner, JaxLearner)
    fit = learner.fit
    own = [row_of(row) for row in rows]
    length = max([fit.settings.length, *(rounded(len(row.ids)) for row in own)])
    mean = fit.predict(own, length).astype(np.float64)
    if method != "mc-dropout":
        return Foretold(mean, np.zeros(len(own)))
    return Foretold(mean, fit.predict_dropped(own, samples, length).astype(np.float64).std(0, ddof=1))


def row_of(example: Example) -> Row:
    """The same row, of plain values."""
    assert example.x is not None
    assert example.y is not None
    return Row(example.key, tuple(example.x.tolist()), float(example.y), example.task)


def tensor(leaf: jax.Array) -> Tensor:
    """A copy for torch."""
    return torch.from_numpy(np.array(leaf))
