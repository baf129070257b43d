"""Mistral: embedding, layers of grouped-query attention and SwiGLU with RMSNorm, logits.

Knows shapes and sums; nothing of files, tasks or training. Rows are padded on the right: a token sees only those
before it, so that padding needs no mask here.
"""

from __future__ import annotations

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int, PRNGKeyArray

from perdure.errors import ModelError
from perdure.jax.config import MistralConfig

Kernel = Literal["xla", "cudnn"]


class Linear(eqx.Module):
    """x Wᵀ + b in the type of x, whatever the type that the weights are kept in."""

    weight: Float[Array, "*layers out in"]
    bias: Float[Array, "*layers out"] | None = None

    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        """One layer's product."""
        y = x @ self.weight.astype(x.dtype).T
        return y if self.bias is None else y + self.bias.astype(x.dtype)


class RMSNorm(eqx.Module):
    """x / √(mean x² + ε) times a weight, in float32."""

    weight: Float[Array, "*layers D"]
    eps: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """The normed rows, in the type of x."""
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (y * self.weight.astype(jnp.float32)).astype(x.dtype)


def rotary(length: int, width: int, theta: float) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Cosines and sines of the angles position · theta^(−2i / width), float32."""
    half = width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], turn: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Rotary positions: the pairs (i, i + H/2) of each head turn by their position's angle.

    Source: Su et al. 2021, "RoFormer" (arXiv:2104.09864), in the half-split layout of Hugging Face.
    """
    cos, sin = (part[:, None].astype(x.dtype) for part in turn)  # [T, 1, H / 2]
    left, right = jnp.split(x, 2, -1)
    return jnp.concatenate((left * cos - right * sin, right * cos + left * sin), -1)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    window: int | None,
    kernel: Kernel = "xla",
) -> Float[Array, "B T N H"]:
    """Causal attention in which heads n·N/K to (n + 1)·N/K − 1 of the queries share head n of keys and values.

    With a window a token sees itself and the `window` − 1 before it.
    """
    seen = None if window is None or window >= q.shape[1] else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=seen, implementation=kernel)


class Attention(eqx.Module):
    """Grouped-query attention with rotary positions over a sliding window."""

    query: Any  # Linear, or what stands in its place, such as LoRA
    key: Any
    value: Any
    output: Any
    head_dim: int = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    kernel: Kernel = eqx.field(static=True)

    def __call__(self, x: Float[Array, "B T D"], turn: tuple[Array, Array]) -> Float[Array, "B T D"]:
        """What the tokens take from those before them."""

        def split(y: Array) -> Array:
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        mixed = attend(rotate(q, turn), rotate(k, turn), v, self.window, self.kernel)
        return self.output(mixed.reshape(*x.shape[:2], -1))


