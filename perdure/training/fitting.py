"""Out of memory: what of a step would have fitted, found by trying."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from perdure.errors import RunFailure
from perdure.types import IGNORE, Example

if TYPE_CHECKING:
    from perdure.training.learner import Learner

LEAST_TOKENS = 16
NAMES = {
    "rows": "micro_batch_size: {}",
    "length": "max_length: {}",
    "checkpointing": "gradient_checkpointing: true",
    "resume": "{} --set micro_batch_size={}",
}
"""How a run's settings are spelt; a command with options of its own has others."""


@dataclass(frozen=True, slots=True)
class Fits:
    """What did not fit into memory, and what did.

    Attributes:
        rows: rows that were to go through together.
        tokens: tokens of the longest of them.
        fitting_rows: the most that did, of halves, quarters and so on; None: not even one.
        fitting_tokens: rows of that length, cut, that did go through together; None: none, or there is no length.
        checkpointing: whether all of them did with gradient checkpointing; None where it was on, or cannot be.
    """

    rows: int
    tokens: int
    fitting_rows: int | None
    fitting_tokens: int | None
    checkpointing: bool | None


class OutOfMemory(RunFailure):
    """A step did not fit into memory; the state before it is saved.

    Args:
        fits: what would have fitted.
        steps: optimizer steps that are done and saved.
        again: the command that goes on with the run, if there is one.
        names: how the settings are spelt, by the keys of `NAMES`.
    """

    def __init__(self, fits: Fits, steps: int, again: str, names: Mapping[str, str] = NAMES) -> None:
        self.fits, self.steps, self.again = fits, steps, again
        length = f" of up to {fits.tokens:,} tokens" if fits.tokens > 1 else ""
        lines = [
            f"out of memory at step {steps + 1}: {fits.rows} rows{length} do not go through the model together."
        ]
        tried = []
        if fits.fitting_rows:
            tried.append(names["rows"].format(fits.fitting_rows))
        if fits.checkpointing:
            tried.append(names["checkpointing"])
        if fits.fitting_tokens:
            tried.append(names["length"].format(fits.fitting_tokens) + " (other data, so a new --out)")
        lines.append(
            f"Tried on the longest rows, and each enough by itself: {'; '.join(tried)}."
            if tried
            else "Tried on the longest rows: not even one fits. A smaller model or shorter rows would."
        )
        if fits.fitting_rows and again:
            command = names["resume"].format(again, fits.fitting_rows)
            lines.append(f"With the same effective batch it goes on with: {command}")
        super().__init__(" ".join(lines))


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory is full, of a device or of the machine."""
    words = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    said = (*words, "RESOURCE_EXHAUSTED")  # the last is JAX's
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in said)


def what_fits(learner: Learner, rows: Sequence[Example]) -> Fits:
    """Try the longest of these rows: fewer of them, shorter ones, and with gradient checkpointing.

    Everything is afterwards as it was.
    """
    gc.collect()
    settings = learner.settings
    size = min(settings.micro_batch_size or settings.batch_size, len(rows))
    longest = sorted(rows, key=_tokens, reverse=True)[:size]
    tokens = _tokens(longest[0])
    fewer = next((n for n in _halves(size, 1) if learner.fits(longest[:n])), None)
    shorter = next(
        (n for n in _halves(tokens, LEAST_TOKENS) if learner.fits([_cut(row, n) for row in longest])), None
    )
    return Fits(size, tokens, fewer, shorter, _with_checkpointing(learner, longest))


def _with_checkpointing(learner: Learner, rows: Sequence[Example]) -> bool | None:
    model = learner.model
    if learner.settings.gradient_checkpointing or not getattr(model, "supports_gradient_checkpointing", False):
        return None
    learner.checkpoint_gradients()
    try:
        return learner.fits(rows)
    finally:
        model.gradient_checkpointing_disable()  # type: ignore[operator]


def _halves(number: int, least: int) -> list[int]:
    found = []
    while (number := number // 2) >= least:
        found.append(number)
    return found


def _cut(row: Example, tokens: int) -> Example:
    """The end of a row, where its targets are; a label is left even of a row that ends in none."""
    if row.x is None or row.y is None:
        return row
    x, y = row.x[-tokens:], row.y[-tokens:].clone()
    if bool((y[1:] == IGNORE).all()):
        y[-1] = x[-1]
    return row.but(x=x, y=y)


def _tokens(row: Example) -> int:
    return 1 if row.x is None or row.x.dim() != 1 or row.x.is_floating_point() else len(row.x)
