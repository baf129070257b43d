"""What is trained: every weight, or LoRA adapters on whatever linear layers an architecture has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perdure.errors import ModelError
from perdure.models.adapters import TUNINGS, count_parameters, tune

KINDS = ["llama", "qwen2", "mistral", "bitnet", "lfm2"]
IDS = torch.tensor([[3, 9, 27, 5, 14], [31, 4, 12, 37, 8]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def adapted(model: Any) -> set[str]:
    """The layers that carry an adapter."""
    return {name.split(".lora_")[0].removeprefix("base_model.model.") for name, _ in model.named_parameters()
            if ".lora_" in name}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_lora_finds_every_linear_layer_but_the_output(make_lm: Any, kind: str) -> None:
    base = make_lm(kind)
    expected = {n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert len(expected) >= 7
    assert adapted(tune(base, "lora", r=2, alpha=4)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_lora_starts_as_the_base_and_leaves_it_frozen(make_lm: Any, kind: str) -> None:
    before = logits(make_lm(kind, spread=0.3))
    model = tune(make_lm(kind, spread=0.3), "lora", r=2, alpha=4)
    assert torch.equal(logits(model), before)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" not in n}
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in base)
    assert all(p.requires_grad for n, p in model.named_parameters() if n not in base)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name
    assert (logits(model) - before).abs().max() > 1e-3


def test_rank_scale_and_dropout_reach_the_adapters(make_lm: Any) -> None:
    """α/r = 12/3 = 4; A is [3, in] and B [out, 3]."""
    model = tune(make_lm(), "lora", r=3, alpha=12, dropout=0.25)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert layer.scaling["default"] == 4
    assert layer.lora_A["default"].weight.shape == (3, 16)
    assert layer.lora_B["default"].weight.shape == (24, 3)
    assert layer.lora_dropout["default"].p == 0.25


def test_named_targets_only(make_lm: Any) -> None:
    model = tune(make_lm(), "lora", targets=["q_proj", "v_proj"])
    assert {name.rsplit(".", 1)[1] for name in adapted(model)} == {"q_proj", "v_proj"}
    assert len(adapted(model)) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_target_is_named(make_lm: Any, kind: str) -> None:
    with pytest.raises(ModelError, match=r"LoRA target modules \['no_such_proj'\]: .*no_such_proj"):
        tune(make_lm(kind), "lora", targets=["no_such_proj"])


def test_full_trains_everything_again(make_lm: Any) -> None:
    model = make_lm().requires_grad_(False)
    assert tune(model, "full") is model
    assert all(p.requires_grad for p in model.parameters())
    assert set(TUNINGS) == {"full", "lora"}


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_count_once(make_lm: Any, tied: bool) -> None:
    """By hand, 2 layers of width 16, MLP 24, 4 heads of 4 of which 2 are key-value heads, 40 pieces:

    q and o 2·16·16 = 512, k and v 2·16·8 = 256, MLP 3·16·24 = 1,152, norms 2·16 = 32: 1,952 a layer, 3,904 for two.
    With the last norm 3,920; embeddings 40·16 = 640, and as much again for an output layer of its own.
    """
    total = 3_920 + 640 + (0 if tied else 640)
    model = make_lm("llama", tie_word_embeddings=tied)
    assert count_parameters(model) == (total, total)
    model.get_input_embeddings().requires_grad_(False)
    assert count_parameters(model) == (total - 640, total)


def test_lora_parameters_by_hand(make_lm: Any) -> None:
    """r = 2: r·(in + out) a layer. q, o: 2·32 each; k, v: 2·24 each; three of the MLP: 2·40 each.

    128 + 96 + 240 = 464 a block, 928 for two; the tied base has 4,560.
    """
    model = tune(make_lm("llama", tie_word_embeddings=True), "lora", r=2, alpha=4)
    assert count_parameters(model) == (928, 928 + 4_560)
