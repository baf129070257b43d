"""Mistral in Equinox against transformers', layer by layer, and what a wrong one would give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from perdure.errors import ModelError
from perdure.jax import Mistral, MistralConfig, load
from perdure.jax import mistral as module
from perdure.jax.mistral import but
from perdure.jax.port import port


def worst(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max())


def states(model: Any, ids: Any) -> Any:
    return jax.jit(lambda ids: model.states(ids))(ids)


@pytest.fixture(scope="module")
def theirs(mistral: Any, ids: Any) -> Any:
    with torch.no_grad():
        return mistral(torch.tensor(ids).long(), output_hidden_states=True)


def test_logits_are_those_of_transformers(backbone: Any, ids: Any, theirs: Any) -> None:
    assert worst(backbone(ids), theirs.logits) < 1e-4
    assert worst(backbone(ids[1]), theirs.logits[1]) < 1e-4
    assert backbone(ids[1]).dtype == jnp.float32


def test_hidden_states_are_those_of_transformers(backbone: Any, ids: Any, theirs: Any) -> None:
    ours = jax.jit(lambda ids: backbone.all_states(ids))(ids)
    assert len(theirs.hidden_states) == len(ours) == 4
    assert [worst(a, b) < 1e-4 for a, b in zip(ours, theirs.hidden_states, strict=True)] == [True] * 4
    assert worst(states(backbone, ids), theirs.hidden_states[-1]) < 1e-4


def test_what_comes_later_changes_nothing(backbone: Any, ids: Any) -> None:
    padded = np.where(np.arange(17) < 9, ids, 0)
    assert worst(backbone(ids)[:, :9], backbone(padded)[:, :9]) < 1e-5


def interleaved(x: Any, turn: Any) -> Any:
    """Rotary positions of pairs (2i, 2i + 1), as in Mistral's own files."""
    cos, sin = (part[:, None] for part in turn)
    left, right = x[..., ::2], x[..., 1::2]
    return jnp.stack((left * cos - right * sin, right * cos + left * sin), -1).reshape(x.shape)


def tiled(attend: Any) -> Any:
    """Heads of keys and values repeated one after another, in place of each as often as it is shared."""

    def wrong(q: Any, k: Any, v: Any, window: Any, kernel: Any = "xla") -> Any:
        times = q.shape[2] // k.shape[2]
        return attend(q, jnp.tile(k, (1, 1, times, 1)), jnp.tile(v, (1, 1, times, 1)), window, kernel)

    return wrong


def windowed(change: Callable[[int], int | None]) -> Any:
    def make(attend: Any) -> Any:
        return lambda q, k, v, window, kernel="xla": attend(q, k, v, change(window), kernel)

    return make


MUTANTS = {
    "no window": ("attend", windowed(lambda w: None)),
    "a window of one more": ("attend", windowed(lambda w: w + 1)),
    "interleaved rotary positions": ("rotate", lambda _: interleaved),
    "heads of keys and values tiled": ("attend", tiled),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_one_is_told(
    name: str, backbone: Any, ids: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, make = MUTANTS[name]
    monkeypatch.setattr(module, what, make(getattr(module, what)))
    assert worst(states(backbone, ids), theirs.hidden_states[-1]) > 1e-2


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None, "tie_word_embeddings": True, "num_key_value_heads": 1},
        {"sliding_window": 100, "num_key_value_heads": 4, "rms_norm_eps": 0.1},
    ],
    ids=["tied, no window", "window past the text"],
)
def test_other_shapes(changes: Any, make_mistral: Any, ids: Any, tmp_path: Path) -> None:
    model = make_mistral(num_hidden_layers=1, **changes)
    model.save_pretrained(tmp_path / "a")
    ours = load(port(tmp_path / "a", tmp_path / "b"))
    assert worst(ours(ids), model(torch.tensor(ids).long()).logits.detach()) < 1e-4


def test_llama_is_a_mistral_without_a_window(make_lm: Any, tmp_path: Path, ids: Any) -> None:
    model = make_lm("llama", spread=0.3)
    model.save_pretrained(tmp_path / "a")
    ours = load(port(tmp_path / "a", tmp_path / "b"))
    assert worst(ours(ids % 40), model(torch.tensor(ids % 40).long()).logits.detach()) < 1e-4


def equations(depth: int) -> int:
    """Operations that the compiler is given, those within the scan included."""
    config = MistralConfig(24, 16, 16, depth, 2, 1, 8, 4)
    model = eqx.filter_eval_shape(lambda key: Mistral(config, key), jax.random.key(0))
    arrays, rest = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    run = jax.make_jaxpr(lambda a, ids: eqx.combine(a, rest).states(ids))
    return str(run(arrays, jax.ShapeDtypeStruct((1, 6), jnp.int32))).count(" = ")


def test_what_is_compiled_does_not_grow_with_depth() -> None:
    assert equations(1) == equations(12) > 20


def test_checkpointing_changes_memory_and_no_gradient(backbone: Any, ids: Any) -> None:
    def gradient(model: Any) -> Any:
        run = jax.jit(jax.grad(lambda model: jnp.sum(model.states(jnp.asarray(ids)) ** 2)))
        return run(model).layers.attention.query.weight, str(jax.make_jaxpr(run)(model))

    plain, plain_text = gradient(backbone)
    saved, saved_text = gradient(but(backbone, checkpointing=True))
    np.testing.assert_allclose(saved, plain, rtol=1e-4, atol=1e-4)
    assert "remat" in saved_text
    assert "remat" not in plain_text


def test_bfloat16_keeps_its_types(backbone: Any, ids: Any, theirs: Any) -> None:
    half = but(backbone, dtype="bfloat16")
    found = states(half, ids)
    assert found.dtype == jnp.bfloat16
    gap = worst(found, theirs.hidden_states[-1]) / worst(theirs.hidden_states[-1], 0)
    assert 0 < gap < 0.1
    assert half(ids).dtype == jnp.float32


def test_shapes_are_checked_here(backbone: Any) -> None:
    pytest.importorskip("beartype")
    with pytest.raises(Exception, match="Int"):
        backbone.states(jnp.zeros((2, 3)))


def test_an_unknown_token_gives_no_number(backbone: Any, ids: Any) -> None:
    """JAX would take the last embedding in its place. The other rows are as they were."""
    import jax.numpy as jnp

    found = np.asarray(backbone(jnp.asarray(ids).at[0, 4].set(10_000)))
    assert np.isnan(found[0]).all()
    assert np.array_equal(found[1], backbone(ids)[1])


def test_no_head_no_logits(make_regressor: Any, ids: Any) -> None:
    with pytest.raises(ModelError, match="no head to make logits"):
        make_regressor().backbone(ids)
