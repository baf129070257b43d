"""Load the folder that `port` wrote, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from perdure.errors import ModelError
from perdure.jax.mistral import Kernel, Mistral, but
from perdure.jax.source import WEIGHTS, read_manifest
from perdure.jax.tensors import Stored
from perdure.jax.tree import map_named

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
Place = Callable[[str, np.ndarray], jax.Array]


def load(
    folder: Path | str,
    dtype: str | None = None,
    *,
    weights: str | None = None,
    checkpointing: bool = False,
    kernel: Kernel = "xla",
    place: Place | None = None,
) -> Mistral:
    """The Mistral of a ported folder: `load(folder)(ids)` are logits.

    Args:
        folder: that `perdure port` wrote.
        dtype: computed in, "float32" or "bfloat16"; None: that of the embedding in the file.
        weights: the type that matrices are kept in; None: that of the file. Norms keep theirs.
        checkpointing: see `Mistral`.
        kernel: of attention; "cudnn" is flash attention on an NVIDIA GPU, in bfloat16 or float16 alone.
        place: puts an array (its name, its values) on devices; None: on the first.

    Raises:
        ModelError: no ported folder, or a torn one.
    """
    folder = Path(folder)
    config, _, header = read_manifest(folder)
    for name, given in (("dtype", dtype), ("weights", weights)):
        if given not in (None, *DTYPES.values()):
            raise ModelError(f"{name} {given!r}: must be one of {', '.join(DTYPES.values())}")
    put = place or (lambda _, values: jnp.asarray(values))

    def make(key: jax.Array) -> Mistral:
        return Mistral(config, key, checkpointing=checkpointing, kernel=kernel)

    def fill(name: str, wanted: Any) -> jax.Array:
        stored = header.tensors.get(name)
        if stored is None or stored.shape != wanted.shape:
            what = "lacks" if stored is None else f"has the shape {list(stored.shape)} of"
            raise ModelError(f"{folder / WEIGHTS}: {what} {name}; port the model again")
        values = read(stored)
        if weights is not None and "norm" not in name:
            values = values.astype(jnp.dtype(weights))
        return put(name, values)

    skeleton = eqx.filter_eval_shape(make, jax.random.key(0))
    arrays, rest = eqx.partition(skeleton, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    model: Mistral = eqx.combine(map_named(fill, arrays), rest)
    return but(model, dtype=dtype or str(model.embed.dtype))


def read(stored: Stored) -> np.ndarray:
    """A tensor's values.

    Raises:
        ModelError: a type that is no floating-point number of JAX.
    """
    if stored.dtype not in DTYPES:
        raise ModelError(f"{stored.file}: tensors of type {stored.dtype} are not read; known: {', '.join(DTYPES)}")
    values = np.empty(stored.shape, jnp.dtype(DTYPES[stored.dtype]))
    flat = values.reshape(-1).view(np.uint8)
    end = 0
    for piece in stored.pieces():
        flat[end : end + len(piece)] = np.frombuffer(piece, np.uint8)
        end += len(piece)
    return values
