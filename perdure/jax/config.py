"""The shape of a Mistral, read from Hugging Face's config.json or from Mistral's own params.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perdure.errors import ModelError

# Llama's maths is Mistral's without a window, so that its checkpoints port as they are.
ARCHITECTURES = ("mistral", "llama")
THETA = 10_000.0
SCALED = ("yarn", "rope_scaling", "use_scaled_rope", "llama_4_scaling")  # of params.json
LONG_THETA = 1_000_000.0  # Mistral's own code takes it where neither a base nor a window is given


@dataclass(frozen=True, slots=True)
class MistralConfig:
    """Shape and constants of a Mistral.

    Attributes:
        vocab_size: tokens, V.
        hidden_size: width of the hidden states, D.
        intermediate_size: width inside the perceptron, F.
        num_hidden_layers: L.
        num_attention_heads: heads of queries, N.
        num_key_value_heads: heads of keys and values, K; N is a multiple of it.
        head_dim: width of a head, H, even.
        sliding_window: a token sees itself and the `sliding_window` − 1 before it; None: all before it.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: added to the mean square in every norm.
        tie_word_embeddings: logits are made with the embedding.

    Raises:
        ModelError: numbers that do not go together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int | None = None
    rope_theta: float = THETA
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "head_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ModelError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}): each head of keys serves as many heads of queries"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        window = self.sliding_window
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise ModelError(f"sliding_window must be null or a whole number of at least 1, got {window!r}")

    @classmethod
    def from_huggingface(cls, values: Mapping[str, Any]) -> MistralConfig:
        """Of the contents of a config.json.

        Raises:
            ModelError: another architecture, a missing entry, or a variant that is not read here.
        """
        kind = values.get("model_type")
        if kind not in ARCHITECTURES:
            raise ModelError(
                f"model_type {kind!r}: not an architecture read here; known: {', '.join(ARCHITECTURES)}"
            )
        refused = [
            f"{name} {values[name]!r}"
            for name, usual in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False))
            if values.get(name) not in (None, usual)
        ]
        if values.get("quantization_config"):
            refused.append("quantization_config")
        rope = {**(values.get("rope_parameters") or values.get("rope_scaling") or {})}
        if rope.get("rope_type", rope.get("type", "default")) not in (None, "default"):
            refused.append(f"rotary positions of type {rope.get('rope_type', rope.get('type'))!r}")
        if refused:
            raise ModelError(f"this variant of {kind} is not read here: {'; '.join(refused)}")
        needed = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        )  # fmt: skip
        _require(values, needed, "config.json")
        heads = values["num_attention_heads"]
        return cls(
            **{name: values[name] for name in needed},
            num_key_value_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            sliding_window=values.get("sliding_window") if kind == "mistral" else None,
            rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or THETA),
            rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        )

    @classmethod
    def from_mistral(cls, values: Mapping[str, Any]) -> MistralConfig:
        """Of the contents of a params.json.

        Without `rope_theta` the base is 10,000 with a window and 1,000,000 without, as in Mistral's own code.
        """
        if (
            values.get("moe")
            or values.get("use_biases")
            or values.get("quantization")
            or values.get("vision_encoder")
        ):
            raise ModelError(
                "params.json: experts, biases, quantised weights and vision encoders are not read here"
            )
        scaled = [name for name in SCALED if values.get(name)]
        if scaled:
            raise ModelError(f"params.json: scaled rotary positions ({', '.join(scaled)}) are not read here")
        _require(values, ("dim", "n_layers", "hidden_dim", "n_heads", "vocab_size", "norm_eps"), "params.json")
        window = values.get("sliding_window")
        if isinstance(window, list | tuple):
            raise ModelError(f"params.json: one sliding_window for all layers is read here, got {list(window)}")
        window = None if window is None else int(window)  # some files have it as text
        theta = values.get("rope_theta") or (LONG_THETA if window is None else THETA)
        return cls(
            vocab_size=values["vocab_size"],
            hidden_size=values["dim"],
            intermediate_size=values["hidden_dim"],
            num_hidden_layers=values["n_layers"],
            num_attention_heads=values["n_heads"],
            num_key_value_heads=values.get("n_kv_heads") or values["n_heads"],
            head_dim=values.get("head_dim") or values["dim"] // values["n_heads"],
            sliding_window=window,
            rope_theta=float(theta),
            rms_norm_eps=float(values["norm_eps"]),
            tie_word_embeddings=bool(values.get("tied_embeddings", False)),
        )

    def to_huggingface(self, dtype: str) -> dict[str, Any]:
        """The contents of a config.json that says the same; `dtype` as in torch, "bfloat16" say."""
        return {
            "architectures": ["MistralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "dtype": dtype,
            "eos_token_id": 2,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rope_theta": self.rope_theta,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }

    def to_mistral(self) -> dict[str, Any]:
        """The contents of a params.json that says the same."""
        values = {
            "dim": self.hidden_size,
            "n_layers": self.num_hidden_layers,
            "head_dim": self.head_dim,
            "hidden_dim": self.intermediate_size,
            "n_heads": self.num_attention_heads,
            "n_kv_heads": self.num_key_value_heads,
            "rope_theta": self.rope_theta,
            "norm_eps": self.rms_norm_eps,
            "vocab_size": self.vocab_size,
        }
        if self.sliding_window is not None:
            values["sliding_window"] = self.sliding_window
        if self.tie_word_embeddings:
            values["tied_embeddings"] = True
        return values


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        ModelError: no such file, no JSON, or no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: could not be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: must hold a JSON object, got {type(found).__name__}")
    return found


def _require(values: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise ModelError(f"{where} lacks {', '.join(missing)}")
