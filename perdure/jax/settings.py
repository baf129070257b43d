"""What a training in JAX is asked to do, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from perdure.errors import ConfigError, StrategyError, unknown_name

STRATEGIES: dict[str, str] = {
    "joint": "all tasks at once",
    "sequential": "one task after another, and nothing against forgetting",
    "replay": "rows of earlier tasks beside the new ones",
    "ewc": "weights important to earlier tasks are pulled back to where those left them",
}
CHOICES: dict[str, tuple[str, ...]] = {
    "gradient": ("combined", "separate"),
    "tuning": ("head", "lora", "full"),
    "optimizer": ("adamw", "adafactor"),
    "precision": ("fp32", "bf16"),
    "at_boundary": ("reset", "continue"),
}


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How a regressor is trained through a stream of tasks.

    Attributes:
        strategy: see `STRATEGIES`.
        tuning: what is trained: the "head", the head and LoRA's factors ("lora"), or everything ("full").
        epochs: passes over each task.
        batch_size: new rows a step, B.
        length: tokens of a row, T; shorter rows are padded, longer ones refused.
        optimizer: "adamw", or "adafactor" with an absolute learning rate and its own clipping.
        lr: learning rate.
        weight_decay: decoupled, of all trained weights.
        betas: of AdamW.
        eps: of AdamW.
        clip: largest norm of the gradient of all weights together; None: any.
        precision: "bf16" computes the backbone in bfloat16; head, norms, trained weights and moments stay float32.
        at_boundary: whether a task begins with a new optimizer ("reset") or the old one ("continue").
        memory: rows that replay keeps; None: all.
        ratio: replayed rows for each new row of a task; counts as the decimal that is written.
        gradient: "combined": the mean loss over new and replayed rows together; "separate": half the mean over the
            new rows and half that over the replayed ones.
        ewc_strength: λ.
        fisher_rows: rows of a task that the Fisher information is estimated on; None: all.
        seed: of order, memory and dropout.

    Raises:
        StrategyError: a strategy that this backend has not.
        ConfigError: any other setting that cannot be; all such are named together.
    """

    strategy: str = "sequential"
    tuning: Literal["head", "lora", "full"] = "lora"
    epochs: int = 1
    batch_size: int = 32
    length: int = 128
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    at_boundary: Literal["reset", "continue"] = "reset"
    memory: int | None = None
    ratio: float = 1.0
    gradient: Literal["combined", "separate"] = "combined"
    ewc_strength: float = 100.0
    fisher_rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise StrategyError(unknown_name("strategy of the jax backend", self.strategy, STRATEGIES))
        wrong = [
            f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
            for name, known in CHOICES.items()
            if getattr(self, name) not in known
        ]
        for name in ("epochs", "batch_size", "length", "memory", "fisher_rows"):
            value = getattr(self, name)
            optional = name in ("memory", "fisher_rows")
            if not (optional and value is None) and (type(value) is not int or value < 1):
                wrong.append(f"{name} must be a whole number of at least 1, got {value!r}")
        if not self.lr > 0 or (self.clip is not None and not self.clip > 0) or not self.eps > 0:
            wrong.append(f"lr, eps and clip must be above 0, got {self.lr}, {self.eps} and {self.clip}")
        if not self.weight_decay >= 0 or not self.ewc_strength >= 0:
            given = f"{self.weight_decay} and {self.ewc_strength}"
            wrong.append(f"weight_decay and ewc_strength must not be negative, got {given}")
        if not 0 < self.ratio < float("inf"):
            wrong.append(f"ratio must be above 0, got {self.ratio}")
        if wrong:
            raise ConfigError("; ".join(wrong))

    @property
    def slots(self) -> int:
        """Rows of a step's batch, new and replayed."""
        return self.batch_size + self.replayed

    @property
    def replayed(self) -> int:
        """Most replayed rows of a step."""
        return math.ceil(self._share * self.batch_size)

    def drawn(self, new: int) -> int:
        """How many rows are replayed in a task with its first `new` rows: ⌊ratio · new⌋."""
        return int(self._share * new)

    @property
    def _share(self) -> Fraction:
        # 0.29 as a float times 100 is below 29; the decimal that was written is meant.
        return Fraction(repr(float(self.ratio))) if self.strategy == "replay" else Fraction(0)