class MLP(eqx.Module):
    """SwiGLU: down(silu(gate x) · up x)."""

    gate: Any
    up: Any
    down: Any

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Each token by itself."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(eqx.Module):
    """x + attention(norm x), then x + perceptron(norm x)."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: MLP

    def __call__(self, x: Float[Array, "B T D"], turn: tuple[Array, Array]) -> Float[Array, "B T D"]:
        """The next hidden states."""
        x = x + self.attention(self.attention_norm(x), turn)
        return x + self.mlp(self.mlp_norm(x))


class Mistral(eqx.Module):
    """A Mistral whose layers are one `Layer` with a first dimension of layers, which a scan runs over.

    Attributes:
        embed: [V, D].
        layers: each weight [L, ...].
        norm: of the last hidden states.
        head: what makes logits; None where the embedding does, or where none are wanted.
        config: shape and constants.
        dtype: that is computed in; weights are kept in their own.
        checkpointing: keep each layer's input alone for the backward pass, and compute the rest of it again.
    """

    embed: Float[Array, "V D"]
    layers: Layer
    norm: RMSNorm
    head: Linear | None
    config: MistralConfig = eqx.field(static=True)
    dtype: str = eqx.field(static=True)
    checkpointing: bool = eqx.field(static=True)

    def __init__(
        self,
        config: MistralConfig,
        key: PRNGKeyArray,
        dtype: str = "float32",
        checkpointing: bool = False,
        kernel: Kernel = "xla",
        std: float = 0.02,
    ) -> None:
        """Random weights: normal matrices of standard deviation `std`, norms of one."""
        keys = iter(jax.random.split(key, 9))
        c, count = config, config.num_hidden_layers

        def normal(*shape: int) -> Array:
            return (std * jax.random.normal(next(keys), shape)).astype(dtype)

        def linear(out: int, into: int) -> Linear:
            return Linear(normal(count, out, into))

        def norm(*shape: int) -> RMSNorm:
            return RMSNorm(jnp.ones(shape, dtype), c.rms_norm_eps)

        inner, outer = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        D, F = c.hidden_size, c.intermediate_size
        self.embed = normal(c.vocab_size, D)
        self.layers = Layer(
            norm(count, D),
            Attention(
                linear(inner, D), linear(outer, D), linear(outer, D), linear(D, inner),
                c.head_dim, c.sliding_window, kernel,
            ),
            norm(count, D),
            MLP(linear(F, D), linear(F, D), linear(D, F)),
        )  # fmt: skip
        self.norm = norm(D)
        self.head = None if c.tie_word_embeddings else Linear(normal(c.vocab_size, D))
        self.config = config
        self.dtype = dtype
        self.checkpointing = checkpointing

    @eqx.filter_jit
    def __call__(self, ids: Int[Array, "*batch T"]) -> Float[Array, "*batch T V"]:
        """Logits in float32 of token ids [T] or [B, T], compiled once for each shape; nan for unknown tokens."""
        ids = jnp.asarray(ids)
        return self.logits(self.states(ids if ids.ndim > 1 else ids[None])).reshape(*ids.shape, -1)

    def states(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Hidden states after the last norm."""
        return self.norm(self._run(ids, every=False)[0])

    def all_states(self, ids: Int[Array, "B T"]) -> Float[Array, "depth B T D"]:
        """Hidden states after the embedding and after each layer but the last, then those after the last norm."""
        x, inner = self._run(ids, every=True)
        return jnp.concatenate((self._embedded(ids)[None], inner[:-1], self.norm(x)[None]))

    def logits(self, states: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in float32 of hidden states.

        Raises:
            ModelError: this model has no head.
        """
        if self.head is None and not self.config.tie_word_embeddings:
            raise ModelError("this Mistral has no head to make logits with; load the model again")
        weight = self.embed if self.head is None else self.head.weight
        return jnp.matmul(states, weight.astype(states.dtype).T, preferred_element_type=jnp.float32)

    def _embedded(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # Of a token that the vocabulary has not, JAX would take another's embedding; nan cannot be overlooked.
        return self.embed.at[ids].get(mode="fill", fill_value=jnp.nan).astype(self.dtype)

    def _run(self, ids: Int[Array, "B T"], every: bool) -> tuple[Array, Any]:
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        turn = rotary(ids.shape[1], self.config.head_dim, self.config.rope_theta)

        def layer(x: Array, weights: Any) -> tuple[Array, Array | None]:
            x = eqx.combine(weights, rest)(x, turn)
            return x, x if every else None

        body = jax.checkpoint(layer, prevent_cse=False) if self.checkpointing else layer
        return lax.scan(body, self._embedded(ids), arrays)


def but(model: Mistral, dtype: str | None = None, checkpointing: bool | None = None) -> Mistral:
    """The same weights, computed with in another type, or with or without gradient checkpointing."""
    changes = {"dtype": dtype, "checkpointing": checkpointing}
    changes = {name: value for name, value in changes.items() if value is not None}
    again = object.__new__(type(model))  # its constructor would draw weights
    for name, value in vars(model).items():
        object.__setattr__(again, name, changes.get(name, value))
    return again
