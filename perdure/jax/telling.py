"""What a training in JAX tells of itself: what a step came to, and where in the stream it stands."""

from __future__ import annotations

from dataclasses import dataclass

from perdure.jax.rows import Row


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step came to.

    Attributes:
        loss: Σ weight · ½(p − y)², before the update.
        penalty: EWC's, else 0.
        norm: of the gradient, penalty included, before clipping.
        new: new rows.
        replayed: replayed rows.
        rows: all of them, new ones first.
    """

    loss: float
    penalty: float
    norm: float
    new: int
    replayed: int
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the stream the training stands: `batch` batches of this epoch of this task are done."""

    task: int = 0
    epoch: int = 0
    batch: int = 0
