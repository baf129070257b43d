"""Yields foretold by a trained model, with how sure it is and intervals that hold what they promise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from perdure.errors import ConfigError
from perdure.evaluation.score import by_length, evaluating
from perdure.memory.buffer import name_of
from perdure.models.regressor import Regressor
from perdure.order import priority, uniform
from perdure.training.learner import Learner
from perdure.training.settings import RunSettings
from perdure.types import Batch, Example

Method = Literal["mc-dropout", "ensemble", "none"]
Array = NDArray[np.float64]
LEVELS = tuple(round(0.05 * i, 2) for i in range(2, 20))  # 0.1 to 0.95
LEVEL = 0.9
FEWEST = 20  # rows that set the widths of intervals
FLOOR = 0.02  # of a standard deviation, in yields: what is all but certain may be wrong by as much


@dataclass(frozen=True, slots=True)
class Foretold:
    """Predictions of N rows.

    Attributes:
        mean: the model's own prediction, [N], yields as fractions.
        std: the spread of the samples or members, [N]; 0 throughout where there is neither.
    """

    mean: Array
    std: Array


def method_of(settings: RunSettings) -> Method:
    """How the spread of a run's predictions is found: its own setting, or what its head allows."""
    asked = settings.evaluation.uncertainty
    drops = settings.head.type != "linear" and settings.head.dropout > 0
    if asked != "auto":
        return asked
    return "ensemble" if settings.head.ensemble > 1 else "mc-dropout" if drops else "none"


def foretell(learner: Learner, rows: Sequence[Example], method: Method, samples: int, seed: int) -> Foretold:
    """Predictions of rows, in their order, and how they spread.

    "mc-dropout" samples the last layers' dropout (Gal and Ghahramani 2016, arXiv:1506.02142): no dropout comes
    before them, so that the rest is worked out once. "ensemble" takes the members' spread.
    """
    model = learner.model
    assert isinstance(model, Regressor)
    found: dict[str, tuple[float, float]] = {}
    generator_seed = priority(seed, "mc-dropout", key="") >> 1
    with evaluating(model), learner.autocast(), torch.random.fork_rng(devices=_devices(learner)):
        torch.manual_seed(generator_seed)
        for part in by_length(rows, learner.settings.evaluation_batch_size):
            batch = learner.collate(part)
            output = learner.strategy.forward(model, batch)
            if method == "ensemble":
                assert output.members is not None
                spread = output.members.double().std(1)
            elif method == "mc-dropout":
                spread = _dropped(learner, model, batch, samples).double().std(0)
            else:
                spread = torch.zeros(len(part))
            for row, mean, std in zip(part, output.logits.double().tolist(), spread.tolist(), strict=True):
                found[str(name_of(row))] = (mean, std)
    pairs = np.array([found[str(name_of(row))] for row in rows]).reshape(-1, 2)
    return Foretold(pairs[:, 0], pairs[:, 1])


def _dropped(learner: Learner, model: Regressor, batch: Batch, samples: int) -> torch.Tensor:
    """Predictions with dropout, [samples, B]."""
    drops = [module for module in model.head.modules() if isinstance(module, nn.Dropout)]
    plain = learner.strategy.forwards_plainly and hasattr(model.head, "pooled")
    assert isinstance(batch.x, torch.Tensor)
    try:
        for module in drops:
            module.train()
        if not plain:  # the strategy's own way through the model
            return torch.stack([learner.strategy.forward(model, batch).logits for _ in range(samples)])
        pooled = model.head.pooled(model.hidden(batch.x), batch.x >= 0)  # type: ignore[operator]
        repeated = pooled.repeat(samples, 1)  # [samples · B, D]
        said: torch.Tensor = model.head.answer(repeated)  # type: ignore[operator]
        return said.view(samples, -1)
    finally:
        for module in drops:
            module.eval()


def _devices(learner: Learner) -> list[torch.device]:
    return [learner.device] if learner.device.type == "cuda" else []


@dataclass(frozen=True, slots=True)
class Intervals:
    """Widths of intervals that cover as many rows as they say.

    A row's interval is its prediction ± factor · (std + floor): split conformal prediction with the error scaled by
    the model's own spread. It covers new rows that come as the held-out ones did, and promises nothing for others.

    Attributes:
        factors: by level.

    Source: Lei et al. 2018, "Distribution-Free Predictive Inference for Regression" (arXiv:1604.04173), 5.2.
    """

    factors: Mapping[float, float]

    @classmethod
    def fit(cls, foretold: Foretold, true: Array) -> Intervals:
        """From rows that the model was not trained on: the ⌈(n + 1)·level⌉-th smallest scaled error."""
        scores = np.sort(np.abs(true - foretold.mean) / (foretold.std + FLOOR))
        n = len(scores)
        factors = {}
        for level in LEVELS:
            rank = math.ceil(round((n + 1) * level, 9))  # 20 · 0.55 is 11, and more in floating point
            factors[level] = float(scores[rank - 1]) if 0 < rank <= n else math.inf
        return cls(factors)

    def check(self, level: float) -> None:
        """Refuse a level that there is no factor for, with a ConfigError."""
        if level not in self.factors:
            known = ", ".join(f"{one:g}" for one in self.factors)
            raise ConfigError(f"--level {level:g}: choose one of {known}")

    def bounds(self, foretold: Foretold, level: float = LEVEL) -> tuple[Array, Array]:
        """Lower and upper ends, within 0 and 1."""
        self.check(level)
        width = self.factors[level] * (foretold.std + FLOOR)
        return np.clip(foretold.mean - width, 0, 1), np.clip(foretold.mean + width, 0, 1)


def sets_width(row: Example, seed: int) -> bool:
    """Whether a held-out row is one of the half by which intervals are fitted; the others test them."""
    return uniform(seed, "calibration", row.task, key=row.key) < 0.5


def calibrate(
    foretold: Foretold, true: Array, fits: NDArray[np.bool_], method: Method
) -> tuple[Intervals | None, dict[str, Any]]:
    """Intervals fitted on the rows of `fits`, and how they and bare Gaussian ones cover the others.

    Returns:
        The intervals, None where too few rows are there to fit any; and what calibration.json holds.
    """
    if fits.sum() < FEWEST or (~fits).sum() < 1:
        return None, {}
    intervals = Intervals.fit(Foretold(foretold.mean[fits], foretold.std[fits]), true[fits])
    rest = Foretold(foretold.mean[~fits], foretold.std[~fits])
    truth = true[~fits]
    observed = []
    for level in LEVELS:
        lower, upper = intervals.bounds(rest, level)
        observed.append(float(np.mean((lower <= truth) & (truth <= upper))))
    error = np.abs(truth - rest.mean)
    raw = [float(np.mean(error <= NormalDist().inv_cdf(0.5 + level / 2) * rest.std)) for level in LEVELS]
    return intervals, {
        "format": 1,
        "method": method,
        "levels": list(LEVELS),
        "observed": observed,
        "observed_raw": raw if method != "none" else [],
        "rows": int((~fits).sum()),
        "fitted_on": int(fits.sum()),
        "factors": {f"{level:g}": factor for level, factor in intervals.factors.items()},
        "floor": FLOOR,
    }
