"""A Mistral's shape, from Hugging Face's settings and from Mistral's own."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.errors import ModelError
from perdure.jax import MistralConfig

# Mistral-7B-v0.1's files, as published.
HUGGINGFACE: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
PARAMS: dict[str, Any] = {
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
    "norm_eps": 1e-05, "sliding_window": 4096, "vocab_size": 32000,
}  # fmt: skip
SHAPE = MistralConfig(32000, 4096, 14336, 32, 32, 8, 128, 4096, 10000.0, 1e-5, False)


def test_both_files_say_the_same() -> None:
    assert MistralConfig.from_huggingface(HUGGINGFACE) == SHAPE == MistralConfig.from_mistral(PARAMS)


def test_there_and_back() -> None:
    assert MistralConfig.from_huggingface(SHAPE.to_huggingface("bfloat16")) == SHAPE
    assert MistralConfig.from_mistral(SHAPE.to_mistral()) == SHAPE


def test_transformers_reads_what_is_written() -> None:
    from transformers import MistralConfig as Theirs

    theirs = Theirs(**SHAPE.to_huggingface("bfloat16"))
    assert MistralConfig.from_huggingface(theirs.to_dict()) == SHAPE


def test_the_base_of_rotary_positions_in_all_its_places() -> None:
    """New files have `rope_parameters`, older ones `rope_theta`; Mistral's own code takes 1e6 without a window."""
    new = {**HUGGINGFACE, "rope_theta": None, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    assert MistralConfig.from_huggingface(new).rope_theta == 7.0
    assert MistralConfig.from_huggingface({**HUGGINGFACE, "rope_theta": 9.0}).rope_theta == 9.0
    open_ended = {**PARAMS, "sliding_window": None}
    assert MistralConfig.from_mistral(open_ended).rope_theta == 1e6
    assert MistralConfig.from_mistral({**open_ended, "rope_theta": 5e5}).rope_theta == 5e5


def test_other_forms() -> None:
    assert MistralConfig.from_huggingface({**HUGGINGFACE, "sliding_window": None}).sliding_window is None
    assert MistralConfig.from_mistral({**PARAMS, "sliding_window": "4096"}).sliding_window == 4096
    assert MistralConfig.from_huggingface({**HUGGINGFACE, "head_dim": 160}).head_dim == 160


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral': not an architecture read here; known: mistral, llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rotary positions of type 'yarn'"),
        ({"hidden_size": None}, "config.json lacks hidden_size"),
        ({"num_key_value_heads": 5}, r"num_attention_heads \(32\) must be a multiple of num_key_value_heads \(5\)"),
        ({"sliding_window": 0}, "sliding_window must be null or a whole number of at least 1, got 0"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number of at least 1, got 'many'"),
    ],
)
def test_what_is_not_read_is_refused(changes: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        MistralConfig.from_huggingface({**HUGGINGFACE, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe": {"num_experts": 8}}, "experts"),
        ({"sliding_window": [4, None]}, r"one sliding_window for all layers is read here, got \[4, None\]"),
        ({"dim": None, "n_layers": None}, "params.json lacks dim, n_layers"),
    ],
)
def test_what_is_not_read_of_mistrals_own_is_refused(changes: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        MistralConfig.from_mistral({**PARAMS, **changes})
