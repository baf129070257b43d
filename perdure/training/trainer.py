"""ContinualTrainer: continual learning from a script, for any `nn.Module`."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perdure.errors import ConfigError, RunError, StrategyError
from perdure.evaluation.matrix import ScoreMatrix
from perdure.evaluation.score import HIGHER_IS_BETTER, MAIN
from perdure.memory.pack import pack, unpack
from perdure.models.adapters import count_parameters, moving
from perdure.strategies.base import Strategy
from perdure.strategies.build import build, completed, describe
from perdure.tracking import MetricsLog
from perdure.training import checkpoint
from perdure.training.configure import configure
from perdure.training.learner import Learner
from perdure.training.loaders import read_rows, read_source
from perdure.training.loop import Source, fit, total_steps
from perdure.training.results import write_results, write_scores
from perdure.types import Example, Phase, Task


class ContinualTrainer:
    """Train a model on one task after another and measure what it keeps.

    Args:
        model: any `nn.Module` that takes x and gives logits [B, C] (classification), predictions [B] or [B, K]
            (regression), or logits [B, T, V] for token ids [B, T] (causal_lm); or a Hugging Face model. It is
            trained in place; parameters with `requires_grad=False` stay as they are.
        strategy: how not to forget; None builds what the config enables.
        config: settings as a mapping, or the path of a YAML file that holds them.
        objective: "classification", "causal_lm" or "regression".
        output_dir: where metrics.jsonl, scores*.csv, results.json and checkpoints go; None writes nothing.
        seed: of every order and draw.

    Raises:
        ConfigError: unknown settings or objective, or a strategy given twice; `output_dir` holds another training.

    Example:
        >>> trainer = ContinualTrainer(model, EWC(strength=100.0), {"optimizer": {"type": "adam", "lr": 1e-3}})
        >>> trainer.train_task(train_loader, val_loader, task_id=0, num_epochs=5)
        >>> trainer.scores.values  # R: [T+1, T]
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy | None = None,
        config: Mapping[str, Any] | str | Path | None = None,
        objective: str = "classification",
        output_dir: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= seed < 1 << 63:
            raise ConfigError(f"seed must be 0 or more and below 2**63, got {seed}")
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model must be an nn.Module, got {model!r}; a name goes to perdure.models.load.load")
        torch.manual_seed(seed)
        self.settings, self.strategy = configure(config, strategy)
        self.seed = seed
        self.learner = Learner(model, self.strategy, objective, self.settings, seed)
        self.output_dir = None if output_dir is None else _empty(Path(output_dir))
        self.matrices: dict[str, ScoreMatrix] = {}
        self.tasks: list[str] = []
        self._evaluations: dict[str, list[Example]] = {}
        # Row 0 of a task that arrives later is scored with the weights that the stream began with.
        self._initial = {name: value.detach().cpu().clone() for name, value in moving(model).items()}
        self._log: MetricsLog | None = None
        self._log_size = 0
        self._seconds = 0.0

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.learner.model

    @property
    def scores(self) -> ScoreMatrix:
        """R of the objective's main metric: accuracy, R², or for a causal LM the loss."""
        for metric in MAIN[self.learner.objective]:
            if metric in self.matrices:
                return self.matrices[metric]
        return self._new_matrix(MAIN[self.learner.objective][-1])

    def train_task(
        self,
        train_loader: Any,
        val_loader: Any = None,
        task_id: int = 0,
        task_name: str | None = None,
        num_epochs: int = 1,
    ) -> dict[str, float]:
        """Train on one task, then score every task so far.

        Args:
            train_loader: DataLoader, Dataset or list of the task's rows (see `read_source` for what a row may be).
            val_loader: held-out rows, the same; None leaves the task's column of R empty.
            task_id: a number of its own for each task.
            task_name: its name in results; "task_<task_id>" by default.
            num_epochs: passes over the rows.

        Returns:
            The task's own scores after training; empty without `val_loader`.

        Raises:
            ConfigError: a task of this name was trained already, or `num_epochs` is below 1.
            NonFiniteError: loss or gradient is nan or infinite; the weights are as before that step.
        """
        name = task_name if task_name is not None else f"task_{task_id}"
        if name in self.tasks:
            raise ConfigError(f"task {name!r} was trained already; give each task its own task_id or task_name")
        if num_epochs < 1:
            raise ConfigError(f"num_epochs must be at least 1, got {num_epochs}")
        try:
            return self._train_task(name, train_loader, val_loader, num_epochs)
        finally:
            if name not in self.tasks:  # it failed: R keeps the tasks that were trained
                self._evaluations.pop(name, None)
                for matrix in self.matrices.values():
                    matrix.drop(name)
            if self._log is not None:
                self._log.close()
                self._log_size, self._log = self._log.size, None

    def _train_task(self, name: str, train_loader: Any, val_loader: Any, num_epochs: int) -> dict[str, float]:
        learner, index = self.learner, len(self.tasks)
        rows, source = read_source(train_loader, name, learner.objective, self.settings.batch_size, self.seed)
        held = read_rows(val_loader, name, learner.objective) if val_loader is not None else []
        if held:
            self._evaluations[name] = held
            self._record(index, name, learner.score(held))
            if index:
                self._record(0, name, self._with_initial_weights(lambda: learner.score(held)))
        task = Task(name, rows, held)
        phases = learner.phases(task, num_epochs)
        learner.begin_task(task, index, self._horizon(source, phases))
        clock = time.perf_counter()
        for position, result in fit(learner, source, phases):
            if result.skipped:
                warnings.warn(result.skipped, stacklevel=4)
                self._write("skipped", step=learner.steps, task=name, reason=result.skipped)
                clock = time.perf_counter()
                continue
            self._write(
                "step",
                step=learner.steps,
                task=name,
                stage=index + 1,
                epoch=position.epoch,
                loss=result.loss,
                lr=result.lr,
                tokens=result.tokens,
                tokens_per_second=round(result.tokens / max(time.perf_counter() - clock, 1e-9), 1),
                gradient_norm=result.gradient_norm,
                replayed=result.replayed_rows,
                **result.logged,
            )
            self._seconds += time.perf_counter() - clock
            clock = time.perf_counter()
        learner.end_task()
        self.tasks.append(name)
        for matrix in self.matrices.values():
            if name not in matrix.tasks:
                matrix.record(index + 1, name, math.nan)
        found: dict[str, float] = {}
        for other, examples in self._evaluations.items():
            values = learner.score(examples)
            self._record(index + 1, other, values)
            if other == name:
                found = values
        self._write_out()
        return found

    def evaluate(self, loader: Any, task_id: int | None = None) -> dict[str, float]:
        """Score the model on held-out rows, without recording it.

        Args:
            loader: DataLoader, Dataset or list of rows.
            task_id: the task, for strategies that need to be told; none so far does.

        Returns:
            "loss", and "accuracy" for classification, or "rmse", "mae" and "r2" for regression.
        """
        name = "evaluation" if task_id is None else f"task_{task_id}"
        return self.learner.score(read_rows(loader, name, self.learner.objective))

    def save(self, path: str | Path) -> Path:
        """Write everything to a folder, in one step: weights, strategy, memory, held-out rows, scores."""
        path = Path(path)
        checkpoint.save(
            path,
            {
                "objective": self.learner.objective,
                "seed": self.seed,
                "settings": self.settings.model_dump(mode="json"),
                "strategy": describe(self.strategy),
                "tasks": self.tasks,
                "matrices": {metric: matrix.to_dict() for metric, matrix in self.matrices.items()},
                "evaluations": {name: pack(rows) for name, rows in self._evaluations.items()},
                "initial": self._initial,
                "seconds": self._seconds,
                "learner": self.learner.state_dict(),
            },
        )
        return path

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, strategy: Strategy | None = None) -> ContinualTrainer:
        """The trainer that was saved, on a model of the same architecture.

        Args:
            path: the folder that `save` wrote.
            model: takes the saved weights; weights that were frozen all along must be in it already.
            strategy: needed only where it is a class of your own.

        Raises:
            RunError: not a readable checkpoint.
            UsageError: the model is another one.
        """
        state = checkpoint.load(Path(path))
        if "tasks" not in state:
            raise RunError(f"{path}: holds a run's checkpoint, not a trainer's")
        settings = {**state["settings"], "continual_strategy": {}}
        if strategy is None:
            if state["strategy"] is None:
                raise StrategyError(f"{path}: was saved with a strategy of your own class; give it as strategy=")
            strategy = build(list(state["strategy"]), state["strategy"])
        elif describe(strategy) != completed(state["strategy"]):
            raise StrategyError(
                f"{path}: was saved with {_in_words(completed(state['strategy']))}, and the strategy given is "
                f"{_in_words(describe(strategy))}; leave strategy= out, or give one with the same settings"
            )
        trainer = cls(model, strategy, settings, state["objective"], seed=state["seed"])
        for index, name in enumerate(state["tasks"]):
            trainer.learner.begin_task(Task(name, ()), index, 1, resuming=True)
        trainer.learner.load_state_dict(state["learner"])
        trainer.tasks = list(state["tasks"])
        trainer.matrices = {metric: ScoreMatrix.from_dict(saved) for metric, saved in state["matrices"].items()}
        trainer._evaluations = {name: unpack(rows) for name, rows in state["evaluations"].items()}
        trainer._initial = dict(state["initial"])
        trainer._seconds = state["seconds"]
        return trainer

    def _horizon(self, source: Source, phases: list[Phase]) -> int | None:
        schedule = self.settings.schedule
        if schedule.at_boundary == "continue":
            return schedule.total_steps
        needs = schedule.type != "constant" or 0 < schedule.warmup < 1
        return total_steps(source, phases) if needs else None

    def _with_initial_weights(self, action: Callable[[], dict[str, float]]) -> dict[str, float]:
        own: dict[str, Tensor] = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        own = {name: value for name, value in own.items() if name in self._initial}
        now = {name: value.detach().clone() for name, value in own.items()}
        with torch.no_grad():
            try:
                for name, p in own.items():
                    p.copy_(self._initial[name])
                return action()
            finally:
                for name, p in own.items():
                    p.copy_(now[name])

    def _new_matrix(self, metric: str) -> ScoreMatrix:
        """An empty matrix with a column for every task so far, so that R stays [T+1, T]."""
        matrix = ScoreMatrix(metric, HIGHER_IS_BETTER[metric])
        for i, task in enumerate(self.tasks, start=1):
            matrix.record(i, task, math.nan)
        return matrix

    def _record(self, row: int, task: str, values: Mapping[str, float]) -> None:
        for metric, value in values.items():
            if metric not in self.matrices:
                self.matrices[metric] = self._new_matrix(metric)
            self.matrices[metric].record(row, task, value)
        self._write("evaluation", step=self.learner.steps, row=row, task=task, metrics=values)

    def _write(self, event: str, **values: Any) -> None:
        if self.output_dir is None:
            return
        if self._log is None:
            self._log = MetricsLog(self.output_dir / "metrics.jsonl", self._log_size)
        self._log.write(event, **values)

    def _write_out(self) -> None:
        if self.output_dir is None:
            return
        trainable, total = count_parameters(self.model)
        facts = {
            "name": self.output_dir.name,
            "strategy": self.strategy.name,
            "model": type(self.model).__name__,
            "tuning": "full",
            "seed": self.seed,
            "tasks": self.tasks,
            "stages": self.tasks,
            "finished": True,
            "steps": self.learner.steps,
            "seconds": round(self._seconds, 3),
            "parameters": {"trainable": trainable, "total": total},
            "probe": {},
            "replay": None,
        }
        write_scores(self.output_dir, self.matrices, self.scores.metric)
        write_results(self.output_dir, facts, self.matrices, self.scores.metric)
        self.save(self.output_dir / "checkpoints" / f"task-{len(self.tasks):03d}")


def _in_words(described: Mapping[str, Any] | None) -> str:
    """Strategies and their settings."""
    if described is None:
        return "a class of your own"
    return " + ".join(
        f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"
        for name, settings in described.items()
    )


def _empty(folder: Path) -> Path:
    """The folder, unless an earlier training wrote there: its files are not written over."""
    if (folder / "metrics.jsonl").exists():
        raise ConfigError(
            f"output_dir: {folder} holds the metrics.jsonl of an earlier training; give another one, or remove it"
        )
    return folder
