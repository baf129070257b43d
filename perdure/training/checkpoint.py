"""Nested state as safetensors and JSON, with checksums; never pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from perdure.sealed import seal, unseal
from perdure.storage import storage_error

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
    with seal(path, tree) as file:
        try:
            save_file(tensors, file)
        except (SafetensorError, RuntimeError) as error:
            raise storage_error(path, error) from error


def load(path: Path) -> dict[str, Any]:
    """The state that was saved.

    Raises:
        RunError: not a checkpoint, torn, altered, or of a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with unseal(path, SafetensorError) as (file, tree):
        found: dict[str, Any] = _rebuild(tree, load_file(file))
    return found


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
