"""ContinualTrainer: continual learning from a script, for any `nn.Module`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from perdure.callbacks import Callback
from perdure.errors import ConfigError, RunError, StrategyError, UsageError
from perdure.evaluation.matrix import ScoreMatrix
from perdure.models.adapters import count_parameters
from perdure.strategies.base import Strategy
from perdure.strategies.build import build, completed, describe
from perdure.strategies.chain import Chain
from perdure.training import checkpoint
from perdure.training.configure import configure
from perdure.training.drift import Changes
from perdure.training.events import Events
from perdure.training.learner import Learner
from perdure.training.loaders import read_rows, read_source
from perdure.training.loop import Source, total_steps
from perdure.training.results import summarise, write_results, write_scores
from perdure.training.scoring import Scoring
from perdure.training.stopping import Stopper
from perdure.training.task import TaskTraining
from perdure.types import Phase, Task


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
        callbacks: told of all that happens, in this order. They begin with the first `train_task` and end with
            `close`, or with the block of `with ContinualTrainer(...) as trainer`.

    Raises:
        ConfigError: unknown settings or objective, or a strategy given twice; `output_dir` holds another training;
            a metric for early stopping that the objective does not have.

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
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if not 0 <= seed < 1 << 63:
            raise ConfigError(f"seed must be 0 or more and below 2**63, got {seed}")
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model must be an nn.Module, got {model!r}; a name goes to perdure.models.load.load")
        torch.manual_seed(seed)
        self.settings, self.strategy = configure(config, strategy)
        self.seed = seed
        self.learner = Learner(model, self.strategy, objective, self.settings, seed)
        stopping = self.settings.early_stopping
        self._stopper = None if stopping is None else Stopper(self.learner, stopping)
        self.output_dir = None if output_dir is None else _empty(Path(output_dir))
        self._events = Events(None if self.output_dir is None else self.output_dir / "metrics.jsonl", callbacks)
        self._scoring = Scoring(self.learner, self._events)
        self._changes = Changes()
        self._changes.begin(model, self._scoring.initial)
        self._names: dict[str, str] = {}  # of tasks, by their task_id as text
        self._seconds = 0.0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close(finished=error is None)
        except Exception as second:
            if error is None:
                raise
            error.add_note(f"A callback could not end either: {second!r}")

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self.learner.model

    @property
    def scores(self) -> ScoreMatrix:
        """R of the objective's main metric: accuracy, R², or for a causal LM the loss."""
        return self._scoring.main

    @property
    def matrices(self) -> dict[str, ScoreMatrix]:
        """R of every metric, by name."""
        return self._scoring.matrices

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that were trained."""
        return self._scoring.tasks

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
            train_loader: DataLoader, Dataset with a length, or list of the task's rows: pairs (x, y), mappings
                with `input_ids` and `labels` (or `x` and `y`), or examples.
            val_loader: held-out rows, the same; None leaves the task's column of R empty.
            task_id: a number of its own for each task.
            task_name: its name in results; "task_<task_id>" by default.
            num_epochs: passes over the rows; with early stopping at most so many.

        Returns:
            The task's own scores after training; empty without `val_loader`.

        Raises:
            ConfigError: a task of this name was trained already, or of this id where the strategy is told tasks;
                `num_epochs` is below 1; early stopping without `val_loader`.
            NonFiniteError: loss or gradient is nan or infinite; the weights are as before that step.
            Exception: what a callback raised. Model and trainer are as they were when the callback was told; a
                task that was trained stays so, with its scores and files.
        """
        name = task_name if task_name is not None else f"task_{task_id}"
        self._refuse(name, str(task_id), val_loader, num_epochs)
        where = {} if self.output_dir is None else {"folder": str(self.output_dir)}
        self._events.begin({**self._facts(), **where})
        own_id = str(task_id) not in self._names
        self._names.setdefault(str(task_id), name)
        try:
            return self._train_task(name, train_loader, val_loader, num_epochs)
        finally:
            if name not in self.tasks:  # it failed
                if own_id:
                    del self._names[str(task_id)]
                self._scoring.drop(name)
                self._events.forget()
            self._events.rest()

    def _refuse(self, name: str, task_id: str, val_loader: Any, num_epochs: int) -> None:
        if self._closed:
            raise UsageError("this trainer was closed; train all tasks first, or save it and load it again")
        if name in self.tasks:
            raise ConfigError(f"task {name!r} was trained already; give each task its own task_id or task_name")
        if self.strategy.wants_task_ids and task_id in self._names:
            raise ConfigError(
                f"task_id {task_id} is task {self._names[task_id]!r} already, and {self.strategy.name} answers by "
                "task; give each task its own task_id"
            )
        if num_epochs < 1:
            raise ConfigError(f"num_epochs must be at least 1, got {num_epochs}")
        if self._stopper is not None and val_loader is None:
            raise ConfigError(
                f"task {name!r}: early_stopping needs held-out rows; give val_loader, or leave it out"
            )

    def _train_task(self, name: str, train_loader: Any, val_loader: Any, num_epochs: int) -> dict[str, float]:
        learner, index = self.learner, len(self.tasks)
        rows, source = read_source(train_loader, name, learner.objective, self.settings.batch_size, self.seed)
        held = read_rows(val_loader, name, learner.objective) if val_loader is not None else []
        task = Task(name, rows, held)
        phases = learner.phases(task, num_epochs)
        self._events.write(
            "task",
            step=learner.steps,
            task=name,
            stage=index + 1,
            rows=len(rows),
            held_out_rows=len(held),
            phases=[{"phase": phase.name, "epochs": phase.epochs} for phase in phases],
        )
        self._changes.begin_stage(learner, again=not index)
        if held:
            found = self._scoring.before(name, held)
            if self._stopper is not None:
                self._stopper.check(found, name)
        learner.begin_task(task, index, self._horizon(source, phases))
        self._events.tell()
        training = TaskTraining(learner, self._events, task, index + 1, self._stopper, self.settings.score_epochs)
        try:
            training.run(source, phases)
        finally:
            self._seconds += training.seconds
        learner.end_task()
        found = self._scoring.after(name)
        drift = self._changes.measure(index + 1, learner) or {}
        self._events.write("drift", step=learner.steps, task=name, stage=index + 1, **drift)
        self._events.write("task_end", step=learner.steps, task=name, stage=index + 1, phases=training.phases)
        # Only now, so that what was trained is kept whatever a callback does.
        self._write_out()
        self._events.tell()
        return found

    def evaluate(self, loader: Any, task_id: int | None = None) -> dict[str, float]:
        """Score the model on held-out rows, without recording it.

        Args:
            loader: DataLoader, Dataset or list of rows.
            task_id: the rows' task. Only strategies with `wants_task_ids` answer by it; None lets such a strategy
                infer the task of each row.

        Returns:
            "loss", and "accuracy" for classification, or "rmse", "mae" and "r2" for regression.

        Raises:
            ConfigError: a strategy that answers by task, and no task of this id was trained; or a regression
                without `task_id` under such a strategy.
        """
        if self.strategy.wants_task_ids and task_id is not None and str(task_id) not in self._names:
            known = ", ".join(f"{key} ({name})" for key, name in self._names.items()) or "none yet"
            raise ConfigError(
                f"task_id {task_id} was not trained, and {self.strategy.name} answers by task; known: {known}. "
                "Without task_id each row's task is inferred"
            )
        name = "evaluation" if task_id is None else self._names.get(str(task_id), f"task_{task_id}")
        rows = read_rows(loader, name, self.learner.objective)
        return self.learner.score(self.learner.identified(rows) if task_id is None else rows)

    def close(self) -> None:
        """All tasks are trained: let the callbacks end. Scores, evaluation and `save` go on as before."""
        self._close(finished=True)

    def _close(self, finished: bool) -> None:
        closed, self._closed = self._closed, True
        if not closed:
            results = summarise(self._outcome(finished), self.matrices, self.scores.metric)
            files = [] if self.output_dir is None else sorted(p for p in self.output_dir.glob("*") if p.is_file())
            self._events.end(results, files)

    def save(self, path: str | Path) -> Path:
        """Write everything to a folder, in one step: weights, strategy, memory, held-out rows, scores.

        Raises:
            StorageError: the disk refused; what the folder held before is intact.
        """
        path = Path(path)
        checkpoint.save(
            path,
            {
                "objective": self.learner.objective,
                "seed": self.seed,
                "settings": self.settings.model_dump(mode="json"),
                "strategy": describe(self.strategy),
                "names": dict(self._names),
                **self._scoring.state_dict(),
                "changes": self._changes.state_dict(),
                "seconds": self._seconds,
                "learner": self.learner.state_dict(),
            },
        )
        return path

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module,
        strategy: Strategy | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> ContinualTrainer:
        """The trainer that was saved, on a model of the same architecture.

        Args:
            path: the folder that `save` wrote.
            model: takes the saved weights; weights that were frozen all along must be in it already.
            strategy: needed only where it is a class of your own.
            callbacks: as for a new trainer; they begin with the next task.

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
        trainer = cls(model, strategy, settings, state["objective"], seed=state["seed"], callbacks=callbacks)
        for index, name in enumerate(state["tasks"]):
            trainer.learner.begin_task(Task(name, ()), index, 1, resuming=True)
        trainer.learner.load_state_dict(state["learner"])
        trainer._scoring.load_state_dict(state)
        trainer._changes.start = trainer._scoring.initial
        trainer._changes.load_state_dict(state.get("changes", {}))
        older = {name.removeprefix("task_"): name for name in trainer.tasks}  # what was saved without ids
        trainer._names = dict(state.get("names", older))
        trainer._seconds = state["seconds"]
        return trainer

    def _horizon(self, source: Source, phases: list[Phase]) -> int | None:
        schedule = self.settings.schedule
        if schedule.at_boundary == "continue":
            return schedule.total_steps
        needs = schedule.type != "constant" or 0 < schedule.warmup < 1
        return total_steps(source, phases) if needs else None

    def _facts(self) -> dict[str, Any]:
        """What is trained, and how."""
        trainable, total = count_parameters(self.model)
        return {
            "name": "training" if self.output_dir is None else self.output_dir.name,
            "strategy": _name_of(self.strategy),
            "task_identity": "told" if self.strategy.wants_task_ids else None,
            "model": type(self.model).__name__,
            "tuning": "full",
            "objective": self.learner.objective,
            "settings": {
                **self.settings.model_dump(mode="json"),
                "continual_strategy": describe(self.strategy) or {},
            },
            "seed": self.seed,
            "tasks": self.tasks,
            "parameters": {"trainable": trainable, "total": total},
        }

    def _outcome(self, finished: bool = True) -> dict[str, Any]:
        """What results.json holds beside the scores."""
        return {
            **self._facts(),
            "stages": self.tasks,
            "finished": finished,
            "steps": self.learner.steps,
            "seconds": round(self._seconds, 3),
            "probe": {},
            "replay": None,
            **self._changes.results(),
        }

    def _write_out(self) -> None:
        if self.output_dir is not None:
            write_scores(self.output_dir, self.matrices, self.scores.metric)
            write_results(self.output_dir, self._outcome(), self.matrices, self.scores.metric)
            self.save(self.output_dir / "checkpoints" / f"task-{len(self.tasks):03d}")


def _name_of(strategy: Strategy) -> str:
    """As on the command line: members joined by "+"."""
    members = strategy.strategies if isinstance(strategy, Chain) else (strategy,)
    return "+".join(member.name or type(member).__name__ for member in members)


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
