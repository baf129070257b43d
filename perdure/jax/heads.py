"""The multi-head attention regression head: from hidden states to one number between 0 and 1.

The same layers, under the same names, as torch's in `perdure.models.heads`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, PRNGKeyArray

from perdure.errors import ModelError
from perdure.jax.mistral import Linear, RMSNorm, rotary, rotate
from perdure.jax.tree import map_named, named

EPS = 1e-6  # of every RMSNorm
THETA = 10_000.0  # base of the rotary frequencies


def uniform_linear(out: int, into: int, key: PRNGKeyArray, bias: bool = True) -> Linear:
    """A linear layer that begins as torch's does: uniform within ±1/√in."""
    first, second = jax.random.split(key)
    limit = 1 / sqrt(into)
    weight = jax.random.uniform(first, (out, into), minval=-limit, maxval=limit)
    return Linear(weight, jax.random.uniform(second, (out,), minval=-limit, maxval=limit) if bias else None)


class Answer(eqx.Module):
    """Linear → dropout → RMSNorm → SiLU → linear → sigmoid: [B, D] → [B]."""

    hidden: Linear
    norm: RMSNorm
    last: Linear
    dropout: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "B D"], key: PRNGKeyArray | None = None) -> Float[Array, " B"]:
        """Numbers in (0, 1); units are dropped where a key is given."""
        y = self.hidden(x)
        if key is not None and self.dropout > 0:
            kept = jax.random.bernoulli(key, 1 - self.dropout, y.shape)
            y = jnp.where(kept, y / (1 - self.dropout), 0)
        return jax.nn.sigmoid(self.last(jax.nn.silu(self.norm(y))))[:, 0]


class MHAR(eqx.Module):
    """Multi-head attention regression, in float32 whatever the type of the hidden states.

    Rotary self-attention without a causal mask → RMSNorm(x + ·) → three linear layers with SiLU between →
    RMSNorm(x + ·) → attention pooling → linear → dropout → RMSNorm → SiLU → linear → sigmoid. Padding is neither
    attended to nor pooled; every row needs a real token.

    Args:
        width: of the hidden states, D.
        key: of the first weights.
        heads: of the self-attention; D must be an even multiple of it.
        hidden: units of the last hidden layer.
        dropout: share of those that are dropped in training.

    Raises:
        ModelError: the width cannot be shared among so many heads.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    attention_norm: RMSNorm
    mlp: list[Linear]
    mlp_norm: RMSNorm
    pool: Linear
    answer: Answer
    heads: int = eqx.field(static=True)

    def __init__(
        self, width: int, key: PRNGKeyArray, heads: int = 4, hidden: int = 1024, dropout: float = 0.2
    ) -> None:
        if width % (2 * heads):
            fitting = ", ".join(str(h) for h in range(1, 33) if width % (2 * h) == 0)
            raise ModelError(
                f"heads: hidden states of width {width} cannot be shared among {heads} heads, since rotary "
                f"positions need an even width a head; of up to 32 heads these would do: {fitting or 'none'}"
            )
        keys = jax.random.split(key, 10)
        self.query, self.key, self.value, self.output = (
            uniform_linear(width, width, k, bias=False) for k in keys[:4]
        )
        self.attention_norm = RMSNorm(jnp.ones(width), EPS)
        self.mlp = [uniform_linear(width, width, k) for k in keys[4:7]]
        self.mlp_norm = RMSNorm(jnp.ones(width), EPS)
        self.pool = uniform_linear(1, width, keys[7], bias=False)
        norm = RMSNorm(jnp.ones(hidden), EPS)
        self.answer = Answer(
            uniform_linear(hidden, width, keys[8]), norm, uniform_linear(1, hidden, keys[9]), dropout
        )
        self.heads = heads

    def __call__(
        self,
        states: Float[Array, "B T D"],
        mask: Bool[Array, "B T"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, " B"]:
        """Predictions [B]; `mask` is true where a token is real, `key` is that of dropout (None: eval mode)."""
        return self.answer(self.pooled(states, mask), key)

    def pooled(self, states: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None) -> Float[Array, "B D"]:
        """What stands before the last layers, and so before dropout."""
        states = states.astype(jnp.float32)
        x = self.attention_norm(states + self._attend(states, mask))
        inner = jax.nn.silu(self.mlp[0](x))
        inner = jax.nn.silu(self.mlp[1](inner))
        x = self.mlp_norm(x + self.mlp[2](inner))
        scores = self.pool(x)[..., 0]  # [B, T]
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, -1)
        return jnp.einsum("bt,btd->bd", weights, x)

    def _attend(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None) -> Float[Array, "B T D"]:
        def split(y: Array) -> Array:
            return y.reshape(*y.shape[:2], self.heads, -1)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        turn = rotary(x.shape[1], q.shape[-1], THETA)
        seen = None if mask is None else mask[:, None, None]  # [B, 1, 1, T]: nobody looks at padding
        mixed = jax.nn.dot_product_attention(rotate(q, turn), rotate(k, turn), v, mask=seen)
        return self.output(mixed.reshape(x.shape))


def from_torch_names(weights: Mapping[str, np.ndarray], heads: int = 4, dropout: float = 0.2) -> MHAR:
    """An MHAR of the state dict of torch's, as arrays by name.

    Raises:
        ModelError: a weight is missing, left over, or of another shape.
    """
    try:
        width, hidden = weights["query.weight"].shape[0], weights["answer.hidden.weight"].shape[0]
    except KeyError as error:
        raise ModelError(f"the weights of an MHAR need {error.args[0]}; there are {', '.join(weights)}") from error
    head = MHAR(width, jax.random.key(0), heads, hidden, dropout)
    wanted = named(head)
    if wanted.keys() != weights.keys():
        wrong = sorted(wanted.keys() ^ weights.keys())
        raise ModelError(f"these weights are missing or are none of an MHAR's: {', '.join(wrong)}")

    def fill(name: str, leaf: Array) -> Array:
        if weights[name].shape != leaf.shape:
            raise ModelError(f"{name}: must have the shape {list(leaf.shape)}, got {list(weights[name].shape)}")
        return jnp.array(weights[name], jnp.float32)

    return map_named(fill, head)


def to_torch_names(head: MHAR) -> dict[str, np.ndarray]:
    """The weights by the names that torch's have."""
    return {name: np.asarray(leaf) for name, leaf in named(head).items()}
