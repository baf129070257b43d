"""What the tensors of a Mistral are called in each layout, and which way rotary rows lie there.

A name here is the path of a weight in `perdure.jax.mistral.Mistral`; those that begin with `layers.` stand for one
tensor a layer. Hugging Face and perdure pair row i of a head's queries and keys with row i + H/2 (halves);
Mistral's own files pair rows 2i and 2i + 1 (pairs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from perdure.jax.config import MistralConfig
from perdure.jax.tensors import PIECE, Stored

Layout = Literal["jax", "huggingface", "mistral"]
LAYOUTS: dict[str, str] = {
    "jax": "what perdure.jax loads: one file, the layers stacked",
    "huggingface": "config.json and model.safetensors or its shards",
    "mistral": "params.json and consolidated.safetensors",
}
HUGGINGFACE = {
    "embed": "model.embed_tokens.weight",
    "layers.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.attention.query.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.attention.key.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.attention.value.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.attention.output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.mlp.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.mlp.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.mlp.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
MISTRAL = {
    "embed": "tok_embeddings.weight",
    "layers.attention_norm.weight": "layers.{}.attention_norm.weight",
    "layers.attention.query.weight": "layers.{}.attention.wq.weight",
    "layers.attention.key.weight": "layers.{}.attention.wk.weight",
    "layers.attention.value.weight": "layers.{}.attention.wv.weight",
    "layers.attention.output.weight": "layers.{}.attention.wo.weight",
    "layers.mlp_norm.weight": "layers.{}.ffn_norm.weight",
    "layers.mlp.gate.weight": "layers.{}.feed_forward.w1.weight",
    "layers.mlp.up.weight": "layers.{}.feed_forward.w3.weight",
    "layers.mlp.down.weight": "layers.{}.feed_forward.w2.weight",
    "norm.weight": "norm.weight",
    "head.weight": "output.weight",
}
TABLES: dict[str, dict[str, str]] = {"huggingface": HUGGINGFACE, "mistral": MISTRAL}
TURNED = ("layers.attention.query.weight", "layers.attention.key.weight")

# A weight's path, and its layer (None: it has none).
Key = tuple[str, int | None]


def shapes(config: MistralConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by path; that of one layer where there is one a layer."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    found: dict[str, tuple[int, ...]] = {
        "embed": (config.vocab_size, D),
        "layers.attention_norm.weight": (D,),
        "layers.attention.query.weight": (N * H, D),
        "layers.attention.key.weight": (K * H, D),
        "layers.attention.value.weight": (K * H, D),
        "layers.attention.output.weight": (D, N * H),
        "layers.mlp_norm.weight": (D,),
        "layers.mlp.gate.weight": (F, D),
        "layers.mlp.up.weight": (F, D),
        "layers.mlp.down.weight": (D, F),
        "norm.weight": (D,),
    }
    if not config.tie_word_embeddings:
        found["head.weight"] = (config.vocab_size, D)
    return found


def keys(config: MistralConfig) -> Iterator[Key]:
    """Every tensor in reading order: the embedding, layer by layer, the last norm, the head."""
    paths = shapes(config)
    inner = [path for path in paths if path.startswith("layers.")]
    yield "embed", None
    for layer in range(config.num_hidden_layers):
        for path in inner:
            yield path, layer
    for path in paths:
        if path not in inner and path != "embed":
            yield path, None


def name_in(layout: str, key: Key) -> str:
    """What that layout calls a tensor."""
    path, layer = key
    return TABLES[layout][path].format(layer)


@dataclass(frozen=True, slots=True)
class Cut:
    """A tensor to be copied from a file, its rows turned from pairs to halves or back on the way.

    Attributes:
        stored: where it lies.
        head_dim: H, rows of a head.
        turn: what becomes of the rows of each head.
    """

    stored: Stored
    head_dim: int = 0
    turn: Literal["keep", "halves", "pairs"] = "keep"

    def pieces(self) -> Iterator[bytes]:
        """Its bytes in the order wanted; a head at a time where rows are turned."""
        if self.turn == "keep":
            yield from self.stored.pieces(PIECE)
            return
        half = self.head_dim // 2
        before = (half, 2) if self.turn == "halves" else (2, half)
        width = self.stored.size // self.stored.shape[0]  # bytes of a row
        for piece in self.stored.pieces(self.head_dim * width):
            rows = np.frombuffer(piece, np.uint8).reshape(*before, width)
            yield rows.transpose(1, 0, 2).tobytes()

    def turned(self, path: str, turn: Literal["halves", "pairs"], head_dim: int) -> Cut:
        """The same with its rows turned as well, if the weight at `path` has rotary rows."""
        if path not in TURNED:
            return self
        if self.turn == "keep":
            return Cut(self.stored, head_dim, turn)
        assert self.turn != turn, "turned twice the same way"
        return Cut(self.stored)
