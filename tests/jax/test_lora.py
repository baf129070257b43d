"""LoRA: nothing at first, the same when merged, and only its factors are trained."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perdure.errors import ConfigError, ModelError
from perdure.jax import LoRA, add_lora, merge_lora
from perdure.jax.lora import trainable
from perdure.jax.mistral import Linear
from perdure.jax.tree import map_named, named


@pytest.fixture(scope="module")
def moved(backbone: Any) -> Any:
    """LoRA whose B is no longer zero."""
    adapted = add_lora(backbone, jax.random.key(0), r=3, alpha=12)
    rng = np.random.default_rng(0)
    return map_named(
        lambda name, leaf: (
            jnp.asarray(rng.normal(size=leaf.shape) / 9, leaf.dtype) if name.endswith(".b") else leaf
        ),
        adapted,
    )


def test_by_hand() -> None:
    """W = [[1, 2]], A = [[3, 4]], B = [[5]], α/r = 0.5: 1 + 2 + 0.5 · 5 · (3 + 4) = 20.5 for x = [1, 1]."""
    layer = LoRA(Linear(jnp.array([[1.0, 2.0]])), jnp.array([[3.0, 4.0]]), jnp.array([[5.0]]), 0.5)
    assert layer(jnp.ones(2)).tolist() == [20.5]
    assert layer.merged().weight.tolist() == [[8.5, 12.0]]


def test_it_begins_with_nothing(backbone: Any, ids: Any) -> None:
    adapted = add_lora(backbone, jax.random.key(0), r=3, alpha=12, targets=("query", "down"))
    np.testing.assert_array_equal(adapted(ids), backbone(ids))
    assert adapted.layers.attention.query.scale == 4
    assert isinstance(adapted.layers.attention.key, Linear)
    assert adapted.layers.mlp.down.a.shape == (3, 3, 40)


def test_layers_begin_apart(backbone: Any) -> None:
    adapted = add_lora(backbone, jax.random.key(0), r=3)
    a = adapted.layers.attention.query.a
    assert not np.array_equal(a[0], a[1])
    assert not np.array_equal(a, adapted.layers.attention.key.a)
    assert float(jnp.abs(a).max()) <= 1 / np.sqrt(32)


def test_merged_equals_unmerged(backbone: Any, moved: Any, ids: Any) -> None:
    plain = merge_lora(moved)
    assert jax.tree.structure(plain) == jax.tree.structure(backbone)
    apart = np.abs(np.asarray(moved(ids)) - np.asarray(backbone(ids))).max()
    assert np.abs(np.asarray(plain(ids)) - np.asarray(moved(ids))).max() < 1e-4 < 0.1 < apart


@pytest.mark.parametrize(("tuning", "count"), [("head", 18), ("lora", 18 + 14), ("full", 18 + 11 + 14)])
def test_what_is_trained(tuning: Any, count: int, make_regressor: Any) -> None:
    """MHAR has 18 weights; 7 layers have A and B each; a Mistral without head has 11 more, stacked."""
    mask = named(trainable(make_regressor(lora=True), tuning))
    trained = {name for name, yes in mask.items() if yes}
    assert len(trained) == count
    assert all(name.startswith("head.") or tuning == "full" or name.endswith((".a", ".b")) for name in trained)


def test_mistakes(make_regressor: Any, moved: Any, backbone: Any) -> None:
    key = jax.random.key(0)
    with pytest.raises(ConfigError, match=r"targets \['q_proj'\]: must be some of query, key"):
        add_lora(backbone, key, targets=["q_proj"])
    with pytest.raises(ConfigError, match="r must be at least 1, got 0"):
        add_lora(backbone, key, r=0)
    with pytest.raises(ModelError, match="query has LoRA already"):
        add_lora(moved, key)
    with pytest.raises(ConfigError, match="the backbone has no LoRA"):
        trainable(make_regressor(lora=False), "lora")
    with pytest.raises(ConfigError, match="tuning 'half': must be one of head, lora, full"):
        trainable(make_regressor(), "half")
