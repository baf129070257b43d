"""LoRA on the linear layers of a Mistral, and which weights are trained."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

from perdure.errors import ConfigError, ModelError
from perdure.jax.mistral import Linear, Mistral
from perdure.jax.tree import map_named

TUNINGS: dict[str, str] = {
    "head": "the regression head; the backbone is frozen",
    "lora": "the regression head and LoRA's factors",
    "full": "everything",
}
TARGETS = ("query", "key", "value", "output", "gate", "up", "down")


class LoRA(eqx.Module):
    """x Wᵀ + scale · (x Aᵀ) Bᵀ, with scale = α / r; B begins at zero, so that nothing changes at first.

    Source: Hu et al. 2021 (arXiv:2106.09685).
    """

    base: Linear
    a: Float[Array, "*layers r in"]
    b: Float[Array, "*layers out r"]
    scale: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        """The layer with its adapter."""
        inner = x @ self.a.astype(x.dtype).T
        return self.base(x) + self.scale * (inner @ self.b.astype(x.dtype).T)

    def merged(self) -> Linear:
        """The plain layer that does the same: W + scale · B A, in W's type."""
        change = self.scale * jnp.matmul(self.b, self.a, preferred_element_type=jnp.float32)
        return Linear(
            (self.base.weight.astype(jnp.float32) + change).astype(self.base.weight.dtype), self.base.bias
        )


def add_lora(
    model: Mistral, key: PRNGKeyArray, r: int = 16, alpha: float | int = 64, targets: Sequence[str] = TARGETS
) -> Mistral:
    """The model with LoRA on these layers; its factors are float32.

    A is uniform within ±1/√in, as PEFT's, B zero.

    Args:
        model: without LoRA on these layers.
        key: of A.
        r: rank, at least 1.
        alpha: the adapter is multiplied by alpha / r.
        targets: among query, key, value, output, gate, up and down.

    Raises:
        ConfigError: an unknown target, or a rank below 1.
        ModelError: a layer has LoRA already.
    """
    if r < 1:
        raise ConfigError(f"r must be at least 1, got {r}")
    unknown = [name for name in targets if name not in TARGETS]
    if unknown or not targets:
        raise ConfigError(f"targets {list(targets)}: must be some of {', '.join(TARGETS)}")
    for name in sorted(set(targets), key=TARGETS.index):
        base = _layer(model, name)
        if isinstance(base, LoRA):
            raise ModelError(f"{name} has LoRA already; merge it first")
        *count, out, into = base.weight.shape
        limit = 1 / sqrt(into)
        fold = jax.random.fold_in(key, TARGETS.index(name))
        a = jax.random.uniform(fold, (*count, r, into), minval=-limit, maxval=limit)
        model = _replaced(model, name, LoRA(base, a, jnp.zeros((*count, out, r)), alpha / r))
    return model


def merge_lora(model: Mistral) -> Mistral:
    """The model with every adapter added to its layer."""
    for name in TARGETS:
        layer = _layer(model, name)
        if isinstance(layer, LoRA):
            model = _replaced(model, name, layer.merged())
    return model


def trainable(model: Any, tuning: str) -> Any:
    """Of a model with a head (see `Regressor`), a tree of booleans: which weights are trained.

    Raises:
        ConfigError: an unknown tuning, or "lora" without LoRA.
    """
    if tuning not in TUNINGS:
        raise ConfigError(f"tuning {tuning!r}: must be one of {', '.join(TUNINGS)}")

    def trained(name: str, leaf: Any) -> bool:
        return eqx.is_inexact_array(leaf) and (
            tuning == "full" or name.startswith("head.") or (tuning == "lora" and name.endswith((".a", ".b")))
        )

    mask = map_named(trained, model)
    if tuning == "lora" and not any(isinstance(_layer(model.backbone, name), LoRA) for name in TARGETS):
        raise ConfigError("tuning lora: the backbone has no LoRA; make it with add_lora")
    return mask


def _layer(model: Mistral, name: str) -> Any:
    home = model.layers.attention if hasattr(model.layers.attention, name) else model.layers.mlp
    return getattr(home, name)


def _replaced(model: Mistral, name: str, layer: Any) -> Mistral:
    changed: Mistral = eqx.tree_at(lambda m: _layer(m, name), model, layer)
    return changed
