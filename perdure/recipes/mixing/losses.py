"""The losses of single rows, kept in a file with hashes of what they were measured under."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from perdure.memory.buffer import name_of
from perdure.models.adapters import moving
from perdure.storage import write_json
from perdure.types import Context, Example

FORMAT = 1
Losses = Callable[[Context, Sequence[Example]], Mapping[str, float]]


class CachedLosses:
    """Measures losses, or reads them from `<task>_losses_<N>_samples.json` where exactly they were measured before.

    A file counts only if the base model, every trained weight and every token of the rows are those that its hashes
    were taken of. Otherwise it is written anew.

    Args:
        folder: of the file.
        task: how the task is called in its name.
        base: hashes of the base model's files.
        measure: (context, rows) -> loss by `name_of`.
        say: told in a line what was done.
    """

    def __init__(
        self, folder: Path, task: str, base: Mapping[str, str], measure: Losses, say: Callable[[str], None]
    ) -> None:
        self.folder, self.task, self.base = folder, task, dict(base)
        self.measure, self.say = measure, say

    def __call__(self, ctx: Context, rows: Sequence[Example]) -> dict[str, float]:
        """The loss of each row, by `name_of`."""
        path = self.folder / f"{self.task}_losses_{len(rows)}_samples.json"
        stamp = {"base": self.base, "weights": weights_hash(ctx.model), "rows": rows_hash(rows)}
        if (found := self._read(path, stamp)) is not None:
            self.say(f"losses of {len(rows):,} rows: {path}")
            return {str(name_of(row)): found[row.key] for row in rows}
        losses = self.measure(ctx, rows)
        by_key = {row.key: losses[str(name_of(row))] for row in rows}
        write_json(path, {"format": FORMAT, "unit": "nats a target token", **stamp, "losses": by_key})
        self.say(f"losses of {len(rows):,} rows measured: {path}")
        return dict(losses)

    @staticmethod
    def _read(path: Path, stamp: Mapping[str, Any]) -> Mapping[str, float] | None:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT or any(values[key] != value for key, value in stamp.items()):
                return None
            return {key: float(loss) for key, loss in values["losses"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # not there, or no file of ours: it is measured again


def rows_hash(rows: Sequence[Example]) -> str:
    """SHA-256 of the keys, token ids and labels of encoded rows, in order."""
    found = sha256()
    for row in rows:
        found.update(json.dumps([row.key, *(None if t is None else t.tolist() for t in (row.x, row.y))]).encode())
    return found.hexdigest()


def weights_hash(model: Any) -> str:
    """SHA-256 of all that training changes in a model, by name."""
    found = sha256()
    for name, value in sorted(moving(model).items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(_bytes(value))
    return found.hexdigest()


def _bytes(value: Tensor) -> bytes:
    import torch

    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
