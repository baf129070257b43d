"""The head in JAX against torch's with the same weights, and what a wrong one would give."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from perdure.errors import ModelError
from perdure.jax import MHAR
from perdure.jax import heads as module
from perdure.jax.heads import from_torch_names, to_torch_names
from perdure.models.heads import MHAR as Torch

WIDTH, HEADS, HIDDEN = 24, 3, 20


@pytest.fixture(scope="module")
def theirs() -> Torch:
    torch.manual_seed(0)
    head = Torch(WIDTH, HEADS, HIDDEN).eval()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() > 1:
                parameter.mul_(3)  # so that attention is sharp and a wrong mask shows
    return head


@pytest.fixture(scope="module")
def weights(theirs: Torch) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in theirs.state_dict().items()}


@pytest.fixture(scope="module")
def states() -> Any:
    return jnp.asarray(np.random.default_rng(1).normal(size=(4, 9, WIDTH)), jnp.float32)


@pytest.fixture(scope="module")
def mask() -> Any:
    return jnp.arange(9) < jnp.array([9, 5, 1, 7])[:, None]


@jax.jit
def run(head: MHAR, *given: Any, key: Any = None) -> Any:
    """Compiled once for each kind of arguments."""
    return head(*given, key=key)


def there(value: Any) -> torch.Tensor:
    return torch.tensor(np.array(value))


def gap(head: MHAR, theirs: Torch, *given: Any, run: Any = run) -> float:
    """The largest difference of predictions."""
    return float(np.abs(np.asarray(run(head, *given)) - theirs(*map(there, given)).detach().numpy()).max())


def test_it_is_torchs(theirs: Torch, weights: Any, states: Any, mask: Any) -> None:
    head = from_torch_names(weights, HEADS)
    assert gap(head, theirs, states, mask) < 1e-5
    assert gap(head, theirs, states) < 1e-5


def test_names_there_and_back(weights: Any) -> None:
    again = to_torch_names(from_torch_names(weights, HEADS))
    assert again.keys() == weights.keys()
    assert all(np.array_equal(again[name], weights[name]) for name in weights)


def test_gradients_are_torchs(theirs: Torch, weights: Any, states: Any, mask: Any) -> None:
    def loss(head: MHAR) -> Any:
        return jnp.sum(head(states, mask) ** 2)

    ours = to_torch_names(jax.jit(jax.grad(loss))(from_torch_names(weights, HEADS)))
    theirs.zero_grad()
    (theirs(there(states), there(mask)) ** 2).sum().backward()
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        np.testing.assert_allclose(ours[name], parameter.grad.numpy(), atol=1e-5, rtol=1e-4)


def causal(call: Any) -> Any:
    return lambda q, k, v, mask=None: call(q, k, v, mask=mask, is_causal=True)


def unmasked(call: Any) -> Any:
    return lambda q, k, v, mask=None: call(q, k, v)


def wrong(head: MHAR, *given: Any) -> Any:
    """Compiled anew, so that what a test has changed is met."""
    return jax.jit(lambda given: head(*given))(given)


@pytest.mark.parametrize("make", [causal, unmasked], ids=["causal mask", "padding attended to"])
def test_a_wrong_one_is_told(
    make: Any, theirs: Torch, weights: Any, states: Any, mask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax.nn, "dot_product_attention", make(jax.nn.dot_product_attention))
    assert gap(from_torch_names(weights, HEADS), theirs, states, mask, run=wrong) > 1e-4


def test_interleaved_rotary_is_told(
    theirs: Torch, weights: Any, states: Any, mask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interleaved(x: Any, turn: Any) -> Any:
        cos, sin = (part[:, None] for part in turn)
        left, right = x[..., ::2], x[..., 1::2]
        return jnp.stack((left * cos - right * sin, right * cos + left * sin), -1).reshape(x.shape)

    monkeypatch.setattr(module, "rotate", interleaved)
    assert gap(from_torch_names(weights, HEADS), theirs, states, mask, run=wrong) > 1e-4


def test_padding_says_nothing(weights: Any, states: Any, mask: Any) -> None:
    head = from_torch_names(weights, HEADS)
    other = jnp.where(mask[..., None], states, 100.0)
    np.testing.assert_array_equal(run(head, states, mask), run(head, other, mask))


def test_dropout_needs_a_key(weights: Any, states: Any) -> None:
    head = from_torch_names(weights, HEADS, dropout=0.5)
    first, again, other = (run(head, states, key=jax.random.key(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, run(head, states))


def test_what_dropout_keeps_is_scaled() -> None:
    """Of units that are all 1 a kept one is 1 / 0.5 = 2; k of 1,000 kept make the norm 2 / √(4k / 1,000)."""
    x = jnp.ones((1, 1000))
    kept = jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)
    kept_value = 2 / np.sqrt(4 * float(kept.mean()) + 1e-6)
    silu = kept_value / (1 + np.exp(-kept_value))
    wanted = 1 / (1 + np.exp(-(silu * kept.sum() / 1000)))
    norm, last = module.RMSNorm(jnp.ones(1000), 1e-6), module.Linear(jnp.full((1, 1000), 1e-3))
    answer = module.Answer(module.Linear(jnp.eye(1000)), norm, last, 0.5)
    np.testing.assert_allclose(jax.jit(lambda x, key: answer(x, key))(x, jax.random.key(0)), [wanted], rtol=1e-5)


def test_what_does_not_fit_is_refused(weights: Any) -> None:
    with pytest.raises(ModelError, match="cannot be shared among 5 heads"):
        MHAR(24, jax.random.key(0), heads=5)
    with pytest.raises(ModelError, match=r"missing or are none of an MHAR's: extra"):
        from_torch_names({**weights, "extra": np.zeros(1)}, HEADS)
    with pytest.raises(ModelError, match=r"need answer\.hidden\.weight"):
        from_torch_names({"query.weight": weights["query.weight"]})
    with pytest.raises(ModelError, match=r"pool.weight: must have the shape \[1, 24\], got \[2\]"):
        from_torch_names({**weights, "pool.weight": np.zeros(2)}, HEADS)
