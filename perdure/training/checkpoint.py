"""Nested state as safetensors and JSON, with a checksum; never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from perdure.config import FORMAT
from perdure.errors import NewerFormatError, RunError, StorageError
from perdure.storage import file_hash, folder, storage_error

TENSORS, PLAIN = "state.safetensors", "state.json"
MARK = "__tensor__"
PAIRS = "__pairs__"  # stands for a mapping that has one of these two among its keys


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state (dicts and lists of tensors and plain values) as a folder, in one step.

    Raises:
        StorageError: the disk refused; what was at `path` is intact.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, "", tensors)
    with folder(path) as aside:
        try:
            save_file(tensors, aside / TENSORS)
        except (SafetensorError, RuntimeError) as error:
            raise storage_error(path, error) from error
        record = {
            "format": FORMAT,
            "sha256": file_hash(aside / TENSORS),
            "state_sha256": _hash(tree),
            "state": tree,
        }
        (aside / PLAIN).write_text(json.dumps(record, allow_nan=True), encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """The state that was saved.

    Raises:
        RunError: not a checkpoint, torn, altered, or of a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        record = json.loads((path / PLAIN).read_text(encoding="utf-8"))
        if record["format"] > FORMAT:
            raise NewerFormatError(
                f"{path}: format {record['format']} is newer than this perdure reads ({FORMAT}); upgrade perdure"
            )
        if record["sha256"] != file_hash(path / TENSORS):
            raise RunError(f"{path}: {TENSORS} does not have the checksum that was written with it")
        if record["state_sha256"] != _hash(record["state"]):
            raise RunError(f"{path}: {PLAIN} does not have the checksum that was written with it")
        tensors = load_file(path / TENSORS)
        return _rebuild(record["state"], tensors)
    except (OSError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        raise RunError(f"{path}: not a readable checkpoint: {error}") from error


def _hash(tree: Any) -> str:
    # What JSON was written from and what it reads back are written alike.
    return hashlib.sha256(json.dumps(tree, allow_nan=True).encode()).hexdigest()


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = path
        while name in tensors:
            name += "'"
        # Tensors that share memory (tied, or views) are refused by the format: each gets its own copy.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {MARK: name}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"state at {path or 'the top'}: keys must be strings to be saved")
        flat = {key: _flatten(inner, f"{path}/{key}" if path else key, tensors) for key, inner in value.items()}
        return {PAIRS: [list(pair) for pair in flat.items()]} if flat.keys() & {MARK, PAIRS} else flat
    if isinstance(value, list | tuple):
        return [_flatten(inner, f"{path}/{i}", tensors) for i, inner in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state at {path!r}: a {type(value).__name__} can be saved neither as a tensor nor as JSON")


def _rebuild(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {MARK}:
            return tensors[value[MARK]]
        if set(value) == {PAIRS}:
            return {key: _rebuild(inner, tensors) for key, inner in value[PAIRS]}
        return {key: _rebuild(inner, tensors) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rebuild(inner, tensors) for inner in value]
    return value
