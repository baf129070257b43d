"""Mistral in JAX and Equinox, with continual learning; knows nothing of torch.

`perdure.jax.port` and `MistralConfig` need numpy alone; all else needs the extra `jax`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perdure.jax.config import MistralConfig
    from perdure.jax.fit import train
    from perdure.jax.heads import MHAR
    from perdure.jax.learner import Learner
    from perdure.jax.lora import LoRA, add_lora, merge_lora
    from perdure.jax.mistral import Mistral
    from perdure.jax.ported import load
    from perdure.jax.regressor import Regressor
    from perdure.jax.rows import Row, RowTask
    from perdure.jax.settings import FitSettings
    from perdure.jax.telling import Position

_HOMES = {
    "FitSettings": "perdure.jax.settings",
    "Learner": "perdure.jax.learner",
    "LoRA": "perdure.jax.lora",
    "MHAR": "perdure.jax.heads",
    "Mistral": "perdure.jax.mistral",
    "MistralConfig": "perdure.jax.config",
    "Position": "perdure.jax.telling",
    "Regressor": "perdure.jax.regressor",
    "Row": "perdure.jax.rows",
    "RowTask": "perdure.jax.rows",
    "add_lora": "perdure.jax.lora",
    "load": "perdure.jax.ported",
    "merge_lora": "perdure.jax.lora",
    "train": "perdure.jax.fit",
}
__all__ = [
    "MHAR",
    "FitSettings",
    "Learner",
    "LoRA",
    "Mistral",
    "MistralConfig",
    "Position",
    "Regressor",
    "Row",
    "RowTask",
    "add_lora",
    "load",
    "merge_lora",
    "train",
]
INSTALL = "pip install 'perdure[jax]'"


def __getattr__(name: str) -> Any:
    # Imported when first used: a port needs no JAX, and who asks for a page of help no arrays.
    if name in _HOMES:
        from importlib import import_module

        try:
            return getattr(import_module(_HOMES[name]), name)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] in ("jax", "jaxlib", "equinox", "optax", "jaxtyping"):
                from perdure.errors import ConfigError

                raise ConfigError(
                    f"the jax backend needs {error.name}, which is not installed: {INSTALL}"
                ) from error
            raise
    raise AttributeError(f"module 'perdure.jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
