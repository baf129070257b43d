"""Load the folder that `port` wrote, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

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
    dtype: Any = None,
    *,
    weights: Any = None,
    checkpointing: bool = False,
    kernel: Kernel = "xla",
    place: Place | None = None,
) -> Mistral:
    """The Mistral of a ported folder: `load(folder)(ids)` are logits.

    Args:
        folder: that `perdure port` wrote.
        dtype: computed in, "float32" or "bfloat16" (or `jnp.float32`); None: that of the embedding in the file, but
            for float16 on a processor, which has no products of it: float32.
        weights: the type that matrices are kept in, likewise; None: that of the file. Norms keep theirs.
        checkpointing: see `Mistral`.
        kernel: of attention; "cudnn" is flash attention on an NVIDIA GPU, in bfloat16 or float16 alone.
        place: puts an array (its name, its values) on devices; None: on the first.

    Raises:
        ModelError: no ported folder, a torn one, or a type or kernel that is not to be had here.
    """
    folder = Path(folder)
    config, _, header = read_manifest(folder)
    dtype, weights = _checked("dtype", dtype), _checked("weights", weights)
    if kernel not in get_args(Kernel):
        raise ModelError(f"kernel {kernel!r}: must be one of {', '.join(get_args(Kernel))}")
    if kernel == "cudnn" and jax.default_backend() != "gpu":
        raise ModelError('kernel "cudnn" needs an NVIDIA GPU; take "xla"')
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
    own = str(model.embed.dtype)
    if own == "float16" and jax.default_backend() == "cpu":
        own = "float32"
    return but(model, dtype=dtype or own)


def _checked(name: str, given: Any) -> str | None:
    """The name of a type, given as that or as a type of JAX's or numpy's."""
    if given is None:
        return None
    try:
        found = given if isinstance(given, str) else str(jnp.dtype(given))
    except TypeError:
        found = repr(given)
    if found not in DTYPES.values():
        raise ModelError(f"{name} {found}: must be one of {', '.join(DTYPES.values())}")
    return found


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
