"""What is trained: every weight, LoRA adapters on whatever linear layers an architecture has, or a soft prompt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from perdure.errors import ConfigError, ModelError
from perdure.models import objectives
from perdure.models.adapters import TUNINGS, count_parameters, moving, soft_prompt, tune
from perdure.models.load import load

KINDS = ["llama", "qwen2", "mistral", "bitnet", "lfm2", "phi3"]
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
    assert set(TUNINGS) == {"full", "lora", "soft-prompt", "head"}
    with pytest.raises(ConfigError, match=r"unknown tuning 'lara'. Did you mean 'lora'\?"):
        tune(model, "lara")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tuning head is for regression"):
        tune(model, "head")


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


PROMPT = "prompt_encoder.default.embedding.weight"
LAYOUTS = [*KINDS, "nano"]


def with_prompt(make_lm: Any, kind: str, **settings: Any) -> Any:
    """A model behind a soft prompt whose numbers matter."""
    base = load("nano").model if kind == "nano" else make_lm(kind, seed=3, spread=0.3)
    torch.manual_seed(0)
    return tune(base, "soft-prompt", **{"tokens": 5, **settings}).eval()


def by_hand(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the tokens of one row, through the base: [T, V]."""
    base = model.get_base_model()
    rows = torch.cat([dict(model.named_parameters())[PROMPT], base.get_input_embeddings()(ids)])
    return base(inputs_embeds=rows[None], use_cache=False).logits[0, -len(ids) :]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_soft_prompt_stands_before_every_row(make_lm: Any, make_lm_rows: Any, kind: str) -> None:
    """To 1e-6 of the greatest logit, padded rows as alone; uncut logits would be longer than a row.

    In double precision, but for norms and rotations: in single, sums of another order come near to that.
    """
    model = with_prompt(make_lm, kind).double()
    batch = objectives.collate(make_lm_rows(6), "causal_lm")
    with torch.no_grad():
        found = objectives.forward(model, batch).logits
        assert found.shape[:2] == batch.x.shape
        assert model(input_ids=batch.x, use_cache=False).logits.shape[1] == batch.x.shape[1] + 5
        for row, example in zip(found, batch.examples, strict=True):
            alone = by_hand(model, example.x)
            bare = model.get_base_model()(input_ids=example.x[None], use_cache=False).logits[0]
            tolerance = 1e-6 * float(alone.abs().max())
            torch.testing.assert_close(row[: len(alone)], alone, rtol=0, atol=tolerance)
            assert (bare - alone).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_soft_prompt_alone_is_trained(make_lm: Any, make_lm_rows: Any, kind: str) -> None:
    """Five rows of 16: 80 numbers. The gradient reaches all of them, and the base stays as it was to the bit."""
    model = with_prompt(make_lm, kind).train()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [PROMPT]
    assert count_parameters(model)[0] == 80
    assert {name: tuple(value.shape) for name, value in moving(model).items()} == {PROMPT: (5, 16)}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    batch = objectives.collate(make_lm_rows(6), "causal_lm")
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objectives.total_loss(objectives.forward(model, batch), batch, "causal_lm")
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    for name, parameter in model.named_parameters():
        assert (name != PROMPT) == torch.equal(parameter, before[name]), name
    assert (model.get_parameter(PROMPT) != before[PROMPT]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_single_rows_at_once(make_lm: Any, kind: str) -> None:
    """As `strategies.fisher` takes them: vmap over rows of equal length, against autograd row by row."""
    model = with_prompt(make_lm, kind)
    values = {PROMPT: model.get_parameter(PROMPT).detach()}

    def loss(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        logits = functional_call(model, weights, (), {"input_ids": ids[None], "use_cache": False}).logits[0, 5:]
        return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        together = vmap(grad(loss), in_dims=(None, 0), randomness="error")(values, IDS)[PROMPT]
    prompt = model.get_parameter(PROMPT)
    alone = torch.stack([torch.autograd.grad(loss({PROMPT: prompt}, ids), prompt)[0] for ids in IDS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_where_a_soft_prompt_starts(make_lm: Any) -> None:
    """Drawn pieces of the table, or numbers as widely spread; the same under the same seed."""
    table = make_lm("llama", seed=3, spread=0.3).get_input_embeddings().weight

    def started(init: str) -> torch.Tensor:
        return soft_prompt(with_prompt(make_lm, "llama", tokens=20, init=init)).detach()

    drawn = [started("vocabulary"), started("random")]
    assert all((row == table).all(1).any() for row in drawn[0])
    assert len({tuple(row.tolist()) for row in drawn[0]}) > 10
    assert not any((row == table).all(1).any() for row in drawn[1])
    assert float(drawn[1].std()) == pytest.approx(0.3, rel=0.2)  # 320 numbers; by PEFT's own it would be 1
    for init, prompt in zip(("vocabulary", "random"), drawn, strict=True):
        assert torch.equal(started(init), prompt)
        torch.manual_seed(1)
        other = tune(make_lm("llama", seed=3, spread=0.3), "soft-prompt", tokens=20, init=init)
        torch.manual_seed(1)
        assert not torch.equal(soft_prompt(other), prompt)


@pytest.mark.parametrize(("tokens", "ids"), [(2, [7, 9]), (3, [7, 9, 4]), (7, [7, 9, 4, 7, 9, 4, 7])])
def test_a_text_is_repeated_or_cut(make_lm: Any, tokens: int, ids: list[int]) -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [{"answer": 7, "in": 9, "words": 4}[word] for word in text.split()]}

    settings = {"tokens": tokens, "init": "text", "tokenizer": tokenizer}
    model = with_prompt(make_lm, "llama", text="answer in words", **settings)
    assert torch.equal(soft_prompt(model), model.get_input_embeddings().weight[ids])
    for wrong in ({"text": " "}, {"text": None}, {"text": "in", "tokenizer": None}):
        with pytest.raises(ConfigError, match=r"soft_prompt\.(text|init): "):
            with_prompt(make_lm, "llama", **{**settings, **wrong})


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_soft_prompt_is_saved_alone_and_loaded_by_peft(make_lm: Any, kind: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors import safe_open

    model = with_prompt(make_lm, kind)
    with torch.no_grad():
        model.get_parameter(PROMPT).normal_(std=0.3)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert list(file.keys()) == ["prompt_embeddings"]
    base = load("nano").model if kind == "nano" else make_lm(kind, seed=3, spread=0.3)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model))


def test_a_soft_prompt_needs_room(make_lm: Any) -> None:
    """Of 64 positions, 8 are for text."""
    assert len(soft_prompt(tune(make_lm(), "soft-prompt", tokens=56))) == 56
    with pytest.raises(ModelError, match=r"soft_prompt.tokens: 57 virtual tokens .* 64 positions.*at most 56"):
        tune(make_lm(), "soft-prompt", tokens=57)


def test_a_soft_prompt_is_refused_where_peft_takes_another_table(make_lm: Any) -> None:
    """PEFT takes the first weight with a row for each piece, which here is one of the MLP, or the positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    first = make_lm("llama", vocab_size=24)
    first.model._modules["embed_tokens"] = first.model._modules.pop("embed_tokens")
    second = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=40, n_embd=16, n_layer=1, n_head=2))
    second.transformer._modules["wte"] = second.transformer._modules.pop("wte")
    for model in (first, second):
        with pytest.raises(ModelError, match="soft prompt: PEFT"):
            tune(model, "soft-prompt")


def test_no_soft_prompt_no_virtual_tokens(make_lm: Any) -> None:
    assert soft_prompt(make_lm()) is None
    assert soft_prompt(tune(make_lm(), "lora")) is None
    assert soft_prompt(torch.nn.Linear(2, 2)) is None
    assert soft_prompt(SimpleNamespace()) is None
