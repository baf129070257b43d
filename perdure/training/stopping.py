"""Early stopping: when held-out rows get no better, back to the end of the best epoch, wholly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from perdure.config import EarlyStoppingSettings
from perdure.errors import ConfigError
from perdure.evaluation.score import HIGHER_IS_BETTER
from perdure.models.objectives import check_objective
from perdure.training.learner import Learner

# What can be measured of an objective at every epoch; the main metric first.
METRICS = {
    "classification": ("accuracy", "loss"),
    "regression": ("r2", "rmse", "mae", "loss"),
    "causal_lm": ("loss",),
}


class Stopper:
    """Early stopping within the phases of one task.

    An epoch is better if its score is so by more than `min_delta`; the first of a phase is its first best. Training
    stops when `patience` epochs in a row were no better. The state that it goes back to is a copy of all that a
    step depends on, as in a checkpoint, and waits on the CPU.

    Args:
        learner: what is trained.
        settings: when to stop.

    Attributes:
        metric: what is watched.
        best: the best epoch of this phase so far, from 0.

    Raises:
        ConfigError: a metric that the objective does not have.
    """

    def __init__(self, learner: Learner, settings: EarlyStoppingSettings) -> None:
        self.metric = metric_of(settings, learner.objective)
        self.best = 0
        self._learner = learner
        self._settings = settings
        self._value = math.nan
        self._state: dict[str, Any] | None = None

    def check(self, scores: Mapping[str, float], task: str) -> None:
        """Before training: ConfigError where the metric says nothing of these rows (R² of constant targets)."""
        if math.isnan(scores[self.metric]):
            others = ", ".join(name for name, value in scores.items() if not math.isnan(value)) or "none"
            raise ConfigError(
                f"early_stopping.metric: {self.metric} is nan on the held-out rows of task {task!r}; "
                f"what can be measured of them: {others}"
            )

    def epoch_ended(self, epoch: int, scores: Mapping[str, float], last: bool) -> bool:
        """Whether the phase ends with this epoch; if so, the learner is as at the end of its best one.

        Args:
            epoch: from 0; 0 begins a phase.
            scores: of the task's held-out rows.
            last: whether the phase has no more epochs.
        """
        value = scores[self.metric]
        if epoch == 0 or self._is_better(value):
            self.best, self._value = epoch, value
            if self._settings.restore_best and not last:
                self._state = _copied(self._learner.state_dict())
        stop = last or epoch - self.best >= self._settings.patience
        if stop and self._state is not None:
            if self.best != epoch:
                self._learner.load_state_dict(self._state)
            self._state = None
        return stop

    def kept(self, epoch: int) -> int:
        """The epoch whose end a phase that ends with this one is left at."""
        return self.best if self._settings.restore_best else epoch

    def _is_better(self, value: float) -> bool:
        if math.isnan(self._value):
            return not math.isnan(value)
        gain = value - self._value if HIGHER_IS_BETTER[self.metric] else self._value - value
        return gain > self._settings.min_delta


def metric_of(settings: EarlyStoppingSettings, objective: str) -> str:
    """The metric that is watched.

    Raises:
        ConfigError: the objective does not have it, or is unknown.
    """
    known = METRICS[check_objective(objective)]
    if settings.metric is not None and settings.metric not in known:
        raise ConfigError(
            f"early_stopping.metric: {settings.metric!r} is not measured for {objective}; known: {', '.join(known)}"
        )
    return settings.metric or known[0]


def _copied(value: Any) -> Any:
    """A copy of a nested state that training does not change; tensors are copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(inner) for inner in value]
    return value
