"""Named arrays and plain values as a folder of safetensors and JSON, written in one step; never pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from perdure.errors import ModelError
from perdure.jax.tensors import begin, header_text, read_header
from perdure.sealed import seal, unseal
from perdure.storage import guarded

NAMES = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "bool": "BOOL", "int8": "I8",
    "uint8": "U8", "int32": "I32", "uint32": "U32", "int64": "I64", "uint64": "U64",
}  # fmt: skip
TYPES = {short: long for long, short in NAMES.items()}


def save(path: Path, arrays: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Write arrays (of JAX or numpy) and plain values as a folder, in one step.

    Raises:
        StorageError: the disk refused; what was at `path` is intact.
    """
    shapes = [(name, NAMES[str(value.dtype)], tuple(value.shape)) for name, value in arrays.items()]
    with seal(path, dict(plain)) as place, guarded(path), place.open("wb") as file:
        begin(file, header_text(shapes, {}))
        for value in arrays.values():
            file.write(np.ascontiguousarray(np.asarray(value)).tobytes())


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the plain values that were saved.

    Raises:
        RunError: not a checkpoint, torn, altered, or of a newer format.
    """
    arrays = {}
    with unseal(path, ModelError) as (file, state):
        for name, stored in read_header(file).tensors.items():
            raw = np.frombuffer(b"".join(stored.pieces()), jnp.dtype(TYPES[stored.dtype]))
            arrays[name] = raw.reshape(stored.shape)
    return arrays, state
